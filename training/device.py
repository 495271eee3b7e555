"""How a device computes: in which precision, with which compiler, and how the host reads from it without waiting."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import sys
from typing import Any

import torch

from .errors import ConfigError


def choose(wanted: str, local_rank: int, under_torchrun: bool) -> torch.device:
    """`wanted` (auto, cuda, cpu or mps) as this rank's device; every rank has a GPU of its own.

    Raises:
        ConfigError: it is not there.
    """
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(d for d in ("cuda", "mps", "cpu") if has[d] and not (under_torchrun and d == "mps"))
    if not has[wanted]:
        there = ", ".join(d for d in has if has[d])
        raise ConfigError(f"training.device: {wanted} is not available here; found {there}")
    if wanted != "cuda":
        return torch.device(wanted)
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise ConfigError(f"local rank {local_rank} has no GPU: {gpus} on this machine; lower --nproc_per_node")
    return torch.device(wanted, local_rank)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device has bfloat16 instructions of its own: recent GPUs, and CPUs with AVX-512 BF16 or AMX.

    False on a CPU with torch 2.10 or older, which cannot tell what the CPU has.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """`wanted` (auto, bf16 or fp32) as a dtype: bfloat16 autocast, or float32 throughout."""
    if wanted == "auto":
        wanted = "bf16" if has_fast_bf16(device) else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]


def allow_tf32() -> None:
    """Let NVIDIA's tensor cores round the factors of float32 products to TF32, 10 bits of mantissa, in training.

    For what bfloat16 autocast leaves in float32, and for training.precision fp32: torch's own default is TF32 in
    convolutions and not in matrix products. Validation and the robot compute in full float32 (act_model.full_float32).
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


KEPT_BYTES = 2**30  # of freed memory, at the most
LARGEST_KEPT_BYTES = 32 * 2**20  # of a block; glibc takes no larger value


def keep_freed_memory() -> None:
    """Have the C library keep the memory that a step frees for the next one, instead of giving it back to the system.

    Else each step on a CPU gets its activations anew, in pages of 4 KB that the system first fills with zeros, which
    is a tenth of the step. See mallopt(3); done where the C library is glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and sys.platform == "linux":
        trim_threshold, mmap_threshold = -1, -3  # from malloc.h
        mallopt(trim_threshold, KEPT_BYTES)
        mallopt(mmap_threshold, LARGEST_KEPT_BYTES)


def describe(device: torch.device, precision: torch.dtype, compiled: bool) -> str:
    """Where and how the network computes, for people."""
    how = ""
    if device.type == "cuda" and precision == torch.float32:
        how = " (products in TF32)"
    if precision == torch.bfloat16 and not has_fast_bf16(device):
        how = " (it has no bfloat16 instructions; training.precision fp32 would be faster)"
    return f"{device} in {str(precision).removeprefix('torch.')}{how}{', compiled,' if compiled else ''}"


def check_compiler(compiled: str, device: torch.device) -> None:
    """Check that what training.compile `true` needs is there: compilers for C++ and Triton. Raises ConfigError."""
    if compiled != "true":
        return
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        raise ConfigError(
            f"training.compile: true needs a C++ compiler, and {compiler} is not on the PATH; "
            "install g++, set CXX, or set training.compile to false"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "training.compile: true needs the package triton on CUDA; install it, or set training.compile to false"
        )


class LateRead:
    """Read a small tensor of each step one step later, so that the host never waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: tuple[int, torch.Tensor, Any] | None = None

    def push(self, step: int, values: torch.Tensor) -> tuple[int, list[float]] | None:
        """Start reading this step's values; -> the previous step and its values."""
        previous = self.flush()
        if self._cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = (step, host, event)
        else:
            self._pending = (step, values, None)
        return previous

    def flush(self) -> tuple[int, list[float]] | None:
        """What is still to be read, waiting for it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        step, values, event = pending
        if event is not None:
            event.synchronize()
        return step, values.tolist()
