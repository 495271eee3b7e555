"""metrics.jsonl holds whole lines only, whatever the disk does."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train
from tests.tiny import ROOT, arguments, metrics, run
from training.metrics import Journal, Pace, Watch, read_metrics

FULL_DISK = """
import resource, sys
from pathlib import Path
from training.metrics import append_line
path = Path(sys.argv[1])
path.write_text('{"step": 1}\\n')
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))  # as a full disk does: room for a part of the line, then none
for step in (2, 3):
    try:
        append_line(path, '{"step": %d, "loss": 0.5}' % step)
    except OSError as error:
        print(Path(error.filename).name, error.strerror)
"""


def test_a_line_that_the_disk_has_no_room_for_is_not_there_at_all(tmp_path: Path):
    """Half a line would be glued to the next one, and break whoever reads metrics.jsonl."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "metrics.jsonl")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 and all(line.startswith("metrics") for line in done.stdout.splitlines())
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_metrics_that_cannot_be_opened_stop_or_go_on_as_asked(sample_bags: Path, tmp_path: Path, capsys, monkeypatch):
    """on_save_error decides; what is lost is said, and what was torn before does not break the summary."""

    def gone(path: Path, line: str) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr("training.metrics.append_line", gone)
    run(sample_bags, tmp_path, training__on_save_error="continue")
    assert "metrics.jsonl: Stale file handle; step 2 is not in it" in capsys.readouterr().err
    assert train.main(arguments(sample_bags, tmp_path / "stop")) == 1
    assert "metrics.jsonl: Stale file handle; continue with --resume" in capsys.readouterr().err


def test_a_torn_line_of_metrics_is_passed_over(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n{"step": 2, "val_l1_loss": 3.0}\n'
    )
    training, validation = read_metrics(tmp_path / "metrics.jsonl")
    assert training == [{"step": 1, "loss": 2.0}] and validation == [{"step": 2, "val_l1_loss": 3.0}]


def test_the_wall_clock_counts_saving_and_validation(monkeypatch):
    """Ten steps in 2 s of training, 1 s of it waiting for data, and 3 s of saving: 5 steps a second, 2 by the clock."""
    now_s = [0.0]
    monkeypatch.setattr("training.metrics.time.perf_counter", lambda: now_s[0])
    pace = Pace()
    with pace.waiting():
        now_s[0] += 1
    now_s[0] += 1
    with pace.paused():
        now_s[0] += 3
    assert pace.read(10) == (5.0, 2.0, 0.5)
    pace.restart(10)
    now_s[0] += 1
    assert pace.read(14) == (4.0, 4.0, 0.0)


# -- a run that goes wrong ----------------------------------------------------------------------------------------


def told(l1=(), gradients=(), validations=()) -> list[str]:
    """What a watch says of training lines with these values, each with a validation beside it where there is one."""
    watch, notes = Watch(), []
    for i in range(max(len(l1), len(gradients))):
        loss, norm = (values[i] if values else 1.0 / (i + 1) for values in (l1, gradients))
        notes.append(watch.add({"step": i + 1, "loss": loss, "l1_loss": loss, "grad_norm": norm}))
        if validations:
            notes.append(watch.add({"step": i + 1, "val_l1_loss": validations[i]}))
    return [note for note in notes if note]


def test_a_gradient_that_runs_away_is_said_once():
    """A thousand times the median, not ten times; a second such line says nothing new."""
    (note,) = told(gradients=[2.0, 3.0, 20.0, 2.0, 2.6e3, 1e7])
    assert note.startswith("step 5: the gradient norm is 2.6e+03") and "lower training.lr" in note
    assert not told(gradients=[2.0, 3.0, 2.0, 1.9e3])


def test_a_loss_that_does_not_move_is_said():
    """After twenty lines around its first value; one that fell by more than a tenth for a while says nothing."""
    (note,) = told(l1=[0.80, *[0.79, 0.82] * 20])
    assert note.startswith("step 20: the loss has not moved: L1 was 0.800 at the start")
    assert not told(l1=[0.8] * 19) and not told(l1=[*[0.8] * 8, *[0.7] * 3, *[0.8] * 40])


def test_a_validation_that_parts_from_training_is_said():
    """Three times in a row half as much again as the best, while training goes on falling."""
    rising = [1.0, 0.5, 0.6, 0.8, 0.9, 1.0, 1.1]
    falling = [1.0, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    (note,) = told(l1=falling, validations=rising)
    assert note.startswith("step 6: L1 on held-out episodes is 1.000, up from 0.500 at step 2")
    assert not told(l1=[1.0, 0.7] + [0.8] * 5, validations=rising)  # both rise: no over-fitting
    assert not told(l1=falling, validations=[1.0, 0.5, 0.9, 0.6, 0.9, 0.6, 0.9])  # never three in a row


def test_a_resumed_run_does_not_say_it_again(tmp_path: Path):
    """The watch is fed with the lines that are there; those after the checkpoint are dropped, and counted no more."""
    said: list[str] = []
    path = tmp_path / "metrics.jsonl"

    def line(step: int, norm: float) -> dict:
        return {"step": step, "loss": 1.0, "l1_loss": 1.0, "grad_norm": norm}

    journal = Journal(path, 0, "stop", said.append)
    for step, norm in ((1, 1.0), (2, 1.0), (3, 1e5)):
        journal.append(line(step, norm))
    assert len(said) == 1 and said[0].startswith("warning: step 3: the gradient norm")
    Journal(path, 3, "stop", said.append).append(line(4, 1e6))
    assert len(said) == 1
    Journal(path, 2, "stop", said.append).append(line(3, 1e6))
    assert len(said) == 2 and len(path.read_text().splitlines()) == 3


def test_a_run_says_what_goes_wrong_and_how_little_it_sees(sample_bags: Path, tmp_path: Path, capsys):
    """At the start: too few passes over the data. In the end, in summary and summary.json: what was seen on the way."""
    output = run(
        sample_bags, tmp_path, training__log_freq=1, training__steps=24, training__lr=1e-12,
        training__lr_backbone=1e-12, training__save_freq=24, training__val_fraction=0, model__use_vae="false",
        training__batch_size=12,  # with two samples a step noise looks like progress
    )  # fmt: skip
    said = capsys.readouterr().out
    assert re.search(r"note: 24 steps are 0\.\d passes over the data, 288 samples", said)
    (note,) = json.loads((output / "summary.json").read_text())["warnings"]
    assert "the loss has not moved" in note and f"warning: {note}" in said and f"  warning     {note}" in said


def test_a_line_is_the_mean_of_the_steps_since_the_last_one(sample_bags: Path, tmp_path: Path):
    """The same run, logged at every step and at every third: losses and gradient norm are means over the three."""
    every, third = (metrics(run(sample_bags, tmp_path / str(n), training__log_freq=n)) for n in (1, 3))
    assert [line["step"] for line in third] == [3, 6]
    for i, line in enumerate(third):
        for name in ("loss", "l1_loss", "kl_loss", "grad_norm"):
            assert line[name] == pytest.approx(sum(one[name] for one in every[3 * i : 3 * i + 3]) / 3, rel=1e-5), name
