"""What was commanded, and when: command messages to a series over time, and from it the command in force at a tick.

A command holds until the next one comes. A trajectory is what is commanded over time: on the way between its points the
interpolated one, behind the last point that one. A later trajectory replaces what an earlier one had planned beyond it.

Knows: series of numbers over time, trajectories, delays between two series.
Must not know: messages, bags, ticks' rate, what actions are made of commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

# A delay of measured positions behind commands is looked for in this range, on a grid of this step. A controller takes
# 0.03 to 0.2 s; clocks that are set apart a little may even turn it round.
LEAST_DELAY_S, MOST_DELAY_S, DELAY_STEP_S = -0.5, 1.0, 0.005


@dataclass
class Commands:
    """One number's commands over time: N moments, in time order.

    Attributes:
        time_ns: (N,) int64.
        value: (N,) float64, what is commanded from then on.
        moving: (N,) bool: until the next moment the command moves on a line to its value; else it stays.
        message_ns: (M,) int64, times of the messages that all this came from, in file order.
    """

    time_ns: np.ndarray
    value: np.ndarray
    moving: np.ndarray
    message_ns: np.ndarray

    def at(self, ticks_ns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The commands in force: ((T,) float64 values, NaN before the first, (T,) float64 ns since when they stay)."""
        now = np.searchsorted(self.time_ns, ticks_ns, side="right") - 1
        after = np.minimum(now + 1, len(self.time_ns) - 1)
        since_ns = (ticks_ns - self.time_ns[now]).astype(np.float64)
        share = since_ns / np.maximum(1, self.time_ns[after] - self.time_ns[now])
        moving = self.moving[now]
        value = self.value[now] + np.where(moving, share * (self.value[after] - self.value[now]), 0.0)
        return np.where(now < 0, np.nan, value), np.where(now < 0, np.inf, np.where(moving, 0.0, since_ns))


def held(message_ns: ArrayLike, values: ArrayLike) -> Commands:
    """Commands that each hold until the next one; of those at one time the last counts."""
    recorded_ns = np.array(message_ns, np.int64)
    order = np.argsort(recorded_ns, kind="stable")
    return Commands(recorded_ns[order], np.array(values, np.float64)[order], np.zeros(len(order), bool), recorded_ns)


def followed(trajectories: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> Commands:
    """Trajectories, each (when it came in ns, (P,) ns from then to its points, (P,) values), P >= 1, as commands.

    The way to the first point begins where the command was when the trajectory came, or, before there was any, at that
    point itself.
    """
    moments: list[tuple[int, float, bool]] = []  # as Commands has them
    for came_ns, offset_ns, values in sorted(trajectories, key=lambda one: one[0]):
        planned = None
        while moments and moments[-1][0] > came_ns:
            planned = moments.pop()
        here = float(values[0])
        if moments:
            time_ns, here, moving = moments[-1]
            if moving and planned is not None:
                here += (planned[1] - here) * (came_ns - time_ns) / (planned[0] - time_ns)
        moments.append((came_ns, here, True))
        points = zip((came_ns + offset_ns).tolist(), values.tolist(), strict=True)
        moments += [(time_ns, value, True) for time_ns, value in points]
        moments[-1] = (*moments[-1][:2], False)
    time_ns, value, moving = zip(*moments, strict=True)
    message_ns = np.array([came_ns for came_ns, _, _ in trajectories], np.int64)
    return Commands(np.array(time_ns, np.int64), np.array(value), np.array(moving), message_ns)


def delay_s(
    commanded: Sequence[tuple[np.ndarray, np.ndarray]], measured: Sequence[tuple[np.ndarray, np.ndarray]]
) -> float | None:
    """By how much measured numbers lag the commanded ones: where their speeds correlate best; None where none moves.

    It is looked for up to a third of their length.

    Args:
        commanded: (times in ns, values) of each number, in time order; between them the line counts.
        measured: the same of the same numbers.
    """
    begin = max(times[0] for times, _ in (*commanded, *measured))
    end = min(times[-1] for times, _ in (*commanded, *measured))
    grid = np.arange(0, (end - begin) / 1e9, DELAY_STEP_S)
    asked, done = (
        np.array([np.diff(np.interp(grid, (times - begin) / 1e9, values)) for times, values in numbers])
        for numbers in (commanded, measured)
    )
    lags = np.arange(round(LEAST_DELAY_S / DELAY_STEP_S), round(MOST_DELAY_S / DELAY_STEP_S) + 1)
    lags = lags[np.abs(lags) <= asked.shape[1] // 3]  # most of a short recording must meet itself
    score = np.zeros(len(lags))
    for i, lag in enumerate(lags):
        a, b = asked[:, max(0, -lag) : asked.shape[1] - max(0, lag)], done[:, max(0, lag) : done.shape[1] + min(0, lag)]
        a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
        norm = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
        score[i] = ((a * b).sum(axis=1) / np.where(norm > 0, norm, 1.0)).sum()
    best = int(score.argmax())
    if score[best] <= 0:
        return None
    shift = 0.0
    if 0 < best < len(lags) - 1:  # the top of a parabola through three of them
        left, top, right = score[best - 1 : best + 2]
        shift = (left - right) / (2 * (left - 2 * top + right)) if left + right < 2 * top else 0.0
    return round(float(lags[best] + shift) * DELAY_STEP_S, 4)
