"""Every error as one line, and the one rank that prints it."""

from __future__ import annotations

import re
import sys
import time

import torch
from tqdm import tqdm

from lerobot_checkpoint import CheckpointError
from rosbag_dataset import BagError

from .errors import ConfigError, TrainingError
from .ranks import World


def explain(error: Exception, world: World | None) -> str | None:
    """What to print for an error, in one line; None for one that nobody foresaw, which deserves its traceback.

    When a collective failed because another rank is gone, this waits two seconds first: that rank may still be able
    to say why, and then prints the run's line.
    """
    if isinstance(error, (ConfigError, BagError, CheckpointError, TrainingError)):
        return said_by_worker(str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU is out of memory; lower training.batch_size or conventions.image_resize ({str(error):.100})"
    if isinstance(error, OSError):
        return f"{error.filename or 'writing the run'}: {error.strerror or error}; continue with --resume"
    if not isinstance(error, RuntimeError):
        return None
    reason = " ".join(str(error).split())[:150]
    if "DataLoader worker" in reason:  # torch reports a killed worker from wherever the main thread happens to be
        return (
            f"a data loader process was killed, most likely for want of memory ({reason}); lower "
            "training.num_workers and continue with --resume"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"training.compile: true: torch.compile failed ({reason}); set training.compile to false"
    if world is not None and world.size > 1 and re.search("gloo|nccl|connection|peer", reason, re.I):
        time.sleep(2)
        return f"rank {world.rank}: {collective_fault(str(error))}"
    return None


def said_by_worker(text: str) -> str:
    """The message of an error, without the traceback that torch puts before that of one in a loader's process."""
    in_worker = re.match(r"Caught (\w+) in DataLoader worker process", text)
    return text.rpartition(f".{in_worker[1]}: ")[2].strip() if in_worker else text


def collective_fault(text: str) -> str:
    """What to say of a collective that failed with the message `text`, from torch's NCCLUtils.cpp or from gloo.

    Mostly another rank is gone. But some of NCCL's errors come from this machine: the same start would fail again.
    """
    words = " ".join(text.split())
    if re.search("ncclInvalid|ncclInternal|ncclUnhandledCuda|shared memory segment|No space left", text):
        return f"NCCL fails on this machine (... {words[-200:]}); NCCL_DEBUG=WARN says more"
    return f"another rank is gone (killed, or its node was lost); continue with --resume ({words[:150]})"


def claim_failure(world: World | None) -> bool:
    """Tell the other ranks that this one has failed, so that they end; -> whether no other rank was first."""
    return world is None or world.first_to_fail()


def print_error(line: str, world: World | None) -> None:
    """Print the run's one error line, if no other rank was first."""
    if claim_failure(world):
        above = "\n" if world is not None and world.size > 1 else ""  # rank 0's progress bar may stand in this line
        tqdm.write(f"{above}error: {line}", file=sys.stderr)  # and one of ours that is still open
        sys.stderr.flush()
