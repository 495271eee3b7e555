"""Our ACT computes what LeRobot's computes: actions, loss and every gradient, against real 0.3.2 and 0.4.4.

0.3.2 runs in this process, 0.4.4 in an environment of its own (tests/lerobot_044). With PARITY_JSON set, what was
measured is written there; `python -m tests.parity_table` prints it as a table.
"""

import fcntl
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from act_model import ACT, ACTConfig, loss_terms
from tests.lerobot_044 import launch, reference

OUTPUT_TOLERANCE = LOSS_TOLERANCE = 1e-5  # absolute
GRADIENT_TOLERANCE = 1e-4  # of each tensor's norm
# Queries and keys of the decoder's first self-attention see equal values everywhere, so that their true gradient
# is zero and both sides hold rounding noise (4e-9); the smallest real gradient here has a norm of 1e-3.
GRADIENT_NOISE = 1e-7
# Not 10: random weights make the KL term large, and 10 of it would leave the loss itself a resolution of 1e-5.
KL_WEIGHT = 2.0
VERSIONS = ("0.3.2", "0.4.4")


def small(**changes) -> dict:
    fields = dict(
        state_dim=6, action_dim=7, cameras=("top",), chunk_size=12, dim_model=32, n_heads=4, dim_feedforward=48,
        feedforward_activation="relu", n_encoder_layers=2, n_decoder_layers=1, n_vae_encoder_layers=2, use_vae=True,
        latent_dim=8, dropout=0.0, pre_norm=False, vision_backbone="resnet18", replace_final_stride_with_dilation=False,
    )  # fmt: skip
    return {**fields, **changes}


DEFAULT_SIZE = small(
    state_dim=14, action_dim=14, chunk_size=100, dim_model=512, n_heads=8, dim_feedforward=3200,
    n_encoder_layers=4, n_vae_encoder_layers=4, latent_dim=32,
)  # fmt: skip
# "wrist" before "front": an order that sorting would change.
TWO = ("wrist", "front")

# name -> (config, (H, W) of each camera's images, batch size, weights perturbed away from their initialisation)
CASES = {
    "default size, 1 camera": (DEFAULT_SIZE, [(96, 128)], 1, False),
    "1 camera, odd size": (small(), [(97, 131)], 3, True),
    "1 camera, no VAE": (small(use_vae=False, n_decoder_layers=2), [(64, 96)], 3, True),
    "1 camera, no VAE, as initialised": (small(use_vae=False), [(64, 96)], 2, False),
    "1 camera, pre-norm, GELU": (
        small(pre_norm=True, feedforward_activation="gelu", n_decoder_layers=2),
        [(64, 96)],
        3,
        True,
    ),  # fmt: skip
    "2 cameras, 2 decoder layers": (small(cameras=TWO, n_decoder_layers=2), [(97, 131), (64, 96)], 3, True),
    "2 cameras, pre-norm, no VAE": (small(cameras=TWO, pre_norm=True, use_vae=False), [(64, 96), (97, 131)], 3, True),
    "ResNet-50, dilated": (
        small(vision_backbone="resnet50", replace_final_stride_with_dilation=True),
        [(65, 70)],
        2,
        True,
    ),  # fmt: skip
}


