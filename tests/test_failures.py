"""However a run fails, it ends: no process is left, no other rank waits, and the output directory is free again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lerobot_checkpoint import list_checkpoints
from tests.tiny import ROOT, arguments, run, torchrun

# Runs train.py, and in step 3 does on some rank what `fault` says.
PROBE = """
import errno, os, sys, lerobot_checkpoint.saving, train
fault, *argv = sys.argv[1:]
original, calls = train.loss_terms, []
def loss_terms(*args):
    calls.append(None)
    if len(calls) == 3 and os.environ.get("RANK", "0") == "0" and fault == "nobody foresaw it":
        raise LookupError("nobody foresaw it")
    return original(*args)
train.loss_terms = loss_terms
def full(*paths):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
if fault == "full disk":
    lerobot_checkpoint.saving.move_into_place = full
sys.exit(train.main(argv))
"""
NO_VALIDATION = {"training__val_fraction": 0}


def fail(fault: str, bags: Path, folder: Path, launcher: tuple[str, ...], **overrides: object) -> tuple[int, str]:
    """-> exit code and stderr of a run that fails; fails the test when anything of it is left after a minute."""
    (folder / "probe.py").write_text(PROBE)
    command = [*launcher, str(folder / "probe.py"), fault, *arguments(bags, folder, **NO_VALIDATION, **overrides)]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, stderr = process.communicate(timeout=60)  # until the last process that holds stderr has ended
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        pytest.fail("still running after a minute")
    return process.returncode, stderr


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_error_that_nobody_foresaw_ends_the_run(sample_bags: Path, tmp_path: Path, ranks: int, workers: int):
    """With its traceback, once; loader processes end with it, and so does the other rank, which waits in a
    collective. CUDA faults take this path."""
    launcher = torchrun(2) if ranks == 2 else (sys.executable,)
    code, stderr = fail("nobody foresaw it", sample_bags, tmp_path, launcher, training__num_workers=workers)
    assert code == 1
    assert stderr.count("LookupError: nobody foresaw it") == 1, stderr
    run(sample_bags, tmp_path, "--resume", training__steps=2, **NO_VALIDATION)  # nobody holds the output directory


def test_a_full_disk_at_the_last_save_ends_the_run(sample_bags: Path, tmp_path: Path):
    """In one line, although loader processes have work for ever."""
    settings = {"training__num_workers": 2, "training__save_freq": 100}
    code, stderr = fail("full disk", sample_bags, tmp_path, (sys.executable,), **settings)
    assert code == 1 and "No space left on device" in stderr and "Traceback" not in stderr, stderr
    assert list_checkpoints(tmp_path / "run") == []
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 6
