"""act_model by itself: configuration, loss, ensembler, backbone, precision. LeRobot's numbers: test_act_parity."""

import copy
import math
import re

import pytest
import torch
import torchvision

from act_model import (
    ACT,
    ACTConfig,
    Dropout,
    FrozenBatchNorm,
    TemporalEnsembler,
    loss_terms,
    sinusoidal_positions_2d,
)

SMALL = dict(
    state_dim=6, action_dim=6, cameras=("front", "wrist"), chunk_size=10, dim_model=32, n_heads=4, dim_feedforward=48,
    feedforward_activation="relu", n_encoder_layers=1, n_decoder_layers=2, n_vae_encoder_layers=1, use_vae=True,
    latent_dim=8, dropout=0.1, pre_norm=False, vision_backbone="resnet18", replace_final_stride_with_dilation=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def initial() -> ACT:
    torch.manual_seed(0)
    return ACT(ACTConfig(**SMALL))


@pytest.fixture
def model(initial) -> ACT:
    return copy.deepcopy(initial)  # cheaper than a new one


def make_batch(B: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    """Sample b ends in b padded actions."""
    generator = torch.Generator().manual_seed(seed)
    chunk = SMALL["chunk_size"]
    return {
        "observation.state": torch.randn(B, 6, generator=generator),
        "observation.images.front": torch.randn(B, 3, 40, 56, generator=generator),
        "observation.images.wrist": torch.randn(B, 3, 64, 33, generator=generator),
        "action": torch.randn(B, chunk, 6, generator=generator),
        "action_is_pad": torch.arange(chunk) >= chunk - torch.arange(B).unsqueeze(1),
    }


def training_loss(model: ACT, batch: dict[str, torch.Tensor], seed: int = 2) -> torch.Tensor:
    torch.manual_seed(seed)
    actions_hat, posterior = model.train()(batch)
    l1_sum, n_valid, kl_sum = loss_terms(actions_hat, batch["action"], batch["action_is_pad"], *posterior)
    return l1_sum / n_valid + 10.0 * kl_sum / len(actions_hat)


def without_dropout(model: ACT) -> None:
    """For comparisons in which other elements would be dropped."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
        elif isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0


# ---- Configuration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("chunk_size", 0, "a positive integer"),
        ("dim_model", 32.0, "a positive integer"),
        ("n_heads", True, "a positive integer"),
        ("use_vae", 1, "true or false"),
        ("dropout", 1.0, "a number in [0, 1)"),
        ("n_heads", 5, "a multiple of n_heads (5)"),
        ("n_heads", 7, "a multiple of n_heads (7)"),
        ("feedforward_activation", "swish", "one of ['relu', 'gelu']"),
        ("vision_backbone", "vgg16", "one of ['resnet18', 'resnet34', 'resnet50']"),
        ("replace_final_stride_with_dilation", True, "false with resnet18"),
        ("cameras", (), "a tuple of at least one camera name, each once"),
        ("cameras", ["front"], "a tuple of at least one camera name, each once"),
        ("cameras", ("front", "front"), "a tuple of at least one camera name, each once"),
        ("cameras", ("camera.front",), "names of letters, digits, '_' and '-'"),
    ],
)
def test_config_is_refused_in_one_clear_line(field, value, expected):
    """The message says which field, what was found and what is expected."""
    with pytest.raises(ValueError) as caught:
        ACTConfig(**{**SMALL, field: value})
    message = str(caught.value)
    named = "dim_model" if "multiple of n_heads" in expected else field  # the pair that disagrees
    found = SMALL["dim_model"] if named != field else value
    assert message.startswith(f"ACTConfig.{named} is {found!r}; expected {expected}")
    assert "\n" not in message


def test_dim_model_must_hold_sines_and_cosines_of_two_axes():
    """dim_model 6 divides by its heads but not into the 2-D position embedding."""
    with pytest.raises(ValueError, match="ACTConfig.dim_model is 6; expected a multiple of 4"):
        ACTConfig(**{**SMALL, "dim_model": 6, "n_heads": 2})


# ---- Loss ----------------------------------------------------------------------------------------------------


def test_kl_is_that_of_two_gaussians():
    """kl_sum is torch.distributions' KL divergence, summed over latent and batch."""
    torch.manual_seed(0)
    mu, log_sigma_x2 = torch.randn(4, 8), torch.randn(4, 8)
    zeros = torch.zeros(4, 10, 6)
    _, _, kl_sum = loss_terms(zeros, zeros, torch.zeros(4, 10, dtype=torch.bool), mu, log_sigma_x2)
    posterior = torch.distributions.Normal(mu, (log_sigma_x2 / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(kl_sum, expected)


def test_loss_terms_of_shards_add_up_to_those_of_the_whole():
    """Sums over unequal shards are the whole batch's, and so is what comes of one division: what DDP relies on."""
    torch.manual_seed(0)
    B, L = 5, 8
    actions_hat, actions, mu, log_sigma_x2 = (torch.randn(B, *s) for s in ((10, 6), (10, 6), (L,), (L,)))
    is_pad = torch.arange(10) >= torch.tensor([10, 9, 1, 4, 7]).unsqueeze(1)
    parts = (actions_hat, actions, is_pad, mu, log_sigma_x2)
    shards = [loss_terms(*(part[rows] for part in parts)) for rows in (slice(0, 2), slice(2, 5))]
    added = tuple(sum(values) for values in zip(*shards, strict=True))
    assert added[1] == (10 + 9 + 1 + 4 + 7) * 6
    torch.testing.assert_close(added, loss_terms(*parts))


def test_loss_has_a_value_without_posterior_or_valid_actions():
    """No VAE: KL is 0. Nothing but padding: the sum is 0 over 0 actions, not NaN."""
    actions = torch.randn(2, 10, 6)
    l1_sum, n_valid, kl_sum = loss_terms(actions, actions + 1, torch.zeros(2, 10, dtype=torch.bool), None, None)
    assert kl_sum == 0 and n_valid == 120 and l1_sum == pytest.approx(120.0)
    assert loss_terms(actions, actions + 1, torch.ones(2, 10, dtype=torch.bool), None, None) == (0, 0, 0)


def test_padded_actions_change_nothing(model):
    """Whatever stands in padded actions, loss and gradients are the same: masked in the L1 *and* the VAE."""
    results = []
    for filler in (0.0, 1e3):
        batch = make_batch()
        batch["action"][batch["action_is_pad"]] = filler
        model.zero_grad()
        loss = training_loss(model, batch)
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    (loss_a, gradients_a), (loss_b, gradients_b) = results
    assert loss_a == loss_b
    assert all(torch.equal(a, b) for a, b in zip(gradients_a, gradients_b, strict=True))


def test_actions_before_the_padding_do_count(model):
    """The mask hides padding only: the last real action moves the posterior."""
    batch = make_batch(B=1)
    model.eval()
    before, _ = model.encode_actions(batch["observation.state"], batch["action"], batch["action_is_pad"])
    batch["action"][0, -1] += 1
    after, _ = model.encode_actions(batch["observation.state"], batch["action"], batch["action_is_pad"])
    assert (before - after).abs().max() > 1e-4


# ---- Temporal ensembling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [0.01, 0.0, -0.3, 1.0])
def test_ensembler_is_the_offline_weighted_mean(m):
    """Each step's action is the mean of all predictions made for it, oldest weighing exp(0), then exp(-m), ..."""
    torch.manual_seed(0)
    chunk, n_steps = 7, 20
    chunks = torch.randn(n_steps, 2, chunk, 6)
    ensembler = TemporalEnsembler(m)
    for episode in range(2):  # the second one starts from nothing
        ensembler.reset()
        for t in range(n_steps):
            made_at = range(max(0, t - chunk + 1), t + 1)  # oldest first
            predictions = [chunks[s, :, t - s] for s in made_at]
            weights = [math.exp(-m * i) for i in range(len(predictions))]
            expected = sum(w * p for w, p in zip(weights, predictions, strict=True)) / sum(weights)
            torch.testing.assert_close(ensembler.update(chunks[t]), expected, msg=f"episode {episode}, step {t}")


def test_ensembler_is_lerobots():
    """The same actions as LeRobot's ACTTemporalEnsembler, over more steps than a chunk is long."""
    from lerobot.policies.act.modeling_act import ACTTemporalEnsembler

    torch.manual_seed(0)
    ours, theirs = TemporalEnsembler(0.01), ACTTemporalEnsembler(0.01, 7)
    for _ in range(20):
        chunk = torch.randn(2, 7, 6)
        torch.testing.assert_close(ours.update(chunk), theirs.update(chunk.clone()), rtol=0, atol=1e-6)


# ---- The network ---------------------------------------------------------------------------------------------


def test_load_backbone_takes_a_torchvision_resnet(model):
    """torchvision's own weights give torchvision's own layer-4 features."""
    torch.manual_seed(5)
    resnet = torchvision.models.resnet18(weights=None).eval()
    for name, buffer in resnet.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    model.load_backbone(resnet.state_dict())
    image = torch.randn(2, 3, 50, 70)
    expected = torch.nn.Sequential(*list(resnet.children())[:-2])(image)
    torch.testing.assert_close(model.backbone(image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: s.pop("layer1.0.conv1.weight"), "missing layer1.0.conv1.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda s: s.update({"bn1.bias": torch.zeros(3)}), "other shapes: bn1.bias (3,) instead of (64,)"),
    ],
)
def test_load_backbone_refuses_other_weights(model, break_it, message):
    """Weights that do not fit are named, and nothing is loaded."""
    state = torchvision.models.resnet18(weights=None).state_dict()
    break_it(state)
    before = model.backbone.conv1.weight.clone()
    with pytest.raises(ValueError, match=re.escape(f"backbone weights do not fit resnet18: {message}")):
        model.load_backbone(state)
    assert torch.equal(model.backbone.conv1.weight, before)


def test_training_is_reproducible_and_eval_deterministic(model):
    """Same seed, same loss to the last bit; in eval mode the seed and the target actions do not matter."""
    batch = make_batch()
    assert training_loss(model, batch) == training_loss(model, batch) != training_loss(model, batch, seed=3)
    model.eval()
    torch.manual_seed(0)
    first, posterior = model(batch)
    torch.manual_seed(1)
    second, _ = model({key: value for key, value in batch.items() if key.startswith("observation")})
    assert torch.equal(first, second) and posterior == (None, None)
    assert first.shape == (3, SMALL["chunk_size"], 6)


def test_every_parameter_is_trained(model):
    """Two steps of SGD move every tensor: with two decoder layers, the first one too."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([*model.other_parameters(), *model.backbone_parameters()], lr=1e-3)
    for seed in range(2):
        training_loss(model, make_batch(), seed).backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_cached_positions_are_fresh_ones_and_never_saved(model):
    """The cache holds one embedding for each feature size, equal to a fresh one, outside the state dict."""
    keys = set(model.state_dict())
    with torch.inference_mode():
        model.eval()(make_batch())
    device = torch.device("cpu")
    # A ResNet's layer 4 has 1/32 of the image, rounded up: 40 x 56 -> 2 x 2, 64 x 33 -> 2 x 2.
    assert list(model._image_positions) == [(2, 2, device)]
    model(make_batch() | {"observation.images.wrist": torch.randn(3, 3, 65, 97)})
    for height, width in ((2, 2), (3, 4)):
        fresh = sinusoidal_positions_2d(height, width, 32).reshape(height * width, 1, 32)
        assert torch.equal(model.image_positions(height, width, device), fresh)
    assert len(model._image_positions) == 2
    assert set(model.state_dict()) == keys
    training_loss(model, make_batch()).backward()  # also after a first use under inference_mode


def test_order_of_the_batch_and_of_cameras_does_not_matter(model):
    """Actions depend on neither the batch's nor the cameras' order: tokens are a set, told apart by position only."""
    batch = make_batch() | {"observation.images.wrist": torch.randn(3, 3, 40, 56)}
    actions = model.eval()(batch)[0]
    assert torch.equal(model(dict(reversed(batch.items())))[0], actions)
    front, wrist = batch["observation.images.front"], batch["observation.images.wrist"]
    swapped = model(batch | {"observation.images.front": wrist, "observation.images.wrist": front})[0]
    torch.testing.assert_close(swapped, actions, rtol=0, atol=1e-5)


def test_bfloat16_autocast(model):
    """Under autocast the step runs, the loss and the actions are float32, and close to those without."""
    batch = make_batch()
    without_dropout(model)
    expected = training_loss(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = training_loss(model, batch)
        assert model(batch)[0].dtype == torch.float32
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_that_share_independently_and_scales_the_rest(p: float, dtype: torch.dtype):
    """A million elements: the share within 5 standard deviations, neighbours and draws uncorrelated, gradients masked
    like outputs, the same noise for the same seed."""
    dropout, n = Dropout(p), 1_000_001  # not a multiple of four
    x = torch.ones(n, dtype=dtype, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x)
    assert y.dtype == dtype and set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p), dtype=dtype).item()}
    dropped = (y == 0).float()
    assert abs(dropped.mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    for lag in (1, 2, 3, 4, 8):  # four elements share one draw
        both = (dropped[lag:] * dropped[:-lag]).mean()
        assert abs(both - p * p) < 5 * math.sqrt(p * p * (1 - p * p) / n), lag
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y)
    assert not torch.equal(dropout(x), y)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x)


def test_frozen_batch_norm_is_torchvisions_and_keeps_bfloat16():
    """Bit for bit in float32; in float64, where it is fused as in bfloat16, the same to rounding, gradients too."""
    ours, theirs = FrozenBatchNorm(5), torchvision.ops.FrozenBatchNorm2d(5)
    state = {name: torch.rand(5) + 0.5 for name in theirs.state_dict()}
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    x = torch.randn(2, 5, 4, 3)
    assert torch.equal(ours(x), theirs(x))
    assert ours(x.bfloat16()).dtype == torch.bfloat16 and theirs(x.bfloat16()).dtype == torch.float32
    x = x.double().requires_grad_()
    ours, theirs = ours.double(), theirs.double()
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-14)
    gradients = [torch.autograd.grad(norm(x).square().sum(), x)[0] for norm in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_channels_last(model):
    """In channels_last the actions are the same, up to rounding."""
    batch = make_batch()
    expected = model.eval()(batch)[0]
    fast = model.to(memory_format=torch.channels_last)
    images = {k: v.to(memory_format=torch.channels_last) for k, v in batch.items() if v.dim() == 4}
    torch.testing.assert_close(fast(batch | images)[0], expected, rtol=0, atol=1e-5)


def test_compiles_in_one_graph(model):
    """torch.compile finds no graph break, in training or in eval mode (traced only: no C++ compiler needed)."""
    batch = make_batch()
    without_dropout(model)  # compiled code draws its own
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for mode in (True, False):
        model.train(mode)
        torch.manual_seed(0)
        expected, _ = model(batch)
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(batch)[0], expected, rtol=0, atol=1e-5)
