"""Does the world still speak? The age of joint states, pictures and the policy's word, against what it may be.

Knows: ages.
Must not know: what is done about a silent source (control.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .robot import JointReading

# A UR10e sends joint states at 125 to 500 Hz: 0.1 s are twelve that did not come. A camera at 30 Hz loses one picture
# in a hundred (sim/record.py), and recordings with gaps of 0.1 s are trained on: 0.25 s are seven that did not come.
JOINTS_AGE_S, CAMERA_AGE_S = 0.1, 0.25
JOINT_STATES = "joint states"  # what this source is called


@dataclass(frozen=True)
class AgeLimits:
    """How old the last joint state and the last picture of each camera may be, s."""

    joints_s: float = JOINTS_AGE_S
    camera_s: float = CAMERA_AGE_S


class Watchdog:
    """Ages, and the largest that there were.

    Args:
        limits: AgeLimits.
        cameras: those that the policy needs.

    Attributes:
        oldest_s: source -> the largest age seen.
    """

    def __init__(self, limits: AgeLimits, cameras: Iterable[str]) -> None:
        self._limits, self._cameras = limits, list(cameras)
        self.oldest_s: dict[str, float] = {}

    def stale(self, now_s: float, reading: JointReading | None, picture_stamps: Mapping[str, float]) -> list[str]:
        """What is too old now, in words; [] when all is as it should be."""
        sources: list[tuple[str, float | None, float]] = [
            (JOINT_STATES, reading.stamp_s if reading else None, self._limits.joints_s)
        ]
        sources += [(f"camera {c}", picture_stamps.get(c), self._limits.camera_s) for c in self._cameras]
        found = []
        for name, stamp_s, limit_s in sources:
            if stamp_s is None:
                found.append(f"{name}: none has come")
                continue
            found += self.aged(name, now_s - stamp_s, limit_s)
        return found

    def aged(self, name: str, age_s: float, limit_s: float) -> list[str]:
        """The same of one source, whose age is known: one line, or none."""
        self.oldest_s[name] = max(age_s, self.oldest_s.get(name, 0.0))
        return [] if age_s <= limit_s else [f"{name}: the last is {age_s:.3f} s old, expected {limit_s:.3g} s at most"]
