"""What the arm's commands must keep: position, speed, acceleration and jerk per joint, and where its parts may be.

Knows: the numbers with their sources, a file that changes them, where joint positions put the arm's parts.
Must not know: time, how a command is made to keep them (limiter.py), robots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from ur10e import DH_A_M, DH_D_M, POSITION_LIMIT_RAD, SPEED_LIMIT_RAD_S, TOOL_LENGTH_M

from .config import PolicyError, read_options_file

# Universal Robots publish positions and speeds (ur10e.py), but "the robot does not inherently have any limits on joint
# accelerations (only on torques)": so says their driver's ur_moveit_config/config/joint_limits.yaml, which chose 5.0
# "conservatively to work in most use cases".
ACCELERATION_LIMIT_RAD_S2 = 5.0
# Nobody publishes a jerk for this arm. MoveIt's Ruckig smoothing takes 100 where a robot's description says nothing
# (DEFAULT_MAX_JERK in ruckig_traj_smoothing.cpp); full acceleration is then reached in 50 ms. sim/'s expert needs 8.
JERK_LIMIT_RAD_S3 = 100.0
POSITION_MARGIN_RAD = 0.02  # before the published end, where the robot's own safety stops it: about 1 degree
# An arm on its table: the top is z = 0 of the base. Elbow and wrists are pipes of about 5 cm radius (sim/scene.py).
ARM_ABOVE_M = 0.06
TOOL_BOX_M = ((-1.15, -0.90, 0.01), (0.60, 0.90, 1.30))
TRACKING_RAD = 0.2  # 80 ms of lag at the expert's 0.73 rad/s are 0.06; beyond this something holds the arm


@dataclass(frozen=True)
class Limits:
    """Limits of the six joints, in the order of JOINT_NAMES, and of the arm's parts in the `base` frame.

    Attributes:
        low_rad, high_rad: (6,) positions.
        speed_rad_s, acceleration_rad_s2, jerk_rad_s3: (6,) above 0, of either sign.
        arm_above_m: elbow and wrists stay above this height.
        tool_low_m, tool_high_m: (3,) corners of the box that the tool's tip stays in.
        tracking_rad: how far a measured joint may be from its command.
    """

    low_rad: np.ndarray
    high_rad: np.ndarray
    speed_rad_s: np.ndarray
    acceleration_rad_s2: np.ndarray
    jerk_rad_s3: np.ndarray
    arm_above_m: float
    tool_low_m: np.ndarray
    tool_high_m: np.ndarray
    tracking_rad: float

    def workspace_error(self, q_rad: np.ndarray) -> str | None:
        """What of the arm is outside at any of the joint positions (..., 6) rad; None when all is inside."""
        points_m = arm_points(q_rad)
        arm_low_m = points_m[..., :-1, 2].min()
        if arm_low_m < self.arm_above_m:
            return f"elbow or wrist at a height of {arm_low_m:.3f} m, below {self.arm_above_m:g} m"
        tip_m = points_m[..., -1, :]
        outside = (tip_m < self.tool_low_m) | (tip_m > self.tool_high_m)
        if not outside.any():
            return None
        axis = int(np.argmax(outside.reshape(-1, 3).any(axis=0)))
        values = tip_m[..., axis][outside[..., axis]]
        return (
            f"the tool's tip at {'xyz'[axis]} {float(values.flat[0]):.3f} m, outside {self.tool_low_m[axis]:g} to "
            f"{self.tool_high_m[axis]:g} m"
        )


def default_limits() -> Limits:
    """The UR10e on its table."""
    return Limits(
        low_rad=-POSITION_LIMIT_RAD + POSITION_MARGIN_RAD,
        high_rad=POSITION_LIMIT_RAD - POSITION_MARGIN_RAD,
        speed_rad_s=SPEED_LIMIT_RAD_S.copy(),
        acceleration_rad_s2=np.full(6, ACCELERATION_LIMIT_RAD_S2),
        jerk_rad_s3=np.full(6, JERK_LIMIT_RAD_S3),
        arm_above_m=ARM_ABOVE_M,
        tool_low_m=np.array(TOOL_BOX_M[0]),
        tool_high_m=np.array(TOOL_BOX_M[1]),
        tracking_rad=TRACKING_RAD,
    )


def read_limits(path: Path | None) -> Limits:
    """The limits, with what a YAML file changes: names of Limits, one number for all joints or a list.

    A file may tighten what the robot's maker publishes (positions, speeds), never widen it.

    Raises:
        PolicyError: it cannot be read, or has a key or a value that cannot be.
    """
    limits = default_limits()
    if path is None:
        return limits
    content = read_options_file("--limits", path, [f.name for f in fields(Limits)])
    changed: dict[str, np.ndarray | float] = {}
    for name, value in content.items():
        default = getattr(limits, name)
        try:
            given = np.array(value, np.float64)
            shaped = np.broadcast_to(given, np.shape(default)).copy()
            if isinstance(value, bool) or not np.isfinite(given).all():
                raise ValueError
        except (TypeError, ValueError):
            count = np.size(default)
            one = f"{count} of them" if np.ndim(default) else "one"
            raise PolicyError(f"--limits {path}: {name} is {value!r}; expected a finite number, or {one}") from None
        changed[name] = shaped if np.ndim(default) else float(shaped)
    found = replace(limits, **changed)
    for name in ("speed_rad_s", "acceleration_rad_s2", "jerk_rad_s3", "tracking_rad"):
        if not np.all(np.asarray(getattr(found, name)) > 0):
            raise PolicyError(f"--limits {path}: {name} is {content[name]!r}; expected more than 0")
    widened = {
        "low_rad": found.low_rad < -POSITION_LIMIT_RAD,
        "high_rad": found.high_rad > POSITION_LIMIT_RAD,
        "speed_rad_s": found.speed_rad_s > SPEED_LIMIT_RAD_S,
    }
    for name, beyond in widened.items():
        if beyond.any():
            raise PolicyError(f"--limits {path}: {name} is {content[name]!r}, beyond what the UR10e can do (ur10e.py)")
    for low, high in (("low_rad", "high_rad"), ("tool_low_m", "tool_high_m")):
        if not (getattr(found, low) < getattr(found, high)).all():
            raise PolicyError(f"--limits {path}: {low} is not below {high}")
    return found


def arm_points(q_rad: np.ndarray | Sequence[float]) -> np.ndarray:
    """Where the arm's parts are: (..., 6) rad -> (..., 5, 3) m: elbow, wrists 1 to 3, the tool's tip, in `base`.

    The same as ur10e.link_frames and tool_tip, written out, because a stopping path is looked at in every period.
    """
    q_rad = np.asarray(q_rad, np.float64)
    pan, lift, elbow, wrist_1, wrist_2 = (q_rad[..., j] for j in range(5))
    fore, hand = lift + elbow, lift + elbow + wrist_1  # angles in the arm's plane
    cos_pan, sin_pan, cos_hand, sin_hand = np.cos(pan), np.sin(pan), np.cos(hand), np.sin(hand)

    points_m = np.empty((*q_rad.shape[:-1], 5, 3))

    def place(i: int, forward: np.ndarray, side: np.ndarray, up: np.ndarray) -> None:
        points_m[..., i, 0] = cos_pan * forward + sin_pan * side
        points_m[..., i, 1] = sin_pan * forward - cos_pan * side
        points_m[..., i, 2] = up

    none = np.zeros_like(pan)
    forward, up = DH_A_M[1] * np.cos(lift), DH_D_M[0] + DH_A_M[1] * np.sin(lift)
    place(0, forward, none, up)
    forward, up = forward + DH_A_M[2] * np.cos(fore), up + DH_A_M[2] * np.sin(fore)
    place(1, forward, none, up)
    side = none + DH_D_M[3]
    place(2, forward, side, up)
    forward, up = forward + DH_D_M[4] * sin_hand, up - DH_D_M[4] * cos_hand
    place(3, forward, side, up)
    length_m, cos_2, sin_2 = DH_D_M[5] + TOOL_LENGTH_M, np.cos(wrist_2), np.sin(wrist_2)
    along = -length_m * sin_2
    place(4, forward + along * cos_hand, side + length_m * cos_2, up + along * sin_hand)
    return points_m
