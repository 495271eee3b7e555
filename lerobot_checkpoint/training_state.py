"""The file that a resumed run continues from: optimizer, step, random generators, ... as plain values and tensors.

It is read with torch.load(weights_only=True), so that a checkpoint from elsewhere cannot run code. What that would
refuse is therefore refused when it is saved, not weeks later when the run has to resume.
Must not know: what the entries mean; that is the training loop's business.
"""

from __future__ import annotations

import errno
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, first_line
from .files import Content, refusals
from .layout import TRAINING_STATE_FILE


def training_state_content(state: Mapping[str, Any]) -> Content:
    """The content of training_state.pt.

    Args:
        state: nested dicts, lists and tuples of tensors and of int, float, bool, str, bytes, None.

    Raises:
        CheckpointError: a value is of another type; the message says where it lies.
    """

    def check(value: Any, where: str) -> None:
        if type(value) in (dict, OrderedDict):
            for key, item in value.items():
                check(item, f"{where}[{key!r}]")
        elif type(value) in (list, tuple):
            for index, item in enumerate(value):
                check(item, f"{where}[{index}]")
        elif not isinstance(value, Tensor) and type(value) not in (int, float, bool, str, bytes, type(None)):
            raise CheckpointError(
                f"{TRAINING_STATE_FILE}: {where} is {type(value).__module__}.{type(value).__qualname__}; "
                "expected tensors and plain Python values, which load without running code; convert it"
            )

    check(state, "training_state")

    def write(path: Path) -> None:
        with refusals(path):
            torch.save(dict(state), path)
        # What closing the file could not write any more goes unnoticed by torch; the list of contents is at its end.
        if not zipfile.is_zipfile(path):
            raise OSError(errno.EIO, "it is cut short", str(path))

    return write


def load_training_state(checkpoint_dir: str | Path, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """The training_state that save_checkpoint was given, its tensors on `map_location`.

    The file is not compared with the manifest here: verify_checkpoint does that.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    path = Path(checkpoint_dir) / TRAINING_STATE_FILE
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch.load raises OSError, RuntimeError, EOFError, UnpicklingError, ...
        raise CheckpointError(f"{path}: unreadable ({first_line(error)}); resume from another checkpoint") from error
