"""Experiment trackers: what train.py logs to beside metrics.jsonl. Weights & Biases, MLflow, both or neither.

A tracker has `id`, `log(values)` and `finish(exit_code)`. The packages are imported only when they are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lerobot_checkpoint import Normalizer

from .errors import ConfigError
from .mlflow_tracker import MlflowTracker, import_mlflow
from .settings import setting


@dataclass
class WandbConfig:
    """The section `wandb`."""

    enabled: bool = setting(False, "log to Weights & Biases")
    project: str = setting("ur10e-act-train", "project")
    run_name: str | None = setting(None, "name of the run; null lets wandb choose")
    tags: list[str] = setting([], "tags of the run")


@dataclass
class MlflowConfig:
    """The section `mlflow`."""

    enabled: bool = setting(False, "log to an MLflow tracking server")
    tracking_uri: str | None = setting(None, "of the server; null lets MLflow choose (MLFLOW_TRACKING_URI)")
    experiment: str = setting("ur10e-act-train", "experiment; is made where it is not there")
    run_name: str | None = setting(None, "name of the run; null lets MLflow choose")
    tags: dict[str, str] | None = setting(None, "tags of the run, {name: text}")
    registered_model: str | None = setting(None, "name of a model of which the best checkpoint becomes a version")


class NoTracker:
    """Stands in for a tracker that is off, so that the loop has no ifs."""

    id = None

    def log(self, values: dict[str, Any]) -> None:
        """Nothing."""

    def finish(self, exit_code: int = 0) -> None:
        """Nothing."""


class Trackers:
    """All that a run logs to: a run of wandb and one of MLflow, or what stands in for them."""

    def __init__(self, wandb_run: Any, mlflow_run: MlflowTracker | NoTracker) -> None:
        self._wandb, self._mlflow = wandb_run, mlflow_run

    @property
    def ids(self) -> dict[str, str | None]:
        """For a checkpoint, so that a resumed run continues the same ones."""
        return {"wandb_id": self._wandb.id, "mlflow_id": self._mlflow.id}

    def log(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self._wandb.log(line)
        self._mlflow.log(line)

    def log_camera_views(self, batch: dict[str, torch.Tensor], normalizer: Normalizer) -> None:
        """One batch of what the network sees, resized and augmented, so that a person sees it too."""
        if isinstance(self._wandb, NoTracker) and isinstance(self._mlflow, NoTracker):
            return
        views = {
            name: (images[:8] * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
            for name, images in normalizer.unnormalize_images(batch).items()  # (B, 3, H, W) in [0, 1]
        }
        if not isinstance(self._wandb, NoTracker):
            wandb = import_wandb()
            self._wandb.log({"step": 0} | {name: [wandb.Image(image) for image in v] for name, v in views.items()})
        if isinstance(self._mlflow, MlflowTracker):
            self._mlflow.log_pictures({name: np.hstack(v) for name, v in views.items()})

    def finish(self, exit_code: int) -> None:
        """Close all, whatever becomes of one."""
        try:
            self._wandb.finish(exit_code=exit_code)
        finally:
            self._mlflow.finish(exit_code)


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


def check_installed(wandb: WandbConfig, mlflow: MlflowConfig) -> None:
    """What is asked for can be imported. Raises ConfigError."""
    if wandb.enabled:
        import_wandb()
    if mlflow.enabled:
        import_mlflow()


def start_mlflow(
    section: MlflowConfig, output_dir: Path, is_main: bool, run_id: str | None, step: int,
    settings: Mapping[str, Any], facts: Mapping[str, str],
) -> MlflowTracker | NoTracker:  # fmt: skip
    """A run of MLflow on rank 0 when mlflow.enabled, else an object that does nothing; see MlflowTracker."""
    if not (section.enabled and is_main):
        return NoTracker()
    return MlflowTracker(section, output_dir, run_id, step, settings, facts)
