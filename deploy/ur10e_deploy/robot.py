"""What the control loop asks of a robot: a clock, joints and pictures with their times, a status, and to be commanded.

    robot = open_robot("sim", options)
    robot.clock.wait_until(robot.clock.now_s() + 0.004)
    robot.joints().position_rad, robot.pictures()["color"].rgb, robot.status().troubles()
    robot.command(q_rad, {})

A robot's clock is real time, or lock step: then nothing happens but in wait_until(), which moves the simulated world on
and returns at once, so that the same loop runs faster than real time, and the same way every time.

All times are seconds of the robot's clock. A reading's time is when it arrived: from then on it can be acted on, and
its age says whether more arrive.

Knows: the interface, and the names of the robots that exist, each with the module that brings it.
Must not know: any of them. It is looked up when it is asked for: sim/ stands above this package, and a robot's driver
is needed by nobody who has another robot.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .config import PolicyError

# name -> module with open_robot(RobotOptions) -> Robot. tests/test_imports.py holds that this is the only way up.
ROBOTS = {"sim": "sim.robot", "ros2": "ur10e_deploy.ros2_robot", "rtde": "ur10e_deploy.rtde_robot"}
FULL_SPEED = 0.99  # speed scaling below this: somebody, or the robot, slowed it down


@dataclass(frozen=True)
class JointReading:
    """Where the robot is.

    Attributes:
        stamp_s: when it arrived.
        names: of the joints, in the robot's order.
        position_rad: of these, in the robot's signs and turns.
        others: further states by their names in the policy's contract (a gripper), in the units that were recorded.
    """

    stamp_s: float
    names: tuple[str, ...]
    position_rad: np.ndarray
    others: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """What a camera saw: (H, W, 3) uint8 RGB, which arrived at stamp_s."""

    stamp_s: float
    rgb: np.ndarray


@dataclass(frozen=True)
class Status:
    """Whether the robot does what it is commanded.

    Attributes:
        controller_active: the controller that takes our commands is the active one.
        speed_scaling: 1 at full speed; the pendant's slider and the robot's own reductions are in it.
        protective_stop, emergency_stop: the robot stopped.
        program_running: the program on the robot that follows our commands.
        further: what else forbids to command it, in words.
    """

    controller_active: bool = True
    speed_scaling: float = 1.0
    protective_stop: bool = False
    emergency_stop: bool = False
    program_running: bool = True
    further: tuple[str, ...] = ()

    def troubles(self) -> list[str]:
        """Why the arm must not be commanded, in words; [] when it may be."""
        found = [
            (self.emergency_stop, "emergency stop"),
            (self.protective_stop, "protective stop"),
            (not self.program_running, "the robot's program is not running"),
            (not self.controller_active, "the controller that takes commands is not active"),
            (not self.speed_scaling >= FULL_SPEED, f"speed scaling is {self.speed_scaling:.0%}, expected 100 %"),
        ]
        return [text for is_so, text in found if is_so] + list(self.further)


class Clock(Protocol):
    """Seconds since the robot was opened."""

    lock_step: bool

    def now_s(self) -> float:
        """The time now."""
        ...

    def wait_until(self, time_s: float) -> None:
        """Return when it is time_s, or at once when that is past."""
        ...


class WallClock:
    """Seconds since it was made, by the wall: of a robot that is not simulated."""

    lock_step = False

    def __init__(self) -> None:
        self._began_s = time.perf_counter()

    def now_s(self) -> float:
        """The time now."""
        return time.perf_counter() - self._began_s

    def wait_until(self, time_s: float) -> None:
        """Return when it is time_s, or at once when that is past."""
        if (left_s := time_s - self.now_s()) > 0:
            time.sleep(left_s)


class Robot(Protocol):
    """An arm with cameras.

    Attributes:
        clock: Clock.
        cameras_are_noisy: no two pictures are the same bit by bit, so that one which is, is frozen.
    """

    clock: Clock
    cameras_are_noisy: bool

    def joints(self) -> JointReading | None:
        """The last reading; None before the first."""
        ...

    def picture_stamps(self) -> Mapping[str, float]:
        """Camera -> when its last picture arrived; a camera that never sent one is not there."""
        ...

    def pictures(self) -> Mapping[str, Picture]:
        """Camera -> its last picture; called from the policy's and the recorder's threads, too."""
        ...

    def status(self) -> Status:
        """What the robot says of itself."""
        ...

    def check(self) -> list[str]:
        """What a person should know before it moves, above all what is not watched; asked once, while it stands.

        Raises:
            PolicyError: it must not be moved.
        """
        ...

    def command(self, position_rad: np.ndarray, others: Mapping[str, float]) -> None:
        """Be at position_rad (6,), in the order of JOINT_NAMES, one period from now, and set the other states."""
        ...

    def halt(self) -> None:
        """Stop by the robot's own means, and drop what was commanded: also a command that is under way."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


@dataclass(frozen=True)
class RobotOptions:
    """What a robot is told when it is opened.

    Attributes:
        command_hz: how often it is going to be commanded.
        real_time: run by the wall clock; a real robot has no other.
        cameras: the policy's cameras -> (H, W) of what it sees.
        others: names of the further states that the policy has.
        extra: options of one kind of robot, by name.
    """

    command_hz: float
    real_time: bool
    cameras: Mapping[str, tuple[int, int]]
    others: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def open_robot(name: str, options: RobotOptions) -> Robot:
    """The robot of that name.

    Raises:
        PolicyError: there is none of that name, or its module is not installed, or it cannot be opened.
    """
    if name not in ROBOTS:
        raise PolicyError(f"--robot {name}: expected one of {', '.join(ROBOTS)}")
    package = ROBOTS[name].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise PolicyError(
            f"--robot {name}: the package {package} is not installed; run from the repository's root, or add it to "
            "PYTHONPATH"
        )
    return importlib.import_module(ROBOTS[name]).open_robot(options)
