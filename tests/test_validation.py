"""The policy is scored on held-out episodes as the robot will run it."""

from __future__ import annotations

from pathlib import Path

from tests.tiny import metrics, trainer


def test_validation_is_in_fp32_whatever_training_is(sample_bags: Path, tmp_path: Path):
    """The robot runs the policy in float32, so that is what is validated."""
    for precision in ("fp32", "bf16"):
        ready = trainer(sample_bags, tmp_path / precision, training__precision=precision)
        ready._validate()
    ours, theirs = (metrics(tmp_path / p / "run", "val_l1_loss")[0]["val_l1_loss"] for p in ("fp32", "bf16"))
    assert ours == theirs
