"""The trainer's settings: rosbag_dataset's reader of YAML and overrides, whose errors are ConfigError here.

The reader is there because the inspection of bags reads the same files, and imports nothing of training.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rosbag_dataset import Bag, Schema, SettingError, read_config, setting

from .errors import ConfigError

__all__ = ["adopt_dataset", "finder", "read_settings", "setting"]


def read_settings(schema: Schema, path: Path, overrides: Sequence[str] = ()) -> Schema:
    """What read_config() returns. Raises ConfigError: one line, naming the file, the key and what was expected."""
    try:
        return read_config(schema, path, overrides)
    except SettingError as error:
        raise ConfigError(str(error)) from None


def adopt_dataset(cfg: Any) -> None:
    """Put what data.lerobot_dataset says, if it is set, over the settings that it answers; rank 0 prints what it is.

    Raises:
        ConfigError: it cannot be read, or contradicts the settings.
    """
    if cfg.data.lerobot_dataset is None:
        return
    try:
        lines = _recordings().adopt(cfg)
    except SettingError as error:
        raise ConfigError(str(error)) from None
    if os.environ.get("RANK", "0") == "0":
        print(*lines, sep="\n", flush=True)


def finder(lerobot_dataset: str | None) -> Callable[[Path], list[Bag]] | None:
    """What finds the recordings in data.bag_dir if that is data.lerobot_dataset; None for bags."""
    return _recordings().find_episodes if lerobot_dataset else None


def _recordings() -> Any:
    """The room that reads LeRobot datasets, and needs more than a training on bags does. Raises ConfigError."""
    try:
        from lerobot_dataset import recordings
    except ModuleNotFoundError as error:
        what = "OSMO's workflows train on bags" if error.name == "lerobot_dataset" else "uv pip install pyarrow av"
        raise ConfigError(f"data.lerobot_dataset: {error.name} is not there; {what}") from None
    return recordings
