"""Experiment trackers: what train.py logs to beside metrics.jsonl. Weights & Biases, or nothing in its place.

A tracker has `id`, `log(values)` and `finish(exit_code)`. The packages are imported only when they are asked for.
"""

from __future__ import annotations

from typing import Any

import torch

from lerobot_checkpoint import Normalizer

from .errors import ConfigError


class NoTracker:
    """Stands in when wandb is off, so that the loop has no ifs."""

    id = None

    def log(self, values: dict[str, Any]) -> None:
        """Nothing."""

    def finish(self, exit_code: int = 0) -> None:
        """Nothing."""


def import_wandb() -> Any:
    """The package wandb. Raises ConfigError when it is missing."""
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            "wandb.enabled: true, but the package wandb is not installed; "
            "run: pip install wandb, or set wandb.enabled to false"
        ) from None
    return wandb


def log_camera_views(tracker: Any, batch: dict[str, torch.Tensor], normalizer: Normalizer) -> None:
    """One batch of what the network sees, resized and augmented, so that a person sees it too."""
    if isinstance(tracker, NoTracker):
        return
    wandb = import_wandb()
    views = {}
    for name, images in normalizer.unnormalize_images(batch).items():  # (B, 3, H, W) in [0, 1]
        pixels = (images[:8] * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        views[name] = [wandb.Image(image) for image in pixels]
    tracker.log({"step": 0} | views)
