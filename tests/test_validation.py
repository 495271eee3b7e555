"""The policy is scored on held-out episodes as the robot will run it."""

from __future__ import annotations

from pathlib import Path

import torch

from act_model import ACT
from lerobot_checkpoint import load_policy
from rosbag_dataset import ChunkDataset
from tests.tiny import metrics, run, trainer
from training import validation


def test_validation_is_in_fp32_whatever_training_is(sample_bags: Path, tmp_path: Path):
    """The robot runs the policy in float32, so that is what is validated."""
    for precision in ("fp32", "bf16"):
        ready = trainer(sample_bags, tmp_path / precision, training__precision=precision)
        ready._validate()
    ours, theirs = (metrics(tmp_path / p / "run", "val_l1_loss")[0]["val_l1_loss"] for p in ("fp32", "bf16"))
    assert ours == theirs


def test_only_training_rounds_products_to_tf32(sample_bags: Path, tmp_path: Path, monkeypatch):
    """An NVIDIA GPU may use TF32 in a training step; validation, the summary and a loaded policy compute in float32.

    No GPU here: the switches are read inside the network's forward pass.
    """
    seen: dict[bool, set[tuple[bool, bool]]] = {True: set(), False: set()}
    forward = ACT.forward

    def watched(self, batch):
        switches = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        seen[self.training].add(switches)
        return forward(self, batch)

    monkeypatch.setattr(ACT, "forward", watched)
    output = run(sample_bags, tmp_path)
    assert seen == {True: {(True, True)}, False: {(False, False)}}
    seen[False].clear()
    policy = load_policy(output)
    images = {f"observation.images.{c}": torch.zeros(1, 3, *shape) for c, shape in policy.image_shapes.items()}
    policy.predict_chunk({"observation.state": torch.zeros(1, 6), **images})
    assert seen[False] == {(False, False)}


def test_a_validation_samples_all_held_out_episodes(sample_bags: Path, tmp_path: Path, monkeypatch):
    """Of more samples than it takes, it takes them evenly, from the first to the last episode."""
    ready = trainer(sample_bags, tmp_path, training__val_fraction=0.4)
    asked, original = [], ChunkDataset.__getitems__
    monkeypatch.setattr(ChunkDataset, "__getitems__", lambda self, i: (asked.extend(i), original(self, i))[1])
    monkeypatch.setattr(validation, "VALIDATION_SAMPLES", 10)
    ready._validate()
    count = len(ready.held_out_dataset)
    assert count > 50 and asked == [i * count // 10 for i in range(10)]
