"""Single files: write content, read it back, hash it, flush it to disk.

This room exists so that an unreadable file is a CheckpointError that names it, wherever it is read; and large files
are written by the libraries that know their formats, straight to the disk and without Python's lock, so that training
goes on meanwhile.
Must not know: which files a checkpoint has, or what they mean.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from .errors import CheckpointError, first_line

Content = Callable[[Path], None]  # writes a file; raises OSError where the disk refuses


def json_content(content: Any, name: str) -> Content:
    """A JSON file.

    Raises:
        CheckpointError: something in it is not plain JSON; the message begins with `name`, the file's name.
    """
    try:
        text = json.dumps(content, indent=2) + "\n"
    except TypeError as error:
        raise CheckpointError(f"{name}: {error}; expected plain JSON values") from error

    def write(path: Path) -> None:
        path.write_bytes(text.encode())

    return write


def tensors_content(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Content:
    """A safetensors file of contiguous tensors on the CPU, with `metadata` in its header."""

    def write(path: Path) -> None:
        path.touch()
        mode = path.stat().st_mode  # what new files get here; the library's can be read by their owner alone
        with refusals(path):
            safetensors.torch.save_file(tensors, path, metadata)
        path.chmod(mode)

    return write


@contextlib.contextmanager
def refusals(path: Path) -> Generator[None]:
    """Errors of the libraries that write `path`, as OSError; they hardly say that the disk is full."""
    try:
        yield
    except (RuntimeError, safetensors.SafetensorError) as error:
        full = shutil.disk_usage(path.parent).free < 2**20
        code = errno.ENOSPC if full else errno.EIO
        raise OSError(code, os.strerror(code) if full else first_line(error), str(path)) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: it is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; use a complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({first_line(error)}); use another checkpoint") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, on the CPU, with the shapes and dtypes that were stored.

    Raises:
        CheckpointError: it is missing, unreadable or not a safetensors file.
    """
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; use a complete checkpoint") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not readable as safetensors ({first_line(error)}); use another checkpoint"
        ) from error


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, 64 hexadecimal digits. Takes little memory, however large the file.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable ({error.strerror or error})") from error
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Make a file's content, or new names in a directory, survive a power cut (fsync).

    Without it a rename may reach the disk before what was renamed, or not at all.

    Raises:
        OSError: the caller knows what it was writing, and says so in a CheckpointError.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
