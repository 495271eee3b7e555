"""The settings that say what is read from a bag."""

from __future__ import annotations

from pathlib import Path

from rosbag_dataset import BagSettings, settings_from
from tests.bags import settings
from tests.checks import error_of


def test_missing_and_wrong_settings():
    """settings_from() names what the config lacks or what does not fit."""
    good = {f: getattr(settings(Path("bags")), f) for f in BagSettings.__dataclass_fields__}
    assert "camera_topic" in error_of(lambda: settings_from({**good, "camera_topics": None}))
    assert "fps" in error_of(lambda: settings_from({k: v for k, v in good.items() if k != "fps"}))
    assert "'fast'" in error_of(lambda: settings_from({**good, "fps": "fast"}))
