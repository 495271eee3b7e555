"""The output directory: one run at a time, nothing written over unasked, `best` where it belongs."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

import lerobot_checkpoint
import train
from lerobot_checkpoint import file_sha256, load_training_state, saving
from lerobot_checkpoint.layout import MANIFEST_FILE, TRAINING_STATE_FILE
from lerobot_checkpoint.training_state import training_state_content
from tests.tiny import arguments, error_line, metrics, run, run_process, start, wait_for_step


def test_an_output_directory_that_holds_a_run_is_refused(sample_bags: Path, tmp_path: Path, capsys):
    """Neither overwritten nor continued unless asked; --overwrite replaces, --resume with nothing there starts."""
    output = run(sample_bags, tmp_path, "--resume", training__steps=2)
    before = (output / "metrics.jsonl").read_text()
    assert train.main(arguments(sample_bags, tmp_path, training__steps=2)) == 1
    error = capsys.readouterr().err
    assert "already holds a run" in error and "--resume" in error and "--overwrite" in error
    assert (output / "metrics.jsonl").read_text() == before
    (output / "notes.txt").write_text("mine")
    run(sample_bags, tmp_path, "--overwrite", training__steps=1, training__log_freq=1)
    assert [m["step"] for m in metrics(output)] == [1]
    assert [p.name for p in sorted(output.glob("checkpoint_*"))] == ["checkpoint_000001"]
    assert (output / "notes.txt").read_text() == "mine", "--overwrite deletes only what a run makes"


def test_overwrite_counts_only_on_the_first_start(sample_bags: Path, tmp_path: Path, monkeypatch):
    """When torchrun restarts a worker it runs the same command again, which must not delete the run it restarts."""
    output = run(sample_bags, tmp_path, training__steps=3)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(sample_bags, tmp_path, "--overwrite", training__steps=6)
    assert [m["step"] for m in metrics(output)] == [2, 3, 4, 6]


def test_an_output_directory_that_cannot_be_written_is_one_line(sample_bags: Path, tmp_path: Path, capsys):
    """A file lies where the folder should be."""
    (tmp_path / "run").write_text("")
    assert train.main(arguments(sample_bags, tmp_path)) == 1
    assert "training.output_dir" in capsys.readouterr().err


def test_two_runs_in_one_output_directory_are_refused(sample_bags: Path, tmp_path: Path):
    """The second would delete the save that the first has in flight."""
    process = start(sample_bags, tmp_path, training__steps=5000, training__log_freq=1)
    try:
        wait_for_step(tmp_path / "run", 1, process)
        assert "another process is training there" in error_line(run_process(sample_bags, tmp_path, "--resume"))
    finally:
        process.kill()
        process.communicate()


def test_without_locks_it_is_said_and_trains(sample_bags: Path, tmp_path: Path, monkeypatch, capsys):
    """Some network disks have none (staged: none can be mounted here): one line, and training goes on."""

    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", no_locks)
    run(sample_bags, tmp_path, training__steps=1)
    assert "No locks available; see to it that no other run uses it" in capsys.readouterr().err


def test_no_whole_checkpoint_is_no_fresh_start(sample_bags: Path, tmp_path: Path, capsys):
    """Checkpoints that cannot be read, for example for a moment on a network disk, are not written over."""
    output = run(sample_bags, tmp_path)
    before = (output / "metrics.jsonl").read_bytes()
    for path in output.glob("checkpoint_*/training_state/training_state.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    assert train.main(arguments(sample_bags, tmp_path, ("--resume",))) == 1
    error = capsys.readouterr().err
    assert "holds 2 checkpoints, and none of them is whole" in error and "training_state.pt" in error, error
    assert (output / "metrics.jsonl").read_bytes() == before and (
        output / "last"
    ).readlink().name == "checkpoint_000006"


def test_best_is_found_again_after_a_kill_between_the_links(sample_bags: Path, tmp_path: Path):
    """`best` follows the scores in the checkpoints, wherever the link was left; it is not pruned meanwhile."""
    three = {"training__steps": 3, "training__save_freq": 1}
    output = run(sample_bags, tmp_path, **three)
    best = (output / "best").resolve()
    for wrong in lerobot_checkpoint.list_checkpoints(output):
        lerobot_checkpoint.point_link(output, "best", wrong)
        run(sample_bags, tmp_path, "--resume", **three)
        assert (output / "best").resolve() == best


def test_a_checkpoint_that_was_never_written_is_not_the_best(sample_bags: Path, tmp_path: Path, monkeypatch, capsys):
    """on_save_error: continue, and the disk refuses the step with the lowest L1: `best` is the lowest of those there,
    and is kept when others are pruned."""
    scores = {1: 0.5, 2: 0.4, 3: 0.1, 4: 0.45, 5: 0.6, 6: 0.7}
    monkeypatch.setattr(train.Trainer, "_validate", lambda self: scores[self.step])
    original = saving.move_into_place

    def full(temporary: Path, final: Path) -> None:
        if final.name == "checkpoint_000003":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(temporary, final)

    monkeypatch.setattr(saving, "move_into_place", full)
    settings = {"training__save_freq": 1, "training__keep_checkpoints": 1, "training__on_save_error": "continue"}
    output = run(sample_bags, tmp_path, **settings)
    assert "training goes on without this checkpoint" in capsys.readouterr().err
    assert (output / "best").readlink().name == "checkpoint_000002"
    assert [p.name for p in lerobot_checkpoint.list_checkpoints(output)] == ["checkpoint_000002", "checkpoint_000006"]


def test_a_run_from_before_scores_keeps_its_best(sample_bags: Path, tmp_path: Path):
    """Its checkpoints have no scores; `best` and the lowest L1 in the training state say which it was."""
    output = run(sample_bags, tmp_path, training__steps=4, training__save_freq=2)
    for checkpoint in lerobot_checkpoint.list_checkpoints(output):  # as they were
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
        del manifest["score"]
        state = load_training_state(checkpoint) | {"best_l1": 1e-6}
        training_state_content(state)(checkpoint / TRAINING_STATE_FILE)
        size = (checkpoint / TRAINING_STATE_FILE).stat().st_size
        manifest["files"][TRAINING_STATE_FILE] = {
            "bytes": size,
            "sha256": file_sha256(checkpoint / TRAINING_STATE_FILE),
        }
        (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest))
    lerobot_checkpoint.point_link(output, "best", output / "checkpoint_000002")
    run(sample_bags, tmp_path, "--resume", training__save_freq=2)
    assert (output / "best").readlink().name == "checkpoint_000002"
    assert lerobot_checkpoint.score_of(output / "best") == 1e-6


@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_a_save_that_fails_stops_or_goes_on_as_asked(sample_bags: Path, tmp_path, capsys, monkeypatch, choice):
    """A full disk at the second save: reported, the first checkpoint is whole. (The disk is staged with an OSError;
    a really full disk is in test_saving.py.)"""
    original, calls = saving.move_into_place, []

    def full(*args):
        calls.append(None)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(saving, "move_into_place", full)
    settings = {"training__steps": 6, "training__save_freq": 2, "training__on_save_error": choice}
    code = train.main(arguments(sample_bags, tmp_path, **settings))
    error = capsys.readouterr().err
    assert "No space left" in error
    present = [p.name for p in lerobot_checkpoint.list_checkpoints(tmp_path / "run")]
    lerobot_checkpoint.verify_checkpoint(tmp_path / "run/checkpoint_000002")
    assert (code, present) == (
        (1, ["checkpoint_000002"]) if choice == "stop" else (0, ["checkpoint_000002", "checkpoint_000006"])
    )


def test_old_checkpoints_are_pruned_after_a_good_save(sample_bags: Path, tmp_path: Path):
    """keep_checkpoints newest stay, and what `best` points at."""
    output = run(sample_bags, tmp_path, training__save_freq=1, training__keep_checkpoints=2)
    kept = {p.name for p in lerobot_checkpoint.list_checkpoints(output)}
    assert kept == {"checkpoint_000005", "checkpoint_000006", (output / "best").resolve().name}


def test_overwrite_clears_what_a_killed_run_was_pruning(sample_bags: Path, tmp_path: Path):
    """Else the new run, pruning the same checkpoint, could not move it out of the way."""
    (tmp_path / "run/.tmp-checkpoint_000001-pruned/training_state").mkdir(parents=True)
    two = {"training__steps": 2, "training__save_freq": 1, "training__keep_checkpoints": 1, "training__val_fraction": 0}
    output = run(sample_bags, tmp_path, "--overwrite", **two)
    assert "checkpoint_000001" not in {p.name for p in lerobot_checkpoint.list_checkpoints(output)}
    assert not list(output.glob(".tmp-*"))
