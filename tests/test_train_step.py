"""Trainer.train_step against what it has to be: LeRobot's own loss, and torch's AdamW, clipping and schedule around it.

Runs that are compared with themselves do not notice a term that is missing from all of them. Here every factor bites:
the KL term, the clipping, the weight decay, the backbone's own rate, the warm-up and the cosine, the padding's mask.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lerobot_checkpoint import save_checkpoint
from tests.tiny import trainer
from training import identity

STEPS, WARMUP = 5, 2
SETTINGS = {
    "training__steps": STEPS,
    "training__batch_size": 4,
    "training__lr": 2e-3,
    "training__lr_backbone": 5e-4,
    "training__weight_decay": 0.3,
    "training__kl_weight": 7.0,
    "training__grad_clip_norm": 0.5,
    "training__scheduler": "cosine",
    "training__warmup_steps": WARMUP,
    "training__min_lr": 1e-4,
    "model__dropout": 0.0,
}


def factor(step: int) -> float:
    """The learning rate's in step 0, 1, ...: a line to 1 over two steps, then half a cosine down to min_lr/lr."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    floor = SETTINGS["training__min_lr"] / SETTINGS["training__lr"]
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - 1 - WARMUP))) / 2


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same latent noise for both sides, whatever else they draw."""
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.linspace(-1.5, 2, x.numel(), dtype=x.dtype).view_as(x))


def lerobot_policy(ready, folder: Path):
    """LeRobot 0.3.2's policy with the trainer's initial weights, in float64; it gets normalised batches."""
    from lerobot.policies.act.modeling_act import ACTPolicy

    checkpoint = save_checkpoint(
        folder, 0, model_state=ready.model.state_dict(), act_config=ready.act, stats=ready.stats,
        image_shapes=ready.episodes[0].image_shape, policy_fields=identity.policy_fields(ready.settings),
        train_config={}, training_state={},
    )  # fmt: skip
    policy = ACTPolicy.from_pretrained(checkpoint / "pretrained_model").double().train()
    policy.normalize_inputs = policy.normalize_targets = torch.nn.Identity()
    return policy


def lerobot_loss(policy, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """LeRobot's L1 + kl_weight * KL. 0.3.2 averages L1 over padded actions too, 0.6 over the valid ones, as we do."""
    policy.config.kl_weight = 0.0
    l1, _ = policy.forward(batch)
    policy.config.kl_weight = SETTINGS["training__kl_weight"]
    both, _ = policy.forward(batch)
    valid = (~batch["action_is_pad"]).double().mean()
    assert 0.3 < valid < 0.95, "some of the batch is padding, and not all"
    return both - l1 + l1 / valid


def test_five_steps_are_those_of_lerobots_loss_and_torchs_optimizer(sample_bags: Path, tmp_path: Path, noise: None):
    """In float64, so that no weight's rounding is amplified by Adam: every weight equal to 1e-7 after five steps."""
    ready = trainer(sample_bags, tmp_path, **SETTINGS)
    policy = lerobot_policy(ready, tmp_path / "lerobot")
    ready.model.double()
    assert all(torch.equal(ours, policy.model.state_dict()[name]) for name, ours in ready.model.state_dict().items())
    groups = [
        {"params": [p for n, p in policy.named_parameters() if not n.startswith("model.backbone")], "lr": 2e-3},
        {"params": [p for n, p in policy.named_parameters() if n.startswith("model.backbone")], "lr": 5e-4},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.3, fused=False, foreach=False)
    started = {name: p.detach().clone() for name, p in policy.model.named_parameters()}

    count, clipped = len(ready.dataset), []
    for step in range(STEPS):
        # From near the ends of episodes, where chunks are padded, and from their middles.
        places = [(step * 37 + i * count // 4 + (count // 4 - 3) * (i % 2)) % count for i in range(4)]
        raw = {name: torch.from_numpy(array) for name, array in ready.dataset.__getitems__(places).items()}
        raw["action_is_pad"][0, 3:] = True
        batch = {k: v.double() if v.is_floating_point() else v for k, v in ready.prepare(raw).items()}
        flags = ready.train_step(batch)
        assert flags.tolist() == [0, 0]

        for group, peak in zip(optimizer.param_groups, (2e-3, 5e-4), strict=True):
            group["lr"] = peak * factor(step)
        optimizer.zero_grad()
        lerobot_loss(policy, dict(batch)).backward()
        clipped.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5) > 0.5)
        optimizer.step()
    assert all(clipped), "the clipping bites"
    theirs = dict(policy.model.named_parameters())
    assert theirs.keys() == dict(ready.model.named_parameters()).keys()
    for name, ours in ready.model.named_parameters():
        assert (ours - theirs[name]).abs().max() < 1e-7, name
        assert (ours - started[name]).abs().max() > 1e-5, f"{name} was trained"
