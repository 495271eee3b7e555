"""A UR e-Series arm (PolyScope 5) through ur_rtde: joint states and status in, servoJ out; pictures from cameras.py.

    python -m ur10e_deploy.run --checkpoint outputs/demo --robot rtde --host 192.168.0.10 --camera color=/dev/video0

RTDEReceiveInterface says where the arm is and how it is, RTDEControlInterface uploads a program to the controller and
gives it targets. What follows is how ur_rtde 1.6.5 works (its source, and the program that it carries), and is why this
module does what it does:

- The program's thread servoes to the last target for ever. A runner that is killed leaves an arm that goes to its last
  command and stands there, under a running program. So the controller gets a watchdog: WATCHDOG_HZ without a word ends
  the program.
- A paused program goes on with its last target: after a protective stop, when somebody presses play. So halt() ends the
  program, by servoStop where it still listens and through the dashboard in any case.
- A lost connection is opened again by ur_rtde by itself: it uploads its program again and repeats the command that
  failed. So whoever is not heard is lost for good here, and not spoken to again.
- stopJ does not end the thread that servoes; servoStop does.
- In a dry run there is no RTDEControlInterface: it would end the program that a person uses meanwhile.

Knows: ur_rtde, which is imported when a robot is opened.
Must not know: the control loop, limits.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from ur10e import JOINT_NAMES

from .cameras import Cameras, parse_sources
from .config import PolicyError
from .robot import JointReading, Picture, RobotOptions, Status, WallClock

# servoJ's lookahead and gain: those of UMI's controller for a UR5 (Chi et al., 2024), which are ur_rtde's own defaults,
# too. UR's ROS 2 driver has 0.03 and 2000, for a stream of 500 Hz whose missing targets it extrapolates; ur_rtde's
# program does not, so that a late target is a stop, and a longer lookahead makes it a softer one.
LOOKAHEAD_S, GAIN = 0.1, 300.0
LOOKAHEAD_RANGE_S, GAIN_RANGE = (0.03, 0.2), (100.0, 2000.0)  # what ur_rtde takes
WATCHDOG_HZ = 5.0  # 0.2 s: longer than servoStop takes, which says nothing meanwhile
LOST_S = 0.5  # without a package of the controller; its watchdog has ended the program by then
STOP_M_S2 = 4.0  # of servoStop, which is stopl. UR's ROS 2 driver stops with stopj at 4 rad/s²: the same, 1 m out
STOP_WAIT_S = 1.0  # for servoStop, before the dashboard is asked, too
CONNECT_S, CLOSE_WAIT_S = 2.0, 10.0  # ur_rtde tries to connect again for up to 5 s before it can be let go
PORTS = {30004: "RTDE", 30003: "programs", 29999: "the dashboard server"}  # ur_rtde knows them by heart
VARIABLES = [
    "timestamp", "actual_q", "robot_mode", "safety_status_bits", "runtime_state", "speed_scaling",
    "target_speed_fraction",
]  # fmt: skip
# UR's RTDE guide: values of runtime_state and robot_mode, bits of safety_status_bits.
PLAYING, STOPPED, RUNNING = 2, 1, 7
MODES = ("DISCONNECTED", "CONFIRM_SAFETY", "BOOTING", "POWER_OFF", "POWER_ON", "IDLE", "BACKDRIVE", "RUNNING")
PROTECTIVE_BIT, EMERGENCY_BITS = 2, (5, 6, 7)
OTHER_BITS = {3: "recovery mode", 4: "safeguard stop", 8: "safety violation", 9: "safety fault"}


class RtdeRobot:
    """One arm, as robot.Robot.

    Args:
        receive: RTDEReceiveInterface with VARIABLES.
        control: RTDEControlInterface; None commands nothing.
        make_dashboard: gives a DashboardClient that is not connected yet.
        cameras: Cameras.
        clock: theirs, too.
        host: for messages.
        period_s: of commands.
        lookahead_s, gain: of servoJ.
        watchdog_hz, lost_s: see WATCHDOG_HZ, LOST_S.
    """

    cameras_are_noisy = True

    def __init__(
        self, receive: Any, control: Any, make_dashboard: Any, cameras: Cameras, clock: WallClock, host: str,
        period_s: float, lookahead_s: float = LOOKAHEAD_S, gain: float = GAIN, watchdog_hz: float = WATCHDOG_HZ,
        lost_s: float = LOST_S,
    ) -> None:  # fmt: skip
        self.clock = clock
        self._receive, self._control, self._make_dashboard = receive, control, make_dashboard
        self._cameras, self._host = cameras, host
        self._servo = (0.0, 0.0, period_s, lookahead_s, gain)  # speed and acceleration: "not used in current version"
        self._watchdog_hz, self._lost_s = watchdog_hz, lost_s
        self._watched = self._refused = False
        self._lost = ""
        self._halting: threading.Thread | None = None
        self._controller_s = -1.0
        self._reading = self.joints()

    def joints(self) -> JointReading:
        """The last reading; a package counts as arrived when it is first seen here, once per period."""
        controller_s = self._receive.getTimestamp()
        if controller_s != self._controller_s:
            self._controller_s = controller_s
            self._reading = JointReading(self.clock.now_s(), JOINT_NAMES, np.array(self._receive.getActualQ()))
        return self._reading

    def picture_stamps(self) -> Mapping[str, float]:
        """Camera -> when its last picture arrived, s."""
        return self._cameras.stamps()

    def pictures(self) -> Mapping[str, Picture]:
        """Camera -> its last picture."""
        return self._cameras.pictures()

    def status(self) -> Status:
        """What the last package says, and whether there are any."""
        receive, control = self._receive, self._control
        bits, mode = receive.getSafetyStatusBits(), receive.getRobotMode()
        silent_s = self.clock.now_s() - self.joints().stamp_s
        if not self._lost:
            if not receive.isConnected() or (control is not None and not control.isConnected()):
                self._lose("it was closed")
            elif silent_s > self._lost_s:
                self._lose(f"nothing was heard for {silent_s:.2f} s")
        others = [text for bit, text in OTHER_BITS.items() if bits >> bit & 1]
        if self._lost:
            others.insert(0, self._lost)
        if mode != RUNNING:
            name = MODES[mode] if 0 <= mode < len(MODES) else mode
            others.append(f"the robot's mode is {name}, expected RUNNING")
        program_running = control is None or receive.getRuntimeState() == PLAYING
        protective, emergency = bool(bits >> PROTECTIVE_BIT & 1), any(bits >> bit & 1 for bit in EMERGENCY_BITS)
        if self._refused and not (others or protective or emergency) and program_running:
            others.append("the program on the robot took a command no more")
        return Status(
            speed_scaling=receive.getSpeedScaling() * receive.getTargetSpeedFraction(),
            protective_stop=protective,
            emergency_stop=emergency,
            program_running=program_running,
            further=tuple(others),
        )

    def check(self) -> list[str]:
        """[]: what a status is made of is always there, or the robot could not be opened."""
        return []

    def command(self, position_rad: np.ndarray, others: Mapping[str, float]) -> None:
        """Be at position_rad (6,) one period from now; nothing is sent after halt(), or when the connection is lost."""
        if self._halting or self._lost:
            return
        try:
            if not self._watched:
                self._refused |= not self._control.setWatchdog(self._watchdog_hz)
                self._watched = True
            self._refused |= not self._control.servoJ(np.asarray(position_rad).tolist(), *self._servo)
        except RuntimeError as error:  # it tried to connect again, in vain
            self._lose(" ".join(str(error).split()))

    def halt(self) -> None:
        """End the program on the robot, in a thread, so that what the arm does meanwhile is recorded; for good."""
        if self._halting is None:
            self._halting = threading.Thread(target=self._end_program, name="halt", daemon=True)
            self._halting.start()

    def close(self) -> None:
        """End the program, if there is one, and let go."""
        if self._control is not None:
            if self._lost or self._receive.getRuntimeState() != STOPPED:
                self.halt()
            if self._halting:
                self._halting.join(CLOSE_WAIT_S)
            if not self._lost:
                _disconnect(self._control)
        self._cameras.close()
        _disconnect(self._receive)

    def _lose(self, why: str) -> None:
        self._lost = f"the connection to {self._host} is lost: {why}"

    def _end_program(self) -> None:
        if self._lost:
            _disconnect(self._control)  # first, so that no program is uploaded after the dashboard stopped the last
        elif self._receive.getRuntimeState() == PLAYING:
            stopping = threading.Thread(target=self._servo_stop, name="servoStop", daemon=True)
            stopping.start()
            stopping.join(STOP_WAIT_S)
        try:
            dashboard = self._make_dashboard()
            dashboard.connect(round(1e3 * CONNECT_S))
            dashboard.stop()
            dashboard.disconnect()
        except RuntimeError as error:
            said = " ".join(str(error).split())
            print(f"warning: the program on {self._host} could not be stopped by the dashboard: {said}; stop it on the "
                  "pendant before anybody presses play", file=sys.stderr, flush=True)  # fmt: skip

    def _servo_stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # the dashboard comes next
            self._control.servoStop(STOP_M_S2)


def _disconnect(interface: Any) -> None:
    with contextlib.suppress(RuntimeError):  # it says good-bye to somebody who may be gone
        interface.disconnect()


def open_robot(options: RobotOptions) -> RtdeRobot:
    """`--robot rtde`.

    RobotOptions.extra has host, camera (a list of NAME=SOURCE) and commanding, perhaps servo_gain and
    servo_lookahead_s; tests change watchdog_hz and lost_s.

    Raises:
        PolicyError: ur_rtde is not there, an option is wrong, robot or camera do not answer, or another program runs.
    """
    try:
        # Their names on the package index are one: ur-rtde.
        from dashboard_client import DashboardClient  # ty: ignore[import-not-found]
        from rtde_control import RTDEControlInterface  # ty: ignore[import-not-found]
        from rtde_receive import RTDEReceiveInterface  # ty: ignore[import-not-found]
    except ImportError as error:
        raise PolicyError(
            f"--robot rtde: ur_rtde cannot be imported ({error}); install it: pip install ur-rtde==1.6.5, which has "
            "wheels for Python 3.10 to 3.12 on x86-64 Linux"
        ) from None
    extra = options.extra
    host, commanding = extra.get("host"), extra.get("commanding", True)
    if not host:
        raise PolicyError("--robot rtde: --host is missing; expected the robot's address, as its pendant shows it")
    servo = {}
    for name, given, (low, high) in (
        ("servo_lookahead_s", "lookahead_s", LOOKAHEAD_RANGE_S), ("servo_gain", "gain", GAIN_RANGE)
    ):  # fmt: skip
        if (value := extra.get(name)) is not None:
            if not low <= value <= high:
                raise PolicyError(f"--{name.replace('_', '-')} is {value:g}; expected {low:g} to {high:g}")
            servo[given] = value
    if options.others:
        raise PolicyError(f"--robot rtde: the policy has {', '.join(options.others)}, and RTDE brings joints alone")
    sources = parse_sources(extra.get("camera") or [])
    if set(sources) != set(options.cameras):
        raise PolicyError(
            f"--camera: found {', '.join(sources) or 'none'}; expected one for each of {', '.join(options.cameras)}, "
            "which the policy sees: RTDE brings no pictures"
        )
    for port, what in PORTS.items() if commanding else [(30004, PORTS[30004])]:
        try:
            socket.create_connection((host, port), CONNECT_S).close()
        except OSError as error:
            raise PolicyError(
                f"--host {host}: nobody answers at port {port} ({what}): {error}; is the robot on, and is this its "
                "address?"
            ) from None
    clock = WallClock()
    receive = cameras = None
    try:
        receive = RTDEReceiveInterface(host, options.command_hz, VARIABLES)
        if commanding and receive.getRuntimeState() != STOPPED:  # ur_rtde would end it without a word
            raise PolicyError(f"--host {host}: a program runs on the robot; stop it on the pendant, or add --dry-run")
        cameras = Cameras(sources, options.cameras, clock.now_s)
        control = RTDEControlInterface(host, options.command_hz) if commanding else None
    except Exception as error:  # ur_rtde's are of many kinds
        if cameras is not None:
            cameras.close()
        if receive is not None:
            receive.disconnect()
        if isinstance(error, PolicyError):
            raise
        raise PolicyError(f"--host {host}: {error}") from None
    tuned = {name: extra[name] for name in ("watchdog_hz", "lost_s") if name in extra}
    return RtdeRobot(
        receive, control, lambda: DashboardClient(host), cameras, clock, host, 1 / options.command_hz, **servo, **tuned
    )
