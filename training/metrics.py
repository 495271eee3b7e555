"""metrics.jsonl, one JSON object a line, what it says of a run that goes wrong, and the pace that is logged in it.

Training lines have `loss`, validation lines `val_l1_loss`; both have `step`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, whole or, on a disk that is full, not at all.

    Raises:
        OSError: the line was not written; the error names the file.
    """
    content = f"{line}\n".encode()
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(content) < len(content):  # as much as there was room for
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise OSError(error.errno, error.strerror, str(path)) from None


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, which the resumed run writes again, and a line cut short by a kill; atomic."""
    if not path.exists():
        return
    kept = [line for line in metrics_lines(path) if line["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(partial, path)


def metrics_lines(path: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds, but for a line that was cut short by a kill or a full disk."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """-> (training lines, validation lines) of metrics.jsonl."""
    lines = metrics_lines(path)
    return [line for line in lines if "loss" in line], [line for line in lines if "val_l1_loss" in line]


# A gradient norm of so many times its median so far is no noise: a run that diverges, and does not come back.
RUNAWAY_GRADIENT = 1_000
# Lines before anything is said of the loss, and the part of its first value (medians of five lines) below which it has
# moved.
LINES_TO_JUDGE, MOVED = 20, 0.9
# Validations in a row that were worse than the best one by this factor while training's L1 fell.
DIVERGING_VALIDATIONS, DIVERGED = 3, 1.5


class Watch:
    """Sees in the lines of metrics.jsonl that training goes wrong, and says each thing once."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._gradients: list[float] = []
        self._l1: list[float] = []
        self._moved = False
        self._best: dict[str, Any] = {}  # the best validation line, with training's L1 at that time
        self._worse = 0

    def add(self, line: dict[str, Any]) -> str | None:
        """Take in the next line; -> what to say of it, if anything."""
        kind, note = self._judge(line) or ("", None)
        if note is None or kind in self._said:
            return None
        self._said.add(kind)
        return f"step {line['step']}: {note}"

    def _judge(self, line: dict[str, Any]) -> tuple[str, str] | None:
        if "val_l1_loss" in line:
            return self._judge_validation(line["val_l1_loss"], line["step"])
        gradients, self._gradients = self._gradients, [*self._gradients, line["grad_norm"]]
        self._l1.append(line["l1_loss"])
        if gradients and line["grad_norm"] > RUNAWAY_GRADIENT * statistics.median(gradients):
            return "gradient", (
                f"the gradient norm is {line['grad_norm']:.3g}, {line['grad_norm'] / statistics.median(gradients):.0f} "
                "times its median so far: training diverges; lower training.lr and training.lr_backbone"
            )
        first, last = (statistics.median(lines) for lines in (self._l1[:5], self._l1[-5:]))
        self._moved |= last < MOVED * first
        if len(self._l1) >= LINES_TO_JUDGE and not self._moved:
            return "stuck", (
                f"the loss has not moved: L1 was {first:.3f} at the start and is {last:.3f}; "
                "try another training.lr, and look at the data with python -m rosbag_dataset"
            )
        return None

    def _judge_validation(self, l1: float, step: int) -> tuple[str, str] | None:
        training = self._l1[-1] if self._l1 else math.inf
        if not self._best or l1 < self._best["l1"]:
            self._best, self._worse = {"l1": l1, "step": step, "training": training}, 0
            return None
        self._worse = self._worse + 1 if l1 > DIVERGED * self._best["l1"] and training < self._best["training"] else 0
        if self._worse < DIVERGING_VALIDATIONS:
            return None
        return "validation", (
            f"L1 on held-out episodes is {l1:.3f}, up from {self._best['l1']:.3f} at step {self._best['step']}, while "
            "training's falls: it learns its episodes by heart; record more, or use `best`, which stays there"
        )


class Journal:
    """metrics.jsonl of a run that is under way, from `step` on: what comes after is dropped, and written again.

    Args:
        path: the file, which need not be there.
        step: the last one that counts.
        on_error: "continue" only prints a line that cannot be written; "stop" raises.
        say: called with a note when training goes wrong.
    """

    def __init__(self, path: Path, step: int, on_error: str, say: Callable[[str], object]) -> None:
        self._path, self._on_error, self._say, self._watch = path, on_error, say, Watch()
        cut_metrics(path, step)
        for line in metrics_lines(path):
            self._watch.add(line)

    def append(self, line: dict[str, Any]) -> None:
        """Write a line. Raises OSError, which names the file, unless `on_error` is "continue"."""
        if note := self._watch.add(line):
            self._say(f"warning: {note}")
        try:
            append_line(self._path, json.dumps(line))
        except OSError as error:
            if self._on_error == "stop":
                raise
            print(f"warning: {self._path}: {error.strerror}; step {line['step']} is not in it", file=sys.stderr)


class Pace:
    """How fast training goes since `restart`, and which part of that time it waits for data."""

    def __init__(self) -> None:
        self.restart(0)

    def restart(self, step: int) -> None:
        """Measure from here on, after `step` steps."""
        self._waited_s, self._paused_s, self._since_s, self._since_step = 0.0, 0.0, time.perf_counter(), step

    @contextlib.contextmanager
    def waiting(self) -> Generator[None]:
        """Time inside counts as waiting for data."""
        before_s = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - before_s

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """Time inside counts for the wall clock alone: neither validation nor saving is training speed."""
        before_s = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - before_s

    def read(self, step: int) -> tuple[float, float, float]:
        """-> (steps per second of training up to `step`, of the wall clock, share of training that waited for data)."""
        wall_s, steps = time.perf_counter() - self._since_s, step - self._since_step
        training_s = wall_s - self._paused_s
        return steps / training_s, steps / wall_s, self._waited_s / training_s
