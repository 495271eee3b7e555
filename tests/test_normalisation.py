"""Normalisation is LeRobot's formula, and statistics that would break it are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lerobot_checkpoint import CheckpointError, Normalizer, save_checkpoint
from tests.checkpoints import CAMERAS, raw_observation, run

__all__ = ["run"]  # fixture


def test_normalizer_is_the_formula(run):
    """(x - mean) / (std + 1e-8), and back; entries it does not know pass through; raw bytes are refused."""
    normalizer = Normalizer(run["stats"])
    batch = raw_observation(CAMERAS["one camera"])
    batch |= {"action": torch.randn(2, 10, 7), "action_is_pad": torch.zeros(2, 10, dtype=torch.bool)}
    out = normalizer.normalize(batch)
    for key, pair in run["stats"].items():
        expected = (batch[key].double() - torch.tensor(pair["mean"])) / (torch.tensor(pair["std"]).double() + 1e-8)
        torch.testing.assert_close(out[key].double(), expected, rtol=1e-6, atol=1e-6)
        assert out[key].dtype == torch.float32
    assert out["action_is_pad"] is batch["action_is_pad"]
    torch.testing.assert_close(normalizer.unnormalize_action(out["action"]), batch["action"], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="observation.images.top is torch.uint8; expected floats"):
        normalizer.normalize({**batch, "observation.images.top": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)})
    with pytest.raises(KeyError, match="observation.state is not in the batch"):
        normalizer.normalize({"action": batch["action"]})


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_broken_statistics_are_refused(run, tmp_path, value):
    """NaN, infinite or negative deviations never reach a robot."""
    stats = {key: {name: v.copy() for name, v in pair.items()} for key, pair in run["stats"].items()}
    stats["action"]["std"][2] = value
    with pytest.raises(CheckpointError, match="stats: std of action is .* expected finite numbers, std >= 0"):
        save_checkpoint(tmp_path, 1, **{**run, "stats": stats})
