"""What can go wrong with a simulated arm, when, and how it brakes by itself.

Nothing here was measured on a UR10e: BRAKING_RAD_S2 is a choice.

Knows: kinds of faults, spans of time, the arm's last commands.
Must not know: what a runner does about them; and no torch.
"""

from dataclasses import dataclass

import numpy as np

BRAKING_RAD_S2 = 10.0
CAMERA = "camera"  # kinds of Fault
JOINTS, HELD, PROTECTIVE, EMERGENCY, PROGRAM, CONTROLLER, SLOWED = (
    "joints", "held", "protective stop", "emergency stop", "program", "controller", "speed scaling",
)  # fmt: skip
FAULTS = (CAMERA, JOINTS, HELD, PROTECTIVE, EMERGENCY, PROGRAM, CONTROLLER, SLOWED)


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong from `from_s` to before `to_s` on the robot's clock.

    `kind` is one of FAULTS: the camera or the joint states fall silent, something holds the arm, the robot stops by
    itself, its program ends, another controller is activated, somebody turns the speed down.
    """

    kind: str
    from_s: float
    to_s: float = np.inf


def faulty(faults, kind, now_s):
    """Whether one of that kind is there at now_s."""
    return any(fault.kind == kind and fault.from_s <= now_s < fault.to_s for fault in faults)


def braked(world):
    """The next place to command an arm to that brakes as hard as it can: (6,) rad, of a sim.world.World."""
    if not world.command_rad:
        return world.path_rad[-1]
    period_s, before = 1 / world.control_hz, world.command_rad[-2:]
    speed = (before[1] - before[0]) / period_s if len(before) == 2 else np.zeros(6)
    slower = np.sign(speed) * np.maximum(np.abs(speed) - BRAKING_RAD_S2 * period_s, 0.0)
    return before[-1] + period_s * slower
