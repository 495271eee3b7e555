"""How a device computes may change rounding, and says so: bfloat16, torch.compile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor.config

import train
from lerobot_checkpoint import load_training_state
from tests.test_augment import AUGMENTED
from tests.tiny import ROOT, arguments, assert_same_run, metrics, run, trainer, weights
from training import device

BF16 = {"training__precision": "bf16"}


PLAIN = {"model__dropout": 0, "model__use_vae": "false", "training__log_freq": 1}


def test_bf16_follows_fp32_and_keeps_weights_and_optimizer_in_fp32(sample_bags: Path, tmp_path: Path, capsys):
    """The same samples, the same noise: losses within 2 %, and not equal, or nothing ran in bfloat16."""
    full = run(sample_bags, tmp_path / "fp32", training__log_freq=1)
    half = run(sample_bags, tmp_path / "bf16", **BF16, training__log_freq=1)
    ours, theirs = ([m["loss"] for m in metrics(d)] for d in (half, full))
    assert ours == pytest.approx(theirs, rel=0.02) and ours != theirs
    assert all(w.dtype in (torch.float32, torch.int64) for w in weights(half).values())
    state = load_training_state(half / "last")
    assert all(v.dtype == torch.float32 for s in state["optimizer"]["state"].values() for v in s.values())
    assert state["environment"]["precision"] == "bfloat16"
    assert "on cpu in bfloat16" in capsys.readouterr().out


def test_bf16_and_augmented_runs_resume_bit_for_bit(sample_bags: Path, tmp_path: Path):
    settings = {**BF16, **AUGMENTED, "training__log_freq": 1}
    unbroken = run(sample_bags, tmp_path / "a", **settings)
    run(sample_bags, tmp_path / "b", **settings, training__steps=3)
    assert_same_run(run(sample_bags, tmp_path / "b", "--resume", **settings), unbroken)


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_where_the_hardware_computes_it(fast, dtype, monkeypatch):
    told = {"avx512_bf16": fast, "avx512_f": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)  # torch up to 2.10 has none
    assert device.choose_precision("auto", torch.device("cpu")) == dtype
    assert device.choose_precision("fp32", torch.device("cpu")) == torch.float32


def test_bf16_that_would_be_emulated_is_said(sample_bags: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(device, "has_fast_bf16", lambda device: False)
    trainer(sample_bags, tmp_path, **BF16)
    assert "it has no bfloat16 instructions; training.precision fp32 would be faster" in capsys.readouterr().out


def test_another_precision_on_resume_is_said(sample_bags: Path, tmp_path: Path, capsys):
    run(sample_bags, tmp_path, training__steps=2)
    run(sample_bags, tmp_path, "--resume", training__steps=3, **BF16)
    assert "not bit for bit" in (said := capsys.readouterr().out) and "precision (was float32, is bfloat16)" in said


def test_compiled_training_follows_the_uncompiled_one(sample_bags: Path, tmp_path: Path):
    """Dropout and VAE off: the same losses within 1e-4, and a checkpoint with the same names."""
    usual = run(sample_bags, tmp_path / "usual", **PLAIN, training__steps=3)
    compiled = run(sample_bags, tmp_path / "compiled", **PLAIN, training__steps=3, training__compile="true")
    ours, theirs = ([m["loss"] for m in metrics(d)] for d in (compiled, usual))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert list(weights(compiled)) == list(weights(usual))
    assert load_training_state(compiled / "last")["environment"]["compiled"]


def test_a_missing_compiler_is_one_line(sample_bags: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert train.main(arguments(sample_bags, tmp_path, training__compile="true")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "training.compile: true needs a C++ compiler, and no-such-compiler is not on the PATH" in error


def test_a_compiler_that_fails_is_one_line(sample_bags: Path, tmp_path: Path, monkeypatch, capsys):
    """A real failure of a real compiler; of a one-line function, because ACT takes torch.compile a minute."""
    (broken := tmp_path / "c++").write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (str(broken),))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    tiny = torch.compile(lambda x: x.sin() + 1)
    monkeypatch.setattr(train.ACT, "compile", lambda self: None)
    monkeypatch.setattr(train.ACT, "forward", lambda self, batch: tiny(batch["observation.state"]))
    assert train.main(arguments(sample_bags, tmp_path, training__compile="true")) == 1
    assert "error: training.compile: true: torch.compile failed (" in capsys.readouterr().err


FREED = """
import ctypes
from training import device

class Info(ctypes.Structure):  # mallinfo(3)
    _fields_ = [(name, ctypes.c_int) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo.restype, libc.malloc.restype, libc.free.argtypes = Info, ctypes.c_void_p, [ctypes.c_void_p]
device.keep_freed_memory()
before = libc.mallinfo().arena
for block in [libc.malloc(2**23) for _ in range(10)]:  # and nothing after them that would hold them there
    libc.free(block)
print(libc.mallinfo().arena - before)
"""


def test_a_step_finds_the_memory_that_the_last_one_freed():
    """What was freed is still the process's: by its own account of the memory that it has from the system."""
    command = [sys.executable, "-c", FREED]
    kept = int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    assert kept >= 9 * 2**23  # the first may lie in what was there
