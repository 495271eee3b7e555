"""The simulated cell as a robot that the control loop (ur10e_deploy.control) commands, with faults on demand.

Joint states come at JOINT_HZ and pictures at CAMERA_HZ, both as old as a recording's are when they arrive. In lock step
the world moves on in clock.wait_until() alone. In real time it keeps up with the wall clock: a command that is late
leaves the arm where the last one sent it.

After halt(), and in a protective or emergency stop, the arm brakes by itself and follows nothing (faults.py).

Knows: worlds, the interface of ur10e_deploy.robot.
Must not know: policies, the control loop.
"""

import time
from collections.abc import Mapping

import numpy as np
from ur10e_deploy.config import PolicyError
from ur10e_deploy.robot import JointReading, Picture, RobotOptions, Status

from sim.faults import CAMERA, CONTROLLER, EMERGENCY, HELD, JOINTS, PROGRAM, PROTECTIVE, SLOWED, braked, faulty
from sim.world import CONTROL_HZ, World
from ur10e import DRIVER_FROM_CANONICAL, DRIVER_JOINT_NAMES

JOINT_HZ, CAMERA_HZ = 125.0, CONTROL_HZ  # JOINT_HZ as in sim.record


class SimRobot:
    """One simulated arm with one camera, as ur10e_deploy.robot.Robot.

    Args:
        world: World whose control_hz is the command rate.
        camera: the camera's name.
        real_time: keep up with the wall clock.
        others: further states -> their values; they follow their commands at once.
        faults: Fault, each at its time.
        person: joint positions by time, (s) -> (6,) rad, of a person who moves the arm; commands are not followed then.

    Attributes:
        world: World; its command_rad is the simulator's own log of where the arm was sent, braking included.
        sent: list of (time in s, (6,) rad): the commands as they came.
    """

    cameras_are_noisy = False  # the renderer draws the same picture of the same scene

    def __init__(self, world, camera="color", real_time=False, others=None, faults=(), person=None):
        self.world, self.clock = world, _Clock(self, real_time)
        self.faults = list(faults)
        self.sent = []
        self._camera, self._person = camera, person
        self._others = dict(others or {})
        self._setpoint = world.path_rad[-1]
        self._halted = False
        self._stamps = {JOINTS: 0.0, CAMERA: 0.0}
        self._reading = (0.0, self._setpoint)
        self._picture = (None, None)

    def joints(self):
        """JointReading: what arrived last."""
        stamp_s, position_rad = self._reading
        return JointReading(stamp_s, DRIVER_JOINT_NAMES, position_rad[DRIVER_FROM_CANONICAL], dict(self._others))

    def picture_stamps(self):
        """{camera: when its last picture arrived, s}."""
        return {self._camera: self._stamps[CAMERA]}

    def pictures(self):
        """{camera: Picture}; drawn when somebody looks."""
        stamp_s = self._stamps[CAMERA]
        if self._picture[0] != stamp_s:
            self._picture = stamp_s, self.world.image(at_s=stamp_s)
        return {self._camera: Picture(stamp_s, self._picture[1])}

    def status(self):
        """Status, by the faults of this moment."""
        return Status(
            controller_active=not self._faulty(CONTROLLER),
            speed_scaling=0.5 if self._faulty(SLOWED) else 1.0,
            protective_stop=self._faulty(PROTECTIVE),
            emergency_stop=self._faulty(EMERGENCY),
            program_running=not self._faulty(PROGRAM),
        )

    def check(self):
        """[]: all of it is watched."""
        return []

    def command(self, position_rad, others: Mapping[str, float]):
        """Where to be one period from now. Raises ValueError for what is not six finite numbers, or no such state."""
        position_rad = np.array(position_rad, np.float64)
        if position_rad.shape != (6,) or not np.isfinite(position_rad).all():
            raise ValueError(f"command {position_rad}: expected six finite joint positions in rad")
        if unknown := set(others) - set(self._others):
            raise ValueError(f"command of {', '.join(sorted(unknown))}: the robot has no such state")
        self._halted = False
        self._setpoint = position_rad
        self._others.update(others)
        self.sent.append((self.clock.now_s(), position_rad))

    def halt(self):
        """Brake, and forget the last command."""
        self._halted = True

    def close(self):
        """Nothing to let go of."""

    # The world's way.

    def _faulty(self, kind):
        return faulty(self.faults, kind, self.world.time_s)

    def _advance(self):
        """One period of the world."""
        period_s = 1 / self.world.control_hz
        if self._person is not None:
            self._setpoint = self._person(self.world.time_s + period_s)
        elif self._halted or not self.status().program_running or any(map(self._faulty, (PROTECTIVE, EMERGENCY))):
            self._setpoint = braked(self.world)
        self.world.command(self.world.path_rad[-1] if self._faulty(HELD) else self._setpoint)
        now_s = self.world.time_s
        for kind, rate_hz in ((JOINTS, JOINT_HZ), (CAMERA, CAMERA_HZ)):
            # The last moment of its own grid; 1e-9: a moment that is now, up to rounding.
            stamp_s = np.floor(now_s * rate_hz + 1e-6) / rate_hz
            if stamp_s > self._stamps[kind] and not self._faulty(kind):
                self._stamps[kind] = stamp_s
                if kind == JOINTS:
                    self._reading = stamp_s, self.world.pose_rad(stamp_s)


class _Clock:
    """Lock step: waiting moves the world on. Real time: waiting waits, and moves the world on as far as time went."""

    def __init__(self, robot, real_time):
        self._robot, self.lock_step = robot, not real_time
        self._began_s = time.perf_counter()

    def now_s(self):
        """Seconds since the start: simulated ones in lock step."""
        return self._robot.world.time_s if self.lock_step else time.perf_counter() - self._began_s

    def wait_until(self, time_s):
        """Return at time_s."""
        world = self._robot.world
        if not self.lock_step:
            left_s = time_s - self.now_s()
            if left_s > 0:
                time.sleep(left_s)
            time_s = self.now_s()
        while world.time_s + 0.5 / world.control_hz < time_s:
            self._robot._advance()


def open_robot(options: RobotOptions):
    """`--robot sim`: episode `episode` of the scenes of `seed` (RobotOptions.extra), for a policy with one camera.

    Raises:
        PolicyError: the policy has not exactly one camera.
    """
    if len(options.cameras) != 1:
        raise PolicyError(
            f"--robot sim: the policy sees {', '.join(options.cameras) or 'nothing'}; the simulated cell has one camera"
        )
    ((camera, (height, width)),) = options.cameras.items()
    world = World(
        options.extra.get("seed", 1000), options.extra.get("episode", 0), height, width, control_hz=options.command_hz
    )
    person = world.expert.position if options.extra.get("person") else None
    others = dict.fromkeys(options.others, 0.0)
    return SimRobot(world, camera, options.real_time, others, options.extra.get("faults", ()), person)
