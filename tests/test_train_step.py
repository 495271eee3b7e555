"""Trainer.train_step against what it has to be: LeRobot's own loss, and torch's AdamW, clipping and schedule around it.

Runs that are compared with themselves do not notice a term that is missing from all of them. Here every factor bites:
the KL term, the clipping, the weight decay, the backbone's own rate, the warm-up and the cosine, the padding's mask.
All in float64, so that no weight's rounding is amplified by Adam.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch

from lerobot_checkpoint import save_checkpoint
from tests.tiny import ROOT, torchrun, trainer
from training import identity

STEPS, WARMUP, BATCH = 5, 2, 4
SETTINGS = {
    "training__steps": STEPS,
    "training__batch_size": BATCH,
    "training__lr": 2e-3,
    "training__lr_backbone": 5e-4,
    "training__weight_decay": 0.3,
    "training__kl_weight": 7.0,
    "training__grad_clip_norm": 60.0,
    "training__scheduler": "cosine",
    "training__warmup_steps": WARMUP,
    "training__min_lr": 1e-4,
    "model__dropout": 0.0,
}


def rate(step: int, peak: float) -> float:
    """The learning rate in step 0, 1, ...: a line to its peak over two steps, then half a cosine down to min_lr."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    last = SETTINGS["training__min_lr"]
    return last + (peak - last) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - 1 - WARMUP))) / 2


def noise(rows: slice) -> torch.Tensor:
    """The latent noise of some rows of the batch: the same for all sides, whatever else they draw."""
    return torch.linspace(-1.5, 2, BATCH * 4, dtype=torch.float64).view(BATCH, 4)[rows]


def batch_of(ready, step: int, rows: slice) -> dict[str, torch.Tensor]:
    """Some rows of a step's batch: from near the ends of episodes, where chunks are padded, and from their middles."""
    count = len(ready.dataset)
    places = [(step * 37 + i * count // 4 + (count // 4 - 3) * (i % 2)) % count for i in range(BATCH)]
    raw = {name: torch.from_numpy(array) for name, array in ready.dataset.__getitems__(places).items()}
    raw["action_is_pad"][0, 2:] = raw["action_is_pad"][2, 5:] = True
    batch = ready.prepare({name: values[rows] for name, values in raw.items()})
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def train_ours(ready, rows: slice) -> dict[str, torch.Tensor]:
    """Five steps on some rows of each batch; -> the weights."""
    parts = itertools.cycle(noise(rows).chunk(ready.cfg.training.accumulate_steps))
    torch.randn_like = lambda x: next(parts).view_as(x)
    for step in range(STEPS):
        assert ready.train_step(batch_of(ready, step, rows)).tolist() == [0, 0]
    return dict(ready.model.named_parameters())


def lerobot_policy(ready, folder: Path):
    """LeRobot 0.3.2's policy with the trainer's initial weights, in float64; it gets normalised batches."""
    from lerobot.policies.act.modeling_act import ACTPolicy

    weights = {k: v.float() if v.is_floating_point() else v for k, v in ready.model.state_dict().items()}
    checkpoint = save_checkpoint(
        folder, 0, model_state=weights, act_config=ready.act, stats=ready.stats,
        image_shapes=ready.episodes[0].image_shape, policy_fields=identity.policy_fields(ready.settings),
        train_config={}, training_state={},
    )  # fmt: skip
    policy = ACTPolicy.from_pretrained(checkpoint / "pretrained_model").double().train()
    policy.normalize_inputs = policy.normalize_targets = torch.nn.Identity()
    assert all(torch.equal(ours, policy.model.state_dict()[name]) for name, ours in ready.model.state_dict().items())
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


def train_lerobots(ready, policy) -> dict[str, torch.Tensor]:
    """Five steps of LeRobot's loss with torch's optimizer, on whole batches; -> the weights, which have all moved."""
    torch.randn_like = lambda x: noise(slice(None)).view_as(x)
    groups = [
        {"params": [p for n, p in policy.named_parameters() if not n.startswith("model.backbone")], "lr": 2e-3},
        {"params": [p for n, p in policy.named_parameters() if n.startswith("model.backbone")], "lr": 5e-4},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.3, fused=False, foreach=False)
    started = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    clipped, unlike = [], []
    for step in range(STEPS):
        for group, peak in zip(optimizer.param_groups, (2e-3, 5e-4), strict=True):
            group["lr"] = rate(step, peak)
        optimizer.zero_grad()
        batch = batch_of(ready, step, slice(None))
        valid = (~batch["action_is_pad"]).sum(dim=1)
        unlike.append(valid[:2].sum() != valid[2:].sum())
        lerobot_loss(policy, batch).backward()
        clipped.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), 60.0) > 60.0)
        optimizer.step()
    assert 0 < sum(clipped) < STEPS, "the clipping bites, and not always: Adam does not see a factor on all gradients"
    assert sum(unlike) > 2, "the halves have padding of their own"
    weights = dict(policy.model.named_parameters())
    assert all((weights[n] - started[n]).abs().max() > 1e-5 for n in weights)
    return weights


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Every weight is equal to 1e-7."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() < 1e-7, name


@pytest.fixture(autouse=True)
def own_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gets its noise back after each test."""
    monkeypatch.setattr(torch, "randn_like", torch.randn_like)


def test_five_steps_are_those_of_lerobots_loss_and_torchs_optimizer(sample_bags: Path, tmp_path: Path):
    """In one process."""
    ready = trainer(sample_bags, tmp_path, torch.float64, **SETTINGS)
    policy = lerobot_policy(ready, tmp_path / "lerobot")
    assert_near(train_ours(ready, slice(None)), train_lerobots(ready, policy))


def test_five_steps_in_two_parts_are_the_same(sample_bags: Path, tmp_path: Path):
    """training.accumulate_steps: halves with padding of their own, one loss, one clipping and one step for both."""
    parts = SETTINGS | {"training__batch_size": BATCH // 2, "training__accumulate_steps": 2}
    ready = trainer(sample_bags, tmp_path, torch.float64, **parts)
    policy = lerobot_policy(ready, tmp_path / "lerobot")
    assert_near(train_ours(ready, slice(None)), train_lerobots(ready, policy))


RANK = """
import json, sys, torch
from pathlib import Path
from tests.test_train_step import train_ours
from tests.tiny import trainer
bags, folder, settings = sys.argv[1:]
ready = trainer(Path(bags), Path(folder), torch.float64, **json.loads(settings))
rank = ready.world.rank
torch.save(train_ours(ready, slice(2 * rank, 2 * rank + 2)), f"{folder}/{rank}.pt")
ready.world.close()
"""


def test_five_steps_of_two_ranks_are_the_same(sample_bags: Path, tmp_path: Path):
    """Each has half of the batch, in two parts with padding of their own: loss and step are the whole batch's."""
    ready = trainer(sample_bags, tmp_path, torch.float64, **SETTINGS)
    theirs = train_lerobots(ready, lerobot_policy(ready, tmp_path / "lerobot"))
    (tmp_path / "rank.py").write_text(RANK)
    settings = json.dumps(SETTINGS | {"training__batch_size": BATCH // 4, "training__accumulate_steps": 2})
    done = subprocess.run(
        [*torchrun(2), str(tmp_path / "rank.py"), str(sample_bags), str(tmp_path / "ranks"), settings],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert_near(torch.load(tmp_path / f"ranks/{rank}.pt"), theirs)