def make_case(name: str) -> tuple[ACT, dict[str, torch.Tensor], dict]:
    """The model, a batch whose last samples end in padding, and the case's metadata. Reproducible."""
    settings, sizes, B, perturbed = CASES[name]
    torch.manual_seed(list(CASES).index(name))
    config = ACTConfig(**settings)
    model = ACT(config)
    if perturbed:
        perturb(model)
    batch = {"observation.state": torch.randn(B, config.state_dim)}
    for camera, (height, width) in zip(config.cameras, sizes, strict=True):
        batch[f"observation.images.{camera}"] = torch.randn(B, 3, height, width)
    batch["action"] = torch.randn(B, config.chunk_size, config.action_dim)
    # Sample 0 is whole unless alone; the next ones lose a third, then two thirds of their chunk.
    first_pad = [config.chunk_size * (3 - i % 3) // 3 for i in range(B)] if B > 1 else [config.chunk_size // 2]
    batch["action_is_pad"] = torch.arange(config.chunk_size) >= torch.tensor(first_pad).unsqueeze(1)
    image_shapes = dict(zip(config.cameras, sizes, strict=True))
    return model, batch, dict(settings=settings, image_shapes=image_shapes, kl_weight=KL_WEIGHT, seed=1234)


def perturb(model: ACT) -> None:
    """Move every number off its initialisation, else two norms or biases that were swapped would look the same."""
    for name, tensor in model.state_dict().items():
        if name == "vae_encoder_pos_enc":
            continue
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.startswith("backbone.") and tensor.dim() == 1:
            # About 0.5: random weights without ImageNet's statistics would grow with every residual block.
            tensor.add_(torch.randn_like(tensor) * 0.1)
            if name.endswith("weight"):
                tensor.mul_(0.5)
        else:
            tensor.add_(torch.randn_like(tensor) * 0.05)


@pytest.fixture(scope="module")
def results_044(tmp_path_factory) -> Path:
    """LeRobot 0.4.4's results for all cases, from one start of its interpreter: FOLDER/<i>.out"""

    def prepare(folder: Path) -> list:
        jobs = []
        for i, name in enumerate(CASES):
            model, batch, meta = make_case(name)
            tensors = {f"weights/{key}": tensor for key, tensor in model.state_dict().items()}
            tensors |= {f"batch/{key}": tensor for key, tensor in batch.items()}
            files = dict(case=str(folder / f"{i}.case"), out=str(folder / f"{i}.out"))
            save_file(tensors, files["case"], metadata={key: json.dumps(value) for key, value in meta.items()})
            jobs.append(["forward_backward_file", files])
        return jobs

    folder = launch.run_once(tmp_path_factory, "act-parity", prepare)
    for case in folder.glob("*.case"):  # pytest keeps its temporary folders: leave no half gigabyte there
        case.unlink(missing_ok=True)
    return folder


@pytest.fixture
def lerobot_result(request, name, lerobot) -> dict[str, torch.Tensor]:
    if lerobot == "0.3.2":
        model, batch, meta = make_case(name)
        return reference.forward_backward(model.state_dict(), batch, meta)
    out = request.getfixturevalue("results_044") / f"{list(CASES).index(name)}.out"
    result = {key: tensor.clone() for key, tensor in load_file(out).items()}
    out.unlink()
    return result


@pytest.mark.parametrize("lerobot", VERSIONS)
@pytest.mark.parametrize("name", CASES)
def test_same_actions_loss_and_gradients(name, lerobot, lerobot_result):
    """Same weights, inputs and latent noise: LeRobot's actions, its loss, and its gradient of every parameter."""
    model, batch, meta = make_case(name)
    with torch.no_grad():
        actions, _ = model.eval()(batch)
    output_error = (actions - lerobot_result["actions"]).abs().max().item()

    model.train()
    torch.manual_seed(meta["seed"])
    actions_hat, (mu, log_sigma_x2) = model(batch)
    l1_sum, n_valid, kl_sum = loss_terms(actions_hat, batch["action"], batch["action_is_pad"], mu, log_sigma_x2)
    # Up to 0.4.4, LeRobot averages over padded actions, too; Trainer.train_step over n_valid: test_train_step.py.
    over_padded = lerobot == "0.3.2" or launch.version().startswith("0.4.")
    l1, kl = l1_sum / (batch["action"].numel() if over_padded else n_valid), kl_sum / len(actions_hat)
    loss = l1 + KL_WEIGHT * kl
    loss.backward()
    loss_error = max(
        (ours.detach() - lerobot_result[term]).abs().item() for ours, term in ((loss, "loss"), (l1, "l1"), (kl, "kl"))
    )

    theirs = {key.removeprefix("grad/"): t for key, t in lerobot_result.items() if key.startswith("grad/")}
    parameters = dict(model.named_parameters())
    assert parameters.keys() == theirs.keys()
    gradient_error = {}
    for key, parameter in parameters.items():
        assert parameter.grad is not None, f"{key} has no gradient"
        assert bool(parameter.grad.any()) == bool(theirs[key].any()), f"{key}: a zero gradient on one side only"
        if theirs[key].norm() < GRADIENT_NOISE:
            assert parameter.grad.norm() < GRADIENT_NOISE, f"{key}: LeRobot's gradient is zero but for rounding"
        else:
            gradient_error[key] = ((parameter.grad - theirs[key]).norm() / theirs[key].norm()).item()
    worst = max(gradient_error, key=gradient_error.get)

    record(name, lerobot, output=output_error, loss=loss_error, gradient=gradient_error[worst], worst=worst)
    assert output_error <= OUTPUT_TOLERANCE
    assert loss_error <= LOSS_TOLERANCE
    assert gradient_error[worst] <= GRADIENT_TOLERANCE, worst

    # The sum and the count are those of the actions that are not padding: in float64, one by one.
    errors = [
        (actions_hat[b, t] - batch["action"][b, t]).detach().double().abs()
        for b in range(actions_hat.shape[0])
        for t in range(actions_hat.shape[1])
        if not batch["action_is_pad"][b, t]
    ]
    assert n_valid == torch.cat(errors).numel()
    assert l1_sum.item() == pytest.approx(torch.cat(errors).sum().item(), rel=LOSS_TOLERANCE)


def test_default_size():
    """The default ACT with one camera has LeRobot's 51.6 million parameters."""
    with torch.device("meta"):
        model = ACT(ACTConfig(**DEFAULT_SIZE))
    assert sum(p.numel() for p in model.parameters()) == 51_613_582


@pytest.mark.parametrize("use_vae", [True, False])
def test_zero_gradients_at_initialisation(use_vae):
    """At initialisation exactly these gradients vanish (the decoder starts from zeros; the latent is zero)."""
    torch.manual_seed(0)
    model = ACT(ACTConfig(**small(use_vae=use_vae, n_decoder_layers=2)))
    batch = make_case("1 camera, odd size")[1]
    actions_hat, posterior = model(batch)
    l1_sum, _, kl_sum = loss_terms(actions_hat, batch["action"], batch["action_is_pad"], *posterior)
    (l1_sum + kl_sum).backward()
    zero = {name for name, p in model.named_parameters() if not p.grad.any()}
    first = "decoder.layers.0"
    expected = {f"{first}.self_attn.in_proj_weight", f"{first}.self_attn.out_proj.weight", f"{first}.norm1.weight"}
    assert zero == expected | (set() if use_vae else {"encoder_latent_input_proj.weight"})


def test_lerobot_groups_the_parameters_like_us():
    """The two optimizer groups hold LeRobot's parameters, in LeRobot's order."""
    settings, sizes, _, _ = CASES["1 camera, odd size"]
    config = reference.make_config(settings, dict(zip(settings["cameras"], sizes, strict=True)))
    policy = reference.ACTPolicy(config)
    names = {id(p): name for name, p in policy.model.named_parameters()}
    theirs = [[names[id(p)] for p in group["params"] if id(p) in names] for group in policy.get_optim_params()]
    model = ACT(ACTConfig(**settings))
    names = {id(p): name for name, p in model.named_parameters()}
    ours = [[names[id(p)] for p in group] for group in (model.other_parameters(), model.backbone_parameters())]
    assert [sorted(group) for group in ours] == [sorted(group) for group in theirs]


def test_glu_runs_in_no_lerobot():
    """LeRobot names "glu" but cannot run it; so we refuse it."""
    config = reference.make_config(small(feedforward_activation="glu"), dict(top=(64, 96)))
    policy = reference.ACTPolicy(config, dataset_stats=reference.identity_stats(config))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        policy.predict_action_chunk(make_case("1 camera, no VAE")[1])
    with pytest.raises(ValueError, match="feedforward_activation is 'glu'; expected one of"):
        ACTConfig(**small(feedforward_activation="glu"))


def test_same_fixed_position_embeddings():
    """A fresh model's sinusoids, 1-D and 2-D, are LeRobot's to the last bit."""
    from lerobot.policies.act import modeling_act

    from act_model import sinusoidal_positions_1d, sinusoidal_positions_2d

    assert torch.equal(sinusoidal_positions_1d(102, 64), modeling_act.create_sinusoidal_pos_embedding(102, 64))
    theirs = modeling_act.ACTSinusoidalPositionEmbedding2d(32)(torch.zeros(1, 8, 5, 7))  # (1, 64, 5, 7)
    assert torch.equal(sinusoidal_positions_2d(5, 7, 64), theirs[0].permute(1, 2, 0))


def record(name: str, lerobot: str, **measured) -> None:
    """Add a row to the table in PARITY_JSON, which workers share."""
    if not (path := os.environ.get("PARITY_JSON")):
        return
    with open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        rows = json.loads(file.read() or "[]")
        rows = [row for row in rows if (row["case"], row["lerobot"]) != (name, lerobot)]
        rows.append(dict(case=name, lerobot=lerobot, **measured))
        file.truncate(0)
        file.write(json.dumps(rows, indent=1))
