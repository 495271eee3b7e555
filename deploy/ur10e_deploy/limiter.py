"""Joint commands that keep every limit, whatever they are asked for.

    limiter = Limiter(limits, period_s=1 / 250)
    limiter.reset(q_rad)                   # where the arm stands
    step = limiter.step(target_rad)        # once per period; None or NaN asks for a stop
    robot.command(step.command_rad)

The guarantee does not rest on how well a target is followed. In every period the limiter holds a *stopping path*: the
commands that bring the arm to rest from here, looked at in full and found to keep all limits. A new command is sent
only if a stopping path from there was found as well, and looked at just as closely; if none was, the next command of
the path that is held is sent instead. At rest, the path is to stay. So there is always a next command that keeps the
limits, by induction, and a fault in the code that follows targets can make the motion poor but not the commands wrong.
(Model predictive control calls this recursive feasibility by a backup trajectory.)

Limits hold for the commands themselves: speed, acceleration and jerk are the first three differences of consecutive
commands by the period, which is what the robot's servo is asked for.

Ruckig, the usual library for jerk-limited motion, was weighed: its open version keeps no position limits on the way and
knows no workspace, so that the stopping paths would have to be looked at all the same; and it moves between states as
fast as possible, where a smooth stream of targets must be passed on as it is.

Knows: limits, differences, stopping.
Must not know: policies, chunks, clocks, robots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .limits import Limits

# Rounding: differences of float64 angles by a period of 2 ms are off by 1e-6 rad/s^3.
INSIDE = 1 - 1e-6
# How fast a target that was lost is caught again, rad/s of a critically damped loop: slow enough for the jerk limit
# when it is far, and for the period when it is near.
SLOWEST_CATCH, CATCH_PER_PERIOD = 8.0, 0.15
CAUGHT_JERK = 0.25  # of the limit
BLENDS = (0.5, 0.25, 0.1)  # between a command that cannot be stopped from and the stopping path's
STOP_TIMES_S = (0.008, 3.0)  # the shortest and the longest stop that is tried, if the period allows
STOPS_TRIED = 40


class LimitError(Exception):
    """A pose from which no command keeps the limits: one line."""


@dataclass(frozen=True)
class LimitedStep:
    """What to command, and what came of the target.

    Attributes:
        command_rad: (J,) finite, within all limits.
        limited: the target was not sent as it was; also where there was none, or none that is finite.
        beyond_rad: how far the command is from the target in the worst joint, rad; 0 without a finite target.
    """

    command_rad: np.ndarray
    limited: bool
    beyond_rad: float


class Limiter:
    """Turns targets into commands, one per period, that keep `limits`.

    Args:
        limits: of the six joints.
        period_s: between two commands.
        others: how many further positions follow the six (a gripper's): they must be finite, and stop at once.
    """

    def __init__(self, limits: Limits, period_s: float, others: int = 0) -> None:
        self.limits, self.period_s = limits, period_s
        none = np.full(others, np.inf)
        self._low = np.concatenate([limits.low_rad, -none])
        self._high = np.concatenate([limits.high_rad, none])
        self._speed = INSIDE * np.concatenate([limits.speed_rad_s, none])
        self._acceleration = INSIDE * np.concatenate([limits.acceleration_rad_s2, none])
        self._jerk = INSIDE * np.concatenate([limits.jerk_rad_s3, none])
        shortest, longest = (max(2, round(t_s / period_s)) for t_s in STOP_TIMES_S)
        self._stop_periods = np.unique(np.geomspace(shortest, longest, STOPS_TRIED).round()).astype(np.int64)[:, None]

    def reset(self, position_rad: np.ndarray) -> None:
        """Begin at rest at (J,) positions, where the arm is.

        Raises:
            LimitError: the pose itself is outside the limits.
        """
        q = np.array(position_rad, np.float64)
        if not np.isfinite(q).all() or (q < self._low).any() or (q > self._high).any():
            raise LimitError(f"joint positions {np.round(q, 3).tolist()} rad are outside the limits")
        if error := self.limits.workspace_error(q[:6]):
            raise LimitError(error)
        self._q, self._v, self._v_before = q, np.zeros(len(q)), np.zeros(len(q))
        self._path, self._at = q[None], 0  # the stopping path: commands still to be sent if nothing better is found
        self._targets: list[np.ndarray] = []
        self._lost = np.zeros(len(q), bool)  # joints that are not where their target is

    @property
    def position_rad(self) -> np.ndarray:
        """(J,) the last command."""
        return self._q.copy()

    @property
    def at_rest(self) -> bool:
        """Whether the last three commands were the same."""
        return not (self._v.any() or self._v_before.any())

    def step(self, target_rad: np.ndarray | None) -> LimitedStep:
        """The next command, for a target (J,) of the next period; None, or one that is not finite, asks for a stop."""
        target = None if target_rad is None else np.asarray(target_rad, np.float64)
        if target is None or target.shape != self._q.shape or not np.isfinite(target).all():
            self._targets = []
            self._follow_path()
            return LimitedStep(self._q.copy(), True, 0.0)
        limited = not self._pass_on(target)
        self._targets = [*self._targets[-2:], target]
        return LimitedStep(self._q.copy(), limited, float(np.abs(target - self._q)[:6].max()))

    # How a target is followed: nothing here is trusted.

    def _pass_on(self, target: np.ndarray) -> bool:
        """Move towards the target; -> whether it was reached exactly."""
        period = self.period_s
        speed = (target - self._q) / period
        now = (self._v - self._v_before) / period
        acceleration = (speed - self._v) / period
        fits = (np.abs(speed) <= self._speed) & (np.abs(acceleration) <= self._acceleration)
        # Onto a target that was lost only gently: staying on it takes twice the jerk of getting there.
        fits &= np.abs(acceleration - now) <= np.where(self._lost, CAUGHT_JERK, 1.0) * self._jerk * period
        self._lost = ~fits
        wanted = target if fits.all() else np.where(fits, target, self._q + period * self._caught_up(target, now))
        if self._accept(wanted):
            return bool(fits.all())
        stopping = self._path[min(self._at, len(self._path) - 1)]
        for share in BLENDS:
            if self._accept(stopping + share * (wanted - stopping)):
                return False
        self._follow_path()
        return False

    def _caught_up(self, target: np.ndarray, now: np.ndarray) -> np.ndarray:
        """(J,) speeds of the next period that lead to a target out of reach, and to move with it from there on."""
        period = self.period_s
        speed, acceleration = np.zeros_like(target), np.zeros_like(target)
        if len(self._targets) == 3:  # how the target itself moves, where it does so smoothly
            rows = np.array([*self._targets, target])
            jerk = np.abs(np.diff(rows, 3, axis=0)[0]) <= self._jerk * period**3
            speed = np.where(jerk, (rows[3] - rows[2]) / period, 0.0)
            acceleration = np.where(jerk, np.diff(rows, 2, axis=0)[1] / period**2, 0.0)
        error = target - period * speed - self._q
        size = np.abs(error) + 0.05 * np.abs(speed - self._v)
        with np.errstate(divide="ignore", invalid="ignore"):  # of states without limits, which are never lost
            catch = np.clip(np.cbrt(self._jerk / (4 * size)), SLOWEST_CATCH, CATCH_PER_PERIOD / period)
            # Towards it no faster than half the acceleration can stop.
            approach = np.sign(error) * np.minimum(
                catch / 2 * np.abs(error), np.sqrt(self._acceleration * np.abs(error))
            )
        speed_wanted = np.clip(speed + approach, -0.95 * self._speed, 0.95 * self._speed)
        wanted = np.clip(acceleration, -self._acceleration, self._acceleration)
        wanted = wanted + 2 * catch * (speed_wanted - self._v)
        wanted = np.clip(wanted, -0.95 * self._acceleration, 0.95 * self._acceleration)
        step = 0.95 * self._jerk * period
        return self._v + period * np.clip(wanted, now - step, now + step)

    # What is trusted: these two, and the check between them.

    def _follow_path(self) -> None:
        """Send the next command of the stopping path; at its end, stay."""
        self._move_to(self._path[self._at] if self._at < len(self._path) else self._q)
        self._at += 1

    def _accept(self, wanted: np.ndarray) -> bool:
        """Send `wanted` if it, and a stopping path from there, keep all limits; -> whether it was sent."""
        path = self._stopping_path(wanted)
        if path is None:
            return False
        self._move_to(wanted)
        self._path, self._at = path, 0
        return True

    def _move_to(self, q: np.ndarray) -> None:
        self._v_before, self._v = self._v, (q - self._q) / self.period_s
        self._q = q

    def _stopping_path(self, wanted: np.ndarray) -> np.ndarray | None:
        """Commands (N, J) that follow `wanted` and end at rest, if they and `wanted` keep all limits; else None."""
        period = self.period_s
        v = (wanted - self._q) / period
        speeds = self._stopping_speeds(v)
        if speeds is None:
            return None
        path = wanted + period * np.cumsum(speeds, axis=0)
        # Differences of the very commands, from those that were sent to those that end it.
        moving = np.concatenate([[self._v_before, self._v, v], speeds])
        acceleration = np.diff(moving, axis=0) / period
        jerk = np.diff(acceleration, axis=0) / period
        kept = (
            (np.abs(moving[2:]) <= self._speed).all()
            and (np.abs(acceleration[1:]) <= self._acceleration).all()
            and (np.abs(jerk) <= self._jerk).all()
            and (path.min(axis=0) >= self._low).all()
            and (path.max(axis=0) <= self._high).all()
            and ((wanted >= self._low) & (wanted <= self._high)).all()
        )
        if not kept or self.limits.workspace_error(np.concatenate([wanted[None], path])[:, :6]):
            return None
        return path

    def _stopping_speeds(self, v: np.ndarray) -> np.ndarray | None:
        """Speeds (N, J), zeros at the end, that brake each joint from `v` and the last command's speed.

        Each joint's speed is the cubic in time through these two that ends with speed and acceleration zero: its
        jerk changes linearly and is largest at an end, so that the shortest stop within the limits is found without
        trying it out.
        """
        period, n = self.period_s, self._stop_periods
        alpha = v / (n * (n + 1))  # speed k periods from now: (n - k) (n + 1 - k) (alpha + beta k)
        beta = alpha - self._v / ((n + 1) * (n + 2))
        first = (n - 1) * n * (alpha + beta)
        last = 2 * (alpha + beta * (n - 1))
        jerk_first, jerk_last = (first - 2 * v + self._v) / period**2, last / period**2
        with np.errstate(divide="ignore", invalid="ignore"):
            rising = np.where(jerk_first * jerk_last < 0, jerk_first / (jerk_first - jerk_last), 0.0)
        peak = (v - self._v) / period + period * jerk_first * ((n + 1) * rising + 1) / 2
        within = (np.maximum(np.abs(jerk_first), np.abs(jerk_last)) <= self._jerk) & (
            np.abs(peak) <= self._acceleration
        )
        if not within.any(axis=0).all():
            return None
        chosen = within.argmax(axis=0)
        joint = np.arange(len(v))
        n, alpha, beta = n[chosen, 0], alpha[chosen, joint], beta[chosen, joint]
        k = np.arange(1, n.max() + 2)[:, None]
        return np.where(k < n, (n - k) * (n + 1 - k) * (alpha + beta * k), 0.0)
