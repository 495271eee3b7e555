"""The reader of LeRobot datasets under the name that the evaluation has for it; it is in lerobot_dataset/reading.py."""

from lerobot_dataset.frames import AbsentVideo, SourceError
from lerobot_dataset.reading import LeRobotDatasetSource

__all__ = ["AbsentVideo", "LeRobotDatasetSource", "SourceError"]
