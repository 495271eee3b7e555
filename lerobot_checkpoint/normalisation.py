"""Normalisation: what the model sees has mean 0 and standard deviation 1, what the robot gets has its own units.

The statistics are measured on the training data and travel with the weights, because the weights mean nothing
without them. This room says which features are normalised, by which formula, and when statistics can be trusted.
Must not know: in which files LeRobot keeps the statistics, or any file at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from act_model import ACTION, IMAGE_PREFIX, STATE, ACTConfig

from .errors import CheckpointError

EPS = 1e-8  # LeRobot's: (x - mean) / (std + EPS)
NORMALIZATION_MODES = dict(VISUAL="MEAN_STD", STATE="MEAN_STD", ACTION="MEAN_STD")  # by LeRobot's kinds of feature

# {"observation.state": {"mean": (state_dim,), "std": (state_dim,)}, "action": ... (action_dim,),
#  "observation.images.<camera>": ... (3, 1, 1), of images in [0, 1]}, all float32, in the feature's own unit
Stats = dict[str, dict[str, np.ndarray]]


class Normalizer:
    """LeRobot's mean/std normalisation, in float32: normalise before the model, un-normalise its actions after.

    Args:
        stats: mean and std of each feature (see Stats), for example LoadedPolicy.stats.
        device: where the batches will be.
    """

    def __init__(self, stats: Stats, device: torch.device | str = "cpu"):
        self.stats = {
            key: {name: torch.as_tensor(value, dtype=torch.float32) for name, value in pair.items()}
            for key, pair in stats.items()
        }
        self.to(device)

    def to(self, device: torch.device | str) -> Normalizer:
        """Move the statistics to where the batches are; -> itself."""
        self.stats = {k: {name: t.to(device) for name, t in pair.items()} for k, pair in self.stats.items()}
        return self

    def normalize(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A new batch with state, images and, where there are any, actions normalised. Other entries pass through.

        Args:
            batch: "observation.state" (..., state_dim) in rad, "observation.images.<camera>" (..., 3, H, W) in
                [0, 1], "action" (..., action_dim) in rad or rad per frame; any floating-point dtype.

        Returns:
            The same entries; those that were normalised are float32.

        Raises:
            KeyError: the state or a camera is missing.
            ValueError: a feature is not floating point, as images that still are bytes.
        """
        batch = dict(batch)
        for key, pair in self.stats.items():
            if key == ACTION and key not in batch:
                continue
            if key not in batch:
                raise KeyError(f"{key} is not in the batch ({', '.join(batch)})")
            if not batch[key].is_floating_point():
                raise ValueError(f"{key} is {batch[key].dtype}; expected floats (images: in [0, 1], so divide by 255)")
            batch[key] = (batch[key].float() - pair["mean"]) / (pair["std"] + EPS)
        return batch

    def unnormalize_images(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A normalised batch's images (..., 3, H, W) in [0, 1] again, {feature: images}, float32."""
        return {
            key: (batch[key].float() * (pair["std"] + EPS) + pair["mean"]).clamp(0, 1)
            for key, pair in self.stats.items()
            if key.startswith(IMAGE_PREFIX)
        }

    def unnormalize_action(self, action: Tensor) -> Tensor:
        """The model's actions (..., action_dim) in the robot's units (rad, or rad per frame), float32.

        Without EPS, which is there only so that nothing is divided by zero; LeRobot does the same.
        """
        pair = self.stats[ACTION]
        return action.float() * pair["std"] + pair["mean"]


def image_key(camera: str) -> str:
    """The feature that holds a camera's images: "front" -> "observation.images.front"."""
    return IMAGE_PREFIX + camera


def stats_shapes(config: ACTConfig) -> dict[str, tuple[int, ...]]:
    """Every normalised feature -> the shape of its mean and of its std. As in LeRobot, the action comes last."""
    images = {image_key(camera): (3, 1, 1) for camera in config.cameras}
    return {STATE: (config.state_dim,), **images, ACTION: (config.action_dim,)}


def checked_stats(stats: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]], source: str) -> Stats:
    """The mean and std of each feature in `shapes`, checked and copied to float32. Other features are left out.

    Args:
        stats: feature -> {"mean": numbers, "std": numbers}, as found.
        shapes: feature -> the shape that its mean and std must have.
        source: where `stats` is from; messages begin with it.

    Raises:
        CheckpointError: one is missing, has another shape, is not finite, or is a negative std.
    """
    checked: Stats = {}
    for key, shape in shapes.items():
        checked[key] = {}
        for name in ("mean", "std"):
            if key not in stats or name not in stats[key]:
                raise CheckpointError(
                    f"{source}: no {name} of {key}, so its normalisation is unknown; expected one of shape {shape}; "
                    "use a complete checkpoint"
                )
            value = np.array(stats[key][name], dtype=np.float32)
            if value.shape != shape:
                raise CheckpointError(
                    f"{source}: {name} of {key} has shape {value.shape}; expected {shape}; the statistics are of "
                    "another policy"
                )
            # 0.3.2 fills its buffers with infinity until statistics are set.
            if not np.isfinite(value).all() or (name == "std" and (value < 0).any()):
                raise CheckpointError(
                    f"{source}: {name} of {key} is {value.ravel().tolist()}; expected finite numbers, std >= 0; "
                    "the statistics were never set or the data are broken"
                )
            checked[key][name] = value
    return checked
