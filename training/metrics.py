"""metrics.jsonl, one JSON object a line, and the pace that is logged in it.

Training lines have `loss`, validation lines `val_l1_loss`; both have `step`. This room knows no other name in them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def append(path: Path, line: dict[str, Any], on_error: str) -> None:
    """Append a line to metrics.jsonl; with `on_error` "continue", a line that cannot be written is only printed.

    Raises:
        OSError: with `on_error` "stop".
    """
    try:
        append_line(path, json.dumps(line))
    except OSError as error:
        if on_error == "stop":
            raise
        print(f"warning: {path}: {error.strerror}; step {line['step']} is not in it", file=sys.stderr)


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
