"""A run's output directory: one run at a time, what to resume from, what to replace.

What a checkpoint looks like is lerobot_checkpoint's business; what training does with it, train.py's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lerobot_checkpoint
from rosbag_dataset import NO_LOCKS

from .errors import ConfigError
from .metrics import METRICS

STOP_MARKER = "stopped.json"  # tells a stop from a failure to whoever called torchrun, which returns 1 for both
RUN_FILES = (METRICS, "sync_report.json", "summary.json", "summary.png", "last", "best", STOP_MARKER)

_output_lock: Any = None  # held until this process ends or trains elsewhere


def lock_output(output_dir: Path) -> None:
    """One run at a time in an output directory: a second would delete the save that the first has in flight.

    A POSIX lock: it dies with its process, and loader workers do not inherit it. Raises ConfigError.
    """
    global _output_lock
    _output_lock = (output_dir / ".lock").open("w")
    try:
        fcntl.lockf(_output_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"training.output_dir: {output_dir}: another process is training there now") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"warning: training.output_dir: {output_dir}: {error.strerror}; see to it that no other run uses it",
              file=sys.stderr)  # fmt: skip


def open_output(output_dir: Path, resume: str, overwrite: bool) -> Path | None:
    """Make the output directory ready (called on rank 0) and choose what to resume from.

    Args:
        output_dir: training.output_dir.
        resume: training.resume: auto, never, or the path of a checkpoint.
        overwrite: replace the run that is there; counts on the first start only, not when torchrun restarts.

    Returns:
        The checkpoint directory to continue from, or None for a fresh start.

    Raises:
        ConfigError: the directory holds a run and neither resuming nor overwriting was asked for, none of its
            checkpoints is whole, or it cannot be made.
        CheckpointError: the checkpoint that `resume` names is not whole.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as exc:
        raise ConfigError(f"training.output_dir: {output_dir}: cannot write there ({exc.strerror})") from None
    lock_output(output_dir)
    (output_dir / STOP_MARKER).unlink(missing_ok=True)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # torchrun runs the same command again
    for leftover in lerobot_checkpoint.clean_leftovers(output_dir):
        print(f"removed {leftover}, left by a save that was cut short")
    if overwrite and not restarted:
        for path in [*lerobot_checkpoint.list_checkpoints(output_dir), *(output_dir / name for name in RUN_FILES)]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        return None
    if resume != "never" or restarted:  # a run that is refused below is not touched
        lerobot_checkpoint.link_best(output_dir)  # a kill may have come between the two links
    if resume == "auto" or restarted:
        passed_over: list[str] = []
        newest = lerobot_checkpoint.newest_checkpoint(output_dir, on_bad=passed_over.append)
        for line in passed_over:
            print(f"passed over {line}")
        if newest is None and passed_over:  # starting over would write a new run over what may still be saved
            raise ConfigError(
                f"training.output_dir: {output_dir} holds {len(passed_over)} checkpoints, and none of them is whole "
                f"({passed_over[0]}); put one in order, or replace the run with --overwrite"
            )
        if newest is not None or resume in ("auto", "never"):
            return newest
    checkpoints = lerobot_checkpoint.list_checkpoints(output_dir)
    checkpoint = None if resume == "never" else Path(resume).resolve()
    if checkpoint is not None:
        lerobot_checkpoint.verify_checkpoint(checkpoint)
        newer = [c.name for c in checkpoints if c.name > checkpoint.name]
        if newer:
            raise ConfigError(
                f"training.output_dir: {output_dir} holds newer checkpoints ({newer[-1]}) than training.resume "
                f"{checkpoint.name}; set another training.output_dir, or delete them"
            )
        if checkpoint.parent == output_dir.resolve():
            return checkpoint
    if checkpoints or (output_dir / METRICS).exists():
        raise ConfigError(
            f"training.output_dir: {output_dir} already holds a run; continue it with --resume, replace it with "
            "--overwrite, or set another training.output_dir"
        )
    return checkpoint


def score_late(output_dir: Path, checkpoint: Path, score: float | None) -> None:
    """Give a checkpoint of this run the score that a stop left no time for.

    A checkpoint of another run, which this one started from, stays as it is.
    """
    if score is not None and checkpoint.parent.resolve() == output_dir.resolve():
        lerobot_checkpoint.set_score(checkpoint, score)
        lerobot_checkpoint.link_best(output_dir)


def score_old_best(output_dir: Path, state: Mapping[str, Any]) -> None:
    """Take over the best checkpoint of a run that began before checkpoints had scores.

    `best` points at it, and its L1 stands in the training state.
    """
    best = output_dir / "best"
    if math.isfinite(state.get("best_l1", math.inf)) and best.exists() and lerobot_checkpoint.score_of(best) is None:
        lerobot_checkpoint.set_score(best, state["best_l1"])


def mark_stopped(output_dir: Path, exit_code: int, reason: str) -> None:
    """Write STOP_MARKER after an orderly stop. Raises nothing: a full disk must not turn the stop into an error."""
    with contextlib.suppress(OSError):
        output_dir.mkdir(parents=True, exist_ok=True)
        marker = {"exit_code": exit_code, "stopped by": reason}
        (output_dir / STOP_MARKER).write_text(json.dumps(marker) + "\n")
