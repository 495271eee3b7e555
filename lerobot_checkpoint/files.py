"""Single files: turn content into bytes, read it back, hash it, flush it to disk.

This room exists so that an unreadable file is a CheckpointError that names it, wherever it is read.
Must not know: which files a checkpoint has, or what they mean.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from .errors import CheckpointError, first_line


def json_bytes(content: Any, name: str) -> bytes:
    """`content` as the bytes of a JSON file.

    Raises:
        CheckpointError: something in it is not plain JSON; the message begins with `name`, the file's name.
    """
    try:
        return (json.dumps(content, indent=2) + "\n").encode()
    except TypeError as error:
        raise CheckpointError(f"{name}: {error}; expected plain JSON values") from error


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
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable ({error.strerror or error})") from error
    return digest.hexdigest()


def flush_directory(path: Path) -> None:
    """Make renames and new names in `path` survive a power cut (fsync).

    Without it a rename may reach the disk before what was renamed, or not at all.

    Raises:
        OSError: the caller knows what it was writing, and says so in a CheckpointError.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
