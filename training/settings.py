"""The trainer's settings: rosbag_dataset's reader of YAML and overrides, whose errors are ConfigError here.

The reader is there because the inspection of bags reads the same files, and imports nothing of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rosbag_dataset import Schema, SettingError, read_config, setting

from .errors import ConfigError

__all__ = ["read_settings", "setting"]


def read_settings(schema: Schema, path: Path, overrides: Sequence[str] = ()) -> Schema:
    """What read_config() returns. Raises ConfigError: one line, naming the file, the key and what was expected."""
    try:
        return read_config(schema, path, overrides)
    except SettingError as error:
        raise ConfigError(str(error)) from None
