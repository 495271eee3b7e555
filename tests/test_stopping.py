"""Stopped by a signal: finish the step, save, exit 75; never a hang, never a traceback."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lerobot_checkpoint
import train
from lerobot_checkpoint import load_training_state
from tests.once import once
from tests.tiny import ROOT, arguments, assert_same_run, metrics, run, run_process, start, wait_for_step
from training.run_dir import STOP_MARKER

LONG = {"training__steps": 40, "training__log_freq": 1, "training__save_freq": 1000}


@pytest.fixture(scope="session")
def unbroken(sample_bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What LONG leaves, never stopped; read-only for the tests."""
    return once(tmp_path_factory, "stopping-unbroken", lambda folder: run(sample_bags, folder, **LONG)) / "run"


def test_a_stop_that_comes_out_of_c_code_as_another_error_is_still_a_stop(tmp_path: Path, monkeypatch, capsys):
    """Before the first step a signal raises; torch's C code can turn what its callbacks raise into something else."""

    def load(*_):
        try:
            signal.raise_signal(signal.SIGTERM)
        except train.Stopped:
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'") from None

    monkeypatch.setattr(train, "Trainer", load)
    assert train.main(arguments(tmp_path, tmp_path)) == 75
    error = capsys.readouterr().err
    assert error == "stopped by SIGTERM before the first step; start again with the same command\n"
    assert (tmp_path / "run" / STOP_MARKER).exists()


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 2)])
def test_a_signal_saves_and_exits_75_and_the_run_continues_exactly(
    unbroken: Path, sample_bags: Path, tmp_path: Path, number: signal.Signals, workers: int
):
    """SIGTERM and Ctrl-C: finish the step, save, exit 75, leave a marker; resumed, it is the unbroken run."""
    process = start(sample_bags, tmp_path, **LONG, training__num_workers=workers)
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "Traceback" not in stderr and f"stopped by {number.name} at step" in stderr
    output = tmp_path / "run"
    saved, logged = load_training_state(output / "last")["step"], metrics(output)[-1]["step"]
    assert saved == logged < 40
    marker = json.loads((output / "stopped.json").read_text())
    assert marker["exit_code"] == 75 and f"{number.name} at step {saved};" in marker["stopped by"]
    run(sample_bags, tmp_path, "--resume", **LONG)
    assert not (output / "stopped.json").exists()
    assert_same_run(output, unbroken)


def test_a_second_signal_ends_at_once(sample_bags: Path, tmp_path: Path):
    """The first asks, a Ctrl-C after it insists: no save, death by that very signal."""
    process = start(sample_bags, tmp_path, training__steps=1000, training__log_freq=1)
    wait_for_step(tmp_path / "run", 1, process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGINT, 75)  # 75 if the step ended between the two


def test_sigterms_within_seconds_are_one_request(sample_bags: Path, tmp_path: Path):
    """A scheduler signals the whole process group, torchrun passes its own on: the save is not lost to the second."""
    process = start(sample_bags, tmp_path, training__steps=1000, training__log_freq=1, training__save_freq=1000)
    wait_for_step(tmp_path / "run", 1, process)
    for _ in range(20):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    process.communicate(timeout=30)
    assert process.returncode == 75
    lerobot_checkpoint.verify_checkpoint(tmp_path / "run/last")


def test_a_signal_while_bags_are_decoded_exits_75_at_once(sample_bags: Path, tmp_path: Path):
    """Nothing to save yet: no waiting for the conversion; finished entries stay, half-made ones do not.

    There are more bags than the decoding processes take at once: some are decoded, some being decoded, some queued,
    some not even that. And the processes are slow to die, as on a busy disk: here because they are frozen meanwhile.
    """
    for i in range(2):
        shutil.copytree(sample_bags, tmp_path / "bags" / str(i))
    cache = tmp_path / "cache"
    slow = {"data__cache_dir": cache, "conventions__image_resize": "[240, 320]"}
    process = start(tmp_path / "bags", tmp_path, **slow)
    deadline = time.monotonic() + 60
    while len(finished := list(cache.glob("[!.]*/meta.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    subprocess.run(["kill", "-STOP", *children], check=True)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    subprocess.run(["kill", "-CONT", *children], check=False)  # where the signal ended them at once, they are gone
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 75, stderr
    assert "before the first step" in stderr and "Traceback" not in stderr
    assert json.loads((tmp_path / "run/stopped.json").read_text())["exit_code"] == 75
    assert all(path.exists() for path in finished)
    run(sample_bags, tmp_path, "--resume", training__steps=1, data__cache_dir=cache)
    assert not list(cache.glob(".*")), "leftovers of the killed conversion"


STOPPED_IN_WAIT = """
import concurrent.futures, os, signal, sys, train
Future = concurrent.futures.Future
def add_done_callback(self, callback):
    self._condition.acquire()
    if not sent:
        sent.append(os.kill(os.getpid(), signal.SIGTERM))
    self._condition.release()
    add(self, callback)
sent, add, Future.add_done_callback = [], Future.add_done_callback, add_done_callback
sys.exit(train.main(sys.argv[2:]))
"""


def test_a_signal_while_the_pool_holds_its_locks(sample_bags: Path, tmp_path: Path):
    """It is answered once they are free again: raised in between, the pool's thread would wait for them for ever."""
    (tmp_path / "probe.py").write_text(STOPPED_IN_WAIT)
    done = run_process(
        sample_bags, tmp_path, launcher=(sys.executable, str(tmp_path / "probe.py")), env={"PYTHONPATH": str(ROOT)},
        data__cache_dir=tmp_path / "cache",
    )  # fmt: skip
    assert done.returncode == 75 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("stopped by SIGTERM before the first step") == 1
