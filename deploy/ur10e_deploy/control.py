"""The control loop: one command per period, whatever the policy, the cameras or the robot do.

    loop = ControlLoop(robot, Thinker(...), limits, ControlSettings(), watchdog)
    loop.run()
    print(loop.ended)

The phases, and what leads from one to the next:

    waiting    at rest, the policy is asked                          a chunk comes: running
    running    the path is played, the next chunk is asked for       something is silent, or the policy late or wrong:
                                                                     holding; time is over, a limit counts: ending
    holding    brakes within the limits, then stands still           all speaks again: waiting. Not in time: ended
    ending     brakes within the limits                              at rest: ended
    halted     nothing is commanded any more, ever                   what the arm does is recorded a little: ended

Playing begins at the last command, never at the measured pose: a path that restarts where a lagging arm is, jitters.
Only in `waiting`, where both are the same but for a tracking error that is watched, is the arm's own pose what counts:
the policy starts from it.

Knows: phases, periods, what is logged.
Must not know: how a limit is kept, how chunks become a path, how a policy is run, which robot it is, files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .config import PolicyError
from .limiter import Limiter, LimitError
from .limits import Limits
from .playback import Playback
from .robot import JointReading, Robot
from .thinking import Answer, Thinker
from .watchdog import JOINT_STATES, Watchdog

WAITING, RUNNING, HOLDING, ENDING, HALTED = "waiting", "running", "holding", "ending", "halted"
AFTER_HALT_S = 0.6  # for so long it is recorded what an arm does that was halted
MAX_GAP_S = 0.04  # robot_receive_timeout of UR's ROS 2 driver: then the robot's program stops the arm by itself
RETRY_S = 0.2  # a policy that failed is asked again no sooner


@dataclass(frozen=True)
class ControlSettings:
    """How the loop runs.

    Attributes:
        fps: of the policy.
        command_hz: of the robot.
        speed_fraction: 1 plays chunks as fast as they were recorded, 0.25 in four times the time.
        replan_frames: a chunk is asked for so many frames after the last one was.
        duration_s: of the run, on the robot's clock.
        recover_s: within it, a silent source must speak again, and the first chunk must be there.
        max_limited_s: the run ends when so much of it had commands that were limited,
        max_beyond_rad: or when one of them is so far from what was wanted.
        max_gap_s: a moving arm that got no command for so long has been stopped by its driver.
        commanding: False does everything but command (and halt).
    """

    fps: float
    command_hz: float = 250.0
    speed_fraction: float = 0.25
    replan_frames: int = 10
    duration_s: float = 60.0
    recover_s: float = 2.0
    max_limited_s: float = 5.0
    max_beyond_rad: float = 0.35
    max_gap_s: float = MAX_GAP_S
    commanding: bool = True


class Recorder(Protocol):
    """What the loop tells of itself, as it happens (recording.py)."""

    def joints(self, reading: JointReading) -> None:
        """A new joint reading."""
        ...

    def pictures(self, robot: Robot) -> None:
        """New pictures are there to be taken."""
        ...

    def command(self, now_s: float, command_rad: np.ndarray) -> None:
        """What was commanded, (J,)."""
        ...

    def chunk(self, now_s: float, answer: Answer, late: int) -> None:
        """A chunk that came."""
        ...

    def event(self, now_s: float, text: str) -> None:
        """Something a person would want to know."""
        ...


@dataclass
class Stop:
    """A time when the arm was made to stop.

    Attributes:
        kind: HOLDING, ENDING or HALTED.
        at_s, why: when, and the reasons.
        rest_s: how long until it stood still; None when it never did.
        resumed_s: when it moved again.
    """

    kind: str
    at_s: float
    why: str
    rest_s: float | None = None
    resumed_s: float | None = None


@dataclass
class Log:
    """One row per period, and what happened between.

    Attributes:
        time_s, late_s: when, and how late the period began.
        command_rad: (J,) the command of the period, whether it was sent or not.
        measured_rad: (6,) the last known joints.
        running, limited, sent: whether a target was played, it was limited, the command went to the robot.
        answers: every Answer, with the time it came and how many actions of it were late.
        stops: Stop.
    """

    time_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    command_rad: list[np.ndarray] = field(default_factory=list)
    measured_rad: list[np.ndarray] = field(default_factory=list)
    running: list[bool] = field(default_factory=list)
    limited: list[bool] = field(default_factory=list)
    sent: list[bool] = field(default_factory=list)
    answers: list[tuple[float, Answer, int]] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)
    beyond_rad: float = 0.0
    missed_periods: int = 0


class ControlLoop:
    """Runs a policy on a robot, until it ends.

    Args:
        robot, thinker, limits, settings, watchdog, playback: its parts.
        say: gets a line when a phase changes.

    Attributes:
        log: Log.
        ended: why it ended; "" before.
        orderly: it ended because its time was over.
    """

    def __init__(
        self,
        robot: Robot,
        thinker: Thinker,
        limits: Limits,
        settings: ControlSettings,
        watchdog: Watchdog,
        playback: Playback,
        say: Callable[[str], Any] = lambda line: None,
    ) -> None:
        self._robot, self._thinker, self._limits, self._settings = robot, thinker, limits, settings
        self._watchdog, self.playback, self._say = watchdog, playback, say
        self._recorder: Recorder | None = None
        self._period_s = 1 / settings.command_hz
        # How long the arm may go by what the policy saw once: twice as long as planned, and a second for inference.
        self._policy_age_s = 1.0 + 2 * settings.replan_frames / (settings.fps * settings.speed_fraction)
        self.limiter = Limiter(limits, self._period_s, len(thinker.arm.others))
        self.log, self.ended, self.orderly = Log(), "", False
        self._why, self._limited_periods = "", 0
        self._stop_asked = ""
        self._recorded_stamp_s, self._picture_stamps = -1.0, {}

    def record(self, recorder: Recorder) -> None:
        """Tell `recorder` of everything from now on."""
        self._recorder = recorder

    def stop(self, why: str) -> None:
        """Brake and end, at the next period: for Ctrl-C."""
        self._stop_asked = why

    def run(self) -> None:
        """From where the arm is, to the end.

        Raises:
            LimitError: the arm stands where no command keeps the limits.
            PolicyError: the robot's state is not what the policy knows.
        """
        clock = self._robot.clock
        reading = self._robot.joints()
        if reading is None:
            raise LimitError("no joint state has come; it is not known where the arm is")
        start = self._thinker.arm.here(self._thinker.arm.state(reading))
        self.limiter.reset(start)
        self._measured_rad = start[:6]
        began_s = clock.now_s()
        self._began_s = self._troubled_s = self._commanded_s = began_s
        self._begin_waiting(began_s)
        period = 0
        try:
            while not self.ended:
                due_s = began_s + period * self._period_s
                clock.wait_until(due_s)
                now_s = clock.now_s()
                self._one_period(now_s)
                self.log.late_s.append(now_s - due_s)
                over = int((clock.now_s() - began_s) / self._period_s + 1e-6)
                self.log.missed_periods += max(over - period - 1, 0)  # over: they cannot be commanded any more
                period = max(period + 1, over)
        except BaseException:  # a fault of ours, or a second Ctrl-C: never leave a command standing
            if self._settings.commanding:
                self._robot.halt()
            raise
        finally:
            self._thinker.close()

    # -- one period

    def _one_period(self, now_s: float) -> None:
        reading, stamps = self._robot.joints(), self._robot.picture_stamps()
        assert reading is not None  # run() began with one
        self._record_world(reading, stamps)
        silent = self._watchdog.stale(now_s, reading, stamps)
        try:
            self._measured_rad = self._thinker.arm.here(self._thinker.arm.state(reading))[:6]
        except PolicyError as problem:
            silent.append(f"{JOINT_STATES}: {problem}")
        target = limited = None
        if self._phase != HALTED:
            self._check(now_s, reading, silent)
        if self._phase == HALTED:
            if now_s - self.log.stops[-1].at_s >= AFTER_HALT_S:
                self.ended = self._why
        else:
            if self._phase == RUNNING:
                self._frame += self._settings.speed_fraction * self._settings.fps * self._period_s
                target = self.playback.at(self._frame)
            step = self.limiter.step(target)
            limited = step.limited and target is not None
            if limited:
                self._count_limited(now_s, step.beyond_rad)
            if self._settings.commanding:
                self._robot.command(step.command_rad[:6], dict(zip(self._others, step.command_rad[6:], strict=True)))
                self._commanded_s = now_s
            if self._recorder:
                self._recorder.command(now_s, step.command_rad)
            self._note_rest(now_s)
        self.log.time_s.append(now_s)
        self.log.command_rad.append(self.limiter.position_rad)
        self.log.measured_rad.append(self._measured_rad)
        self.log.running.append(target is not None)
        self.log.limited.append(bool(limited))
        self.log.sent.append(self._settings.commanding and self._phase != HALTED)

    @property
    def _others(self) -> tuple[str, ...]:
        return self._thinker.arm.others

    def _check(self, now_s: float, reading: JointReading, silent: list[str]) -> None:
        """Whatever may change the phase; `silent` is what does not speak as it should."""
        settings = self._settings
        troubles = self._robot.status().troubles()
        away_rad = np.abs(self._measured_rad - self.limiter.position_rad[:6])
        known = not any(text.startswith(JOINT_STATES) for text in silent)  # else it is held, in a moment
        if settings.commanding and known and away_rad.max() > self._limits.tracking_rad:
            troubles.append(
                f"a joint is {away_rad.max():.3f} rad from its command, expected {self._limits.tracking_rad:g} at most"
            )
        gap_s = now_s - self._commanded_s
        if settings.commanding and gap_s > settings.max_gap_s and not self.limiter.at_rest:
            troubles.append(
                f"no command for {gap_s:.3f} s while the arm moved, expected {settings.max_gap_s:g} s at most: this "
                "computer is too busy"
            )
        if troubles:
            self._halt(now_s, "; ".join(troubles))
            return
        if self._phase == ENDING:
            return
        if self._stop_asked:
            self.orderly = True
            self._brake(now_s, ENDING, self._stop_asked)
            return
        if now_s - self._began_s >= settings.duration_s:
            self.orderly = True
            self._brake(now_s, ENDING, f"the {settings.duration_s:g} s are over")
            return

        answer = self._thinker.answer(now_s)
        if answer is not None:
            silent += self._take(now_s, answer, ready=not silent)
        if self._phase == RUNNING:
            silent += self._watchdog.aged("policy", now_s - self._seen_s, self._policy_age_s)
        if self._phase == RUNNING and self.playback.end_frame < self._frame + 2:
            silent.append("the policy: its last chunk is played and the next one is not there")
        if silent and self._phase in (WAITING, RUNNING):
            self._brake(now_s, HOLDING, "; ".join(silent))
        elif self._phase == HOLDING and not silent and self.limiter.at_rest and not self._thinker.busy:
            if now_s - self._braked_s >= RETRY_S:
                self._begin_waiting(now_s)
        if self._troubled_s is not None and now_s - self._troubled_s > settings.recover_s:
            why = "; ".join(silent) or self._why or "the policy gave no chunk"
            self._brake(now_s, ENDING, f"not well again within {settings.recover_s:g} s: {why}")
        elif self._phase == WAITING or (self._phase == RUNNING and self._frame >= self._next_question):
            self._ask(now_s, reading)

    def _ask(self, now_s: float, reading: JointReading) -> None:
        if self._thinker.busy:
            return
        robot, frame = self._robot, math.floor(self._frame)
        self._next_question = frame + self._settings.replan_frames

        def images() -> dict[str, np.ndarray]:
            return {camera: picture.rgb for camera, picture in robot.pictures().items()}

        self._thinker.ask(now_s, frame, reading, images, self.limiter.position_rad)

    def _take(self, now_s: float, answer: Answer, ready: bool) -> list[str]:
        """Play a chunk that came; -> what is wrong with it."""
        late = 0
        if answer.positions is not None and self._phase in (WAITING, RUNNING) and ready:
            late = self.playback.accept(answer.frame, answer.positions, self._frame)
            self._seen_s = answer.asked_s
            if self._phase == WAITING:
                self._phase, self._troubled_s = RUNNING, None
                if self.log.stops:
                    self.log.stops[-1].resumed_s = now_s
                self._why = ""
                self._tell(now_s, "running")
        self.log.answers.append((now_s, answer, late))
        if self._recorder:
            self._recorder.chunk(now_s, answer, late)
        return [f"the policy: {answer.error}"] if answer.error else []

    # -- phases

    def _begin_waiting(self, now_s: float) -> None:
        self._phase, self._frame, self._next_question = WAITING, 0.0, 0
        self.playback.restart(self.limiter.position_rad)
        self._tell(now_s, "waiting for the policy")

    def _brake(self, now_s: float, phase: str, why: str) -> None:
        """Brake within the limits, to hold or to end; what the policy is still thinking about is over."""
        if self._phase == ENDING:
            return
        self._phase, self._why = phase, why
        self._thinker.forget()
        if self._troubled_s is None:
            self._troubled_s = now_s
        self._braked_s = now_s
        last = self.log.stops[-1] if self.log.stops else None
        if not (last and phase == HOLDING == last.kind and last.resumed_s is None):  # else it is still the same one
            self.log.stops.append(Stop(phase, now_s, why))
        self._tell(now_s, f"{phase}: {why}")

    def _halt(self, now_s: float, why: str) -> None:
        """Command nothing any more: what the robot does from here is its own, and a person's."""
        self._phase, self._why = HALTED, why
        self.orderly = False
        if self._settings.commanding:
            self._robot.halt()
        self.log.stops.append(Stop(HALTED, now_s, why))
        self._tell(now_s, f"halted: {why}")

    def _count_limited(self, now_s: float, beyond_rad: float) -> None:
        settings = self._settings
        self._limited_periods += 1
        self.log.beyond_rad = max(self.log.beyond_rad, beyond_rad)
        if beyond_rad > settings.max_beyond_rad:
            self._brake(
                now_s, ENDING,
                f"a command had to be limited by {beyond_rad:.3f} rad, more than {settings.max_beyond_rad:g} rad",
            )  # fmt: skip
        elif self._limited_periods * self._period_s > settings.max_limited_s:
            self._brake(now_s, ENDING, f"commands were limited for more than {settings.max_limited_s:g} s")

    def _note_rest(self, now_s: float) -> None:
        stop = self.log.stops[-1] if self.log.stops else None
        if stop and stop.rest_s is None and self._phase in (HOLDING, ENDING) and self.limiter.at_rest:
            stop.rest_s = now_s - stop.at_s
        if self._phase == ENDING and self.limiter.at_rest:
            self.ended = self._why

    # -- what is told

    def _tell(self, now_s: float, text: str) -> None:
        self._say(f"{now_s:8.3f} s  {text}")
        if self._recorder:
            self._recorder.event(now_s, text)

    def _record_world(self, reading: JointReading, stamps: Any) -> None:
        if not self._recorder:
            return
        if reading.stamp_s > self._recorded_stamp_s:
            self._recorder.joints(reading)
            self._recorded_stamp_s = reading.stamp_s
        if any(stamp > self._picture_stamps.get(camera, -1.0) for camera, stamp in stamps.items()):
            self._recorder.pictures(self._robot)
            self._picture_stamps = dict(stamps)
