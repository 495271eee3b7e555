"""However a run fails, it ends: no process is left, no other rank waits, and the output directory is free again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import train
from lerobot_checkpoint import list_checkpoints
from tests.tiny import ROOT, arguments, error_line, metrics, run, start, torchrun, wait_for_step, weights
from training.failures import print_error

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
    collective: it was told (claim_failure), and does not say that a rank is lost. CUDA faults take this path."""
    launcher = torchrun(2) if ranks == 2 else (sys.executable,)
    code, stderr = fail("nobody foresaw it", sample_bags, tmp_path, launcher, training__num_workers=workers)
    assert code == 1
    assert stderr.count("LookupError: nobody foresaw it") == 1 and "error: rank" not in stderr, stderr
    run(sample_bags, tmp_path, "--resume", training__steps=2, **NO_VALIDATION)  # nobody holds the output directory


def test_a_full_disk_at_the_last_save_ends_the_run(sample_bags: Path, tmp_path: Path):
    """In one line, although loader processes have work for ever."""
    settings = {"training__num_workers": 2, "training__save_freq": 100}
    code, stderr = fail("full disk", sample_bags, tmp_path, (sys.executable,), **settings)
    assert code == 1 and "No space left on device" in stderr and "Traceback" not in stderr, stderr
    assert list_checkpoints(tmp_path / "run") == []
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 6


def test_a_signal_after_an_error_does_not_hide_it(tmp_path: Path, monkeypatch, capsys):
    """torchrun's SIGTERM reaches a rank that is about to say what is wrong: it says it, and exits with 1."""
    original = train.print_error
    monkeypatch.setattr(train, "print_error", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or original(*a))
    assert train.main(arguments(tmp_path / "nowhere", tmp_path)) == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("log_freq", [1, 100])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(
    sample_bags: Path, tmp_path, capsys, monkeypatch, log_freq
):
    """Exit 1 with the step, the batch's episodes and frames, and the last good checkpoint, which is intact."""
    original, calls = train.loss_terms, []

    def sick(*args):
        calls.append(None)
        l1_sum, n_valid, kl_sum = original(*args)
        return (l1_sum * float("nan") if len(calls) == 5 else l1_sum), n_valid, kl_sum

    trainers, original_fit = [], train.Trainer.fit
    saved = {"training__save_freq": 4, "training__log_freq": log_freq, "training__val_fraction": 0}
    with monkeypatch.context() as patch:
        patch.setattr(train, "loss_terms", sick)
        patch.setattr(train.Trainer, "fit", lambda self: (trainers.append(self), original_fit(self)))
        assert train.main(arguments(sample_bags, tmp_path, training__steps=20, **saved)) == 1
    error = capsys.readouterr().err
    assert "step 5" in error and "frame" in error and "checkpoint_000004" in error and "episode_" in error
    assert len(calls) <= 6, "read one step late, not later"
    logged = [m["step"] for m in metrics(tmp_path / "run")] if log_freq == 1 else []
    assert logged == ([1, 2, 3, 4] if log_freq == 1 else []), "a sick step is not logged"
    in_memory, on_disk = trainers[0].model.state_dict(), weights(tmp_path / "run")
    assert all(torch.equal(in_memory[name], on_disk[name]) for name in on_disk), "a step was taken after step 4"


def test_the_named_batch_is_the_batch_that_was_sick(sample_bags: Path, tmp_path: Path, capsys, monkeypatch):
    """The frames in the message are those that the loader served in that step."""
    served, original = [], train.Trainer.train_step

    def spoiled(self, raw):
        served.append([self.dataset.locate(int(i)) for i in raw["index"]])
        if len(served) == 3:
            raw = raw | {"observation.state": raw["observation.state"] * float("inf")}
        return original(self, raw)

    monkeypatch.setattr(train.Trainer, "train_step", spoiled)
    assert train.main(arguments(sample_bags, tmp_path, training__log_freq=100, training__save_freq=100)) == 1
    error = capsys.readouterr().err
    assert "step 3:" in error
    assert ", ".join(f"{episode} frame {frame}" for episode, frame in served[2]) in error


def test_an_error_stands_in_a_line_of_its_own_below_a_progress_bar(capsys: pytest.CaptureFixture):
    """...that is still open, wherever the error came from."""
    with tqdm(total=3, file=sys.stderr):
        print_error("this went wrong", None)
        assert "error: this went wrong" in capsys.readouterr().err.replace("\r", "\n").splitlines()


def test_a_killed_loader_worker_is_one_line_not_a_hang(sample_bags: Path, tmp_path: Path):
    """Out of memory kills a worker with SIGKILL; the message says what to lower."""
    process = start(sample_bags, tmp_path, training__steps=5000, training__log_freq=1, training__num_workers=1)
    wait_for_step(tmp_path / "run", 2, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (worker,) = [c for c in children if "train.py" in Path(f"/proc/{c}/cmdline").read_text()]
    subprocess.run(["kill", "-9", worker], check=True)
    stdout, stderr = process.communicate(timeout=60)
    result = subprocess.CompletedProcess([], process.returncode, stdout, stderr)
    assert "num_workers" in error_line(result)
