"""Saving: a checkpoint is there whole or not at all, and training goes on while it is written.

It is written under a temporary name, flushed to disk and renamed; only then does `last` move. CheckpointSaver does
this in a thread, on copies, so that the optimizer may take its next steps meanwhile.
Must not know: LeRobot's formats, or what becomes of a checkpoint afterwards.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from act_model import ACTConfig

from .directory import link_best, move_into_place, point_link, prune
from .errors import CheckpointError
from .files import Content, file_sha256, flush, json_content
from .layout import MANIFEST_FILE, PRETRAINED_DIR, SCORE, TRAINING_DIR, TRAINING_STATE_FILE, checkpoint_name
from .lerobot_writing import pretrained_files
from .normalisation import Stats, checked_stats, stats_shapes
from .training_state import training_state_content


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    *,
    model_state: Mapping[str, Tensor],
    act_config: ACTConfig,
    image_shapes: Mapping[str, tuple[int, int]],
    stats: Stats,
    policy_fields: Mapping[str, Any],
    train_config: Mapping[str, Any],
    training_state: Mapping[str, Any],
    score: float | None = None,
    total_steps: int | None = None,
) -> Path:
    """Write OUTPUT_DIR/checkpoint_<step>, then point `last` at it; -> its path.

    An existing checkpoint of the same step is replaced.

    Args:
        output_dir: made if it is not there.
        step: optimizer steps taken so far.
        model_state: the bare ACT's state dict, on any device, in any memory format; stored as float32.
        act_config: the network's shape.
        image_shapes: camera -> (H, W) in pixels of its images when they reach the model.
        stats: mean and std of every feature, float32 (see Stats).
        policy_fields: a value for each of POLICY_FIELDS.
        train_config: the content of train_config.json, plain JSON values.
        training_state: nested dicts, lists and tuples of tensors and plain Python values.
        score: what best_checkpoint compares, the lower the better; None if this one was not scored.
        total_steps: the run's length; only decides how many digits the name has.

    Raises:
        CheckpointError: the contents do not fit each other or could not be read back, or the disk refuses. The
            checkpoints and links that were there are as they were. Only if `last` alone cannot be moved, the new
            checkpoint is there and complete.
    """
    output_dir = Path(output_dir)
    final = output_dir / checkpoint_name(step, total_steps)
    temporary = output_dir / f".tmp-{final.name}-{os.getpid()}"

    # All contents first: what is wrong with them is known before the disk is touched.
    stats = checked_stats(stats, stats_shapes(act_config), "stats")
    pretrained = pretrained_files(model_state, act_config, image_shapes, stats, policy_fields, train_config)
    contents: dict[str, Content] = {f"{PRETRAINED_DIR}/{n}": c for n, c in pretrained.items()}
    contents[TRAINING_STATE_FILE] = training_state_content(training_state)

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if temporary.exists():  # left by a killed run with the same process id, as is usual in containers
            shutil.rmtree(temporary)
        for folder in (PRETRAINED_DIR, TRAINING_DIR):
            (temporary / folder).mkdir(parents=True)
        for name, write in contents.items():
            write(temporary / name)
        files = {name: temporary / name for name in contents}
        listing = {n: dict(bytes=file.stat().st_size, sha256=file_sha256(file)) for n, file in files.items()}
        json_content({"step": step, SCORE: score, "files": listing}, MANIFEST_FILE)(temporary / MANIFEST_FILE)
        for written in (*contents, MANIFEST_FILE, PRETRAINED_DIR, TRAINING_DIR, "."):
            flush(temporary / written)
        move_into_place(temporary, final)
    except OSError as error:
        size = size_bytes([model_state, training_state]) / 2**20
        raise CheckpointError(
            f"{final}: not written ({error.strerror or error}); it needs {size:.0f} MiB; "
            "make room or choose another output directory; earlier checkpoints are untouched"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    point_link(output_dir, "last", final)
    return final


class CheckpointSaver:
    """Saves in the background, one checkpoint at a time: training stops only for as long as copying takes.

    The copies' memory is kept for the next save: 620 MB with the default model and AdamW.

    A thread's errors would be lost, so they are kept for check() and wait(), one of which has to be called now and
    then, and wait() at the end.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._copies: Any = None  # of what was saved last; the next ones are made in the same memory

    def submit(
        self,
        output_dir: str | Path,
        step: int,
        *,
        keep: int | None = None,
        on_error: str = "stop",
        **contents: Any,
    ) -> None:
        """Copy `contents` and save them while the caller goes on; then point `best` at the lowest score that is there.

        Waits first for a save that is still under way.

        Args:
            output_dir: as in save_checkpoint.
            step: as in save_checkpoint.
            keep: then prune all but so many checkpoints (see prune); None keeps all.
            on_error: "stop": the next check() or wait() raises it; "continue": a CheckpointError is only printed.
            **contents: the other arguments of save_checkpoint.

        Raises:
            Exception: the error of an earlier save.
        """
        self.wait()
        copied = self._copies = host_copy(contents, self._copies)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

        def save() -> None:
            try:
                save_checkpoint(output_dir, step, **copied)
                link_best(output_dir)
                if keep is not None:
                    prune(output_dir, keep)
            except Exception as error:  # a thread's error is lost unless it is kept
                if isinstance(error, CheckpointError) and on_error == "continue":
                    print(f"warning: {error}; training goes on without this checkpoint", file=sys.stderr, flush=True)
                else:
                    self._error = error

        self._thread = threading.Thread(target=save, name=f"save-{step}")
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise the error of a save that has failed, once; never waits."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def settle(self, timeout_s: float) -> None:
        """Wait for the save under way, at most `timeout_s` seconds, and raise nothing; from any thread.

        For a run that is about to end with an error of its own: what was trained should still reach the disk.
        """
        if (thread := self._thread) is not None:
            thread.join(timeout_s)

    def wait(self) -> None:
        """Wait for the save under way, then check()."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()


def host_copy(value: Any, into: Any = None) -> Any:
    """The same nested dicts, lists and tuples, with every tensor copied to CPU memory of its own.

    Tensors of an earlier copy, `into`, are written over where they are alike: fresh memory costs several times what
    copying does. From a GPU they are still on their way when this returns.
    """
    if isinstance(value, Tensor):
        if not (isinstance(into, Tensor) and _layout(into) == _layout(value)):
            into = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return into.copy_(value.detach(), non_blocking=value.is_cuda)
    if isinstance(value, Mapping):
        earlier = into if isinstance(into, dict) else {}
        return {key: host_copy(item, earlier.get(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        earlier = into if isinstance(into, (list, tuple)) and len(into) == len(value) else [None] * len(value)
        return type(value)(map(host_copy, value, earlier))
    return value


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride()


def size_bytes(value: Any) -> int:
    """What the tensors in nested dicts, lists and tuples take."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(size_bytes, value.values()))
    return sum(map(size_bytes, value)) if isinstance(value, (list, tuple)) else 0
