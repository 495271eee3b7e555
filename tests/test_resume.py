"""Resume is exact, stopping is orderly, checkpoints survive. What takes minutes is in tests/soak_*.py."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from lerobot_checkpoint import CheckpointError, load_training_state, saving
from tests.tiny import arguments, assert_same_run, metrics, run, weights
from training import identity

EVERY_STEP = {"training__log_freq": 1, "training__save_freq": 2}


@pytest.fixture(scope="module")
def straight(sample_bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without interruption; read-only for the tests."""
    return run(sample_bags, tmp_path_factory.mktemp("straight"), training__save_freq=2)


# -- exact


@pytest.mark.parametrize("stops", [(2,), (2, 4), (4,)])
def test_an_interrupted_run_is_the_same_run(straight: Path, sample_bags: Path, tmp_path: Path, stops: tuple[int, ...]):
    """Dropout and VAE on: k steps, a new process state, resume to N equals N steps straight, bit for bit, also when
    the interruption falls between two lines of metrics.jsonl (log_freq 2, after which a window is half full)."""
    for steps in (*stops, 6):
        run(sample_bags, tmp_path, "--resume", training__steps=steps, training__save_freq=2)
        torch.manual_seed(12345)  # whatever the next start finds in the generator must not matter
    assert_same_run(tmp_path / "run", straight)


def test_a_run_in_parts_goes_on_exactly(sample_bags: Path, tmp_path: Path, capsys):
    """training.accumulate_steps: steps, schedule and saving count optimizer steps, and the place in the data is that of
    whole ones. Another number of parts is said."""
    parts = {"training__accumulate_steps": 3, "training__save_freq": 2, "training__log_freq": 1}
    parts |= {"training__scheduler": "cosine", "training__warmup_steps": 2}
    unbroken = run(sample_bags, tmp_path / "a", **parts, training__steps=4)
    shutil.copytree(tmp_path / "a/run", tmp_path / "b/run", symlinks=True)
    for name in ("checkpoint_000004", "last", "best"):
        path = tmp_path / "b/run" / name
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    assert_same_run(run(sample_bags, tmp_path / "b", "--resume", **parts, training__steps=4), unbroken)
    assert load_training_state(unbroken / "last")["samples_seen"] == 4 * 3 * 2
    capsys.readouterr()
    run(sample_bags, tmp_path / "b", "--resume", **parts | {"training__accumulate_steps": 1}, training__steps=5)
    assert "training.accumulate_steps (was 3, is 1)" in capsys.readouterr().out


def test_resume_between_log_lines_keeps_the_half_full_window(sample_bags: Path, tmp_path: Path):
    """Saved at step 3 with log_freq 2: the line of step 4 averages steps 3 and 4, before and after a resume. The
    schedule goes on in the middle of its warm-up."""
    odd = {"training__save_freq": 3, "training__log_freq": 2}
    odd |= {"training__scheduler": "cosine", "training__warmup_steps": 5}
    unbroken = run(sample_bags, tmp_path / "a", training__steps=6, **odd)
    broken = run(sample_bags, tmp_path / "b", training__steps=6, **odd)
    for name in ("checkpoint_000006", "last", "best"):
        path = broken / name
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    run(sample_bags, tmp_path / "b", "--resume", training__steps=6, **odd)
    assert_same_run(broken, unbroken)


def test_metrics_are_cut_back_to_the_checkpoint(straight: Path, sample_bags: Path, tmp_path: Path):
    """Lines after the checkpoint, and one torn by the kill, are dropped before they are written again."""
    output = run(sample_bags, tmp_path, training__steps=4, training__save_freq=2)
    with (output / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "loss": 1.0}) + '\n{"step": 6, "lo')
    run(sample_bags, tmp_path, "--resume", training__steps=6, training__save_freq=2)
    assert_same_run(output, straight)


def test_another_batch_size_keeps_the_place_and_is_said(sample_bags: Path, tmp_path: Path, capsys):
    """With a changed batch the run goes on from the same sample, and says what is no longer exact."""
    run(sample_bags, tmp_path, training__steps=3)
    run(sample_bags, tmp_path, "--resume", training__steps=6, training__batch_size=4)
    assert "not bit for bit" in (said := capsys.readouterr().out) and "training.batch_size (was 2, is 4)" in said
    state = load_training_state(tmp_path / "run/last")
    assert state["samples_seen"] == 3 * 2 + 3 * 4


def test_another_learning_rate_counts_from_there_and_is_said(sample_bags: Path, tmp_path: Path, capsys):
    """lr, lr_backbone and weight decay are the config's, not those that the optimizer's state brought along."""
    run(sample_bags, tmp_path, training__steps=2)
    changed = {"training__lr": 5e-4, "training__lr_backbone": 2e-4, "training__weight_decay": 0.5}
    output = run(sample_bags, tmp_path, "--resume", training__steps=4, **changed)
    said = capsys.readouterr().out
    assert "training.lr (was 0.0001, is 0.0005)" in said and "training.weight_decay (was 0.0001, is 0.5)" in said
    assert [m["lr"] for m in metrics(output)] == [1e-4, 5e-4]
    groups = load_training_state(output / "last")["optimizer"]["param_groups"]
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(5e-4, 0.5), (2e-4, 0.5)]


def test_a_validation_that_a_stop_left_out_is_made_up_for(sample_bags: Path, tmp_path: Path, monkeypatch):
    """Stopped in a step that should have validated: the resumed run has the line, `best`, and the rest, as unbroken."""
    settings = {"training__steps": 6, "training__save_freq": 2, "training__log_freq": 1}
    unbroken = run(sample_bags, tmp_path / "a", **settings)
    original = train.Trainer.train_step

    def stopped(self, raw):
        if self.step == 3:
            self.stop.name = "SIGTERM"
        return original(self, raw)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", stopped)
        assert train.main(arguments(sample_bags, tmp_path / "b", **settings)) == 75
    assert [m["step"] for m in metrics(tmp_path / "b/run", "val_l1_loss")] == [2]
    broken = run(sample_bags, tmp_path / "b", "--resume", **settings)
    assert_same_run(broken, unbroken)
    assert (broken / "best").readlink() == (unbroken / "best").readlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model__dim_model": 64}, ["model.dim_model (was 32, is 64)"]),
        ({"data__fps": 15}, ["data.fps (was 30.0, is 15.0)"]),
        ({"training__seed": 3}, ["training.seed (was 42, is 3)"]),
        ({"conventions__action_mode": "absolute"}, ["action_mode (was delta, is absolute)"]),
        ({"training__val_fraction": 0}, ["training.val_fraction (was 0.1, is 0.0)"]),
    ],
)
def test_a_changed_model_or_changed_data_is_refused(straight: Path, sample_bags: Path, capsys, change, words):
    """Resuming on another model or other samples would be another run under the same name."""
    before = sorted(p.name for p in straight.iterdir())
    assert train.main(arguments(sample_bags, straight.parent, ("--resume",), **change)) == 1
    error = capsys.readouterr().err
    assert "cannot resume" in error and all(word in error for word in words), error
    assert sorted(p.name for p in straight.iterdir()) == before


def test_a_run_from_before_the_split_by_hash_goes_on_with_its_own_split(sample_bags: Path, tmp_path, monkeypatch):
    """What an update changed about the split, or will change, moves no episode of a run that is under way."""

    def shuffled(episodes, *_):
        return [e for e in episodes if e.name != "episode_003"], [e for e in episodes if e.name == "episode_003"]

    def older(*args):
        since = {"sample order", "angle_reference_rad", "training.val_fraction"}
        return {name: value for name, value in fingerprint(*args).items() if name not in since}

    fingerprint = identity.fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(identity, "split_episodes", shuffled)
        patch.setattr(identity, "angle_references", lambda train: np.zeros(6))
        patch.setattr(identity, "SAMPLE_ORDER", identity.RANDPERM_ORDER)
        unbroken = run(sample_bags, tmp_path / "a", **EVERY_STEP)
        patch.setattr(identity, "fingerprint", older)
        run(sample_bags, tmp_path / "b", **EVERY_STEP, training__steps=4)
    assert_same_run(run(sample_bags, tmp_path / "b", "--resume", **EVERY_STEP), unbroken)
    contract = json.loads((tmp_path / "b/run/last/pretrained_model/train_config.json").read_text())
    assert contract["held_out_episodes"] == ["episode_003"]


def test_a_run_that_was_trained_across_gaps_of_the_joints_does_not_go_on():
    """Its samples were others, and so was their order: refused in one line that says which bags, and what to do."""
    now = {"sample order": 2, "angle_reference_rad": [0.0], "training.val_fraction": 0.1, "seed": 1}
    whole, gap = (SimpleNamespace(name=n, sync_report={"dropped_in_joint_gaps": d}) for n, d in (("a", 0), ("b", 7)))
    identity.check_unchanged({"seed": 1}, now, [whole], Path("checkpoint"))
    with pytest.raises(CheckpointError, match=r"^checkpoint: .* the 7 frames in gaps of the joints of b;"):
        identity.check_unchanged({"seed": 1}, now, [whole, gap], Path("checkpoint"))
    with pytest.raises(CheckpointError, match=r"seed \(was 2, is 1\)"):
        identity.check_unchanged({"seed": 2}, now, [whole], Path("checkpoint"))


def test_auto_falls_back_to_the_newest_checkpoint_that_verifies(straight: Path, sample_bags: Path, tmp_path, capsys):
    """A torn newest checkpoint and lost links (object stores keep none) cost the steps since the one before."""
    output = run(sample_bags, tmp_path, training__save_freq=2)
    torn = output / "checkpoint_000006/pretrained_model/model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    (output / "last").unlink()
    (output / "best").unlink()
    capsys.readouterr()
    run(sample_bags, tmp_path, "--resume", training__save_freq=2)
    said = capsys.readouterr().out
    assert "passed over" in said and "model.safetensors" in said and "at step 4" in said
    assert_same_run(output, straight)


def test_a_file_browsers_traces_do_not_start_a_run_over(straight: Path, sample_bags: Path, tmp_path: Path):
    """A .DS_Store in each checkpoint and its folders: the run goes on from the newest all the same."""
    output = run(sample_bags, tmp_path, training__steps=4, training__save_freq=2)
    for folder in [f for f in output.glob("checkpoint_*/**/") if f.is_dir()]:
        (folder / ".DS_Store").write_bytes(b"\0Bud1")
    run(sample_bags, tmp_path, "--resume", training__save_freq=2)
    assert_same_run(output, straight)


def test_a_checkpoint_by_path_starts_a_run_elsewhere(straight: Path, sample_bags: Path, tmp_path: Path):
    """training.resume: PATH continues it in another output directory; beside newer checkpoints it is refused."""
    run(sample_bags, tmp_path, training__resume=straight / "checkpoint_000004", training__save_freq=2)
    ours, theirs = weights(tmp_path / "run"), weights(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert train.main(arguments(sample_bags, straight.parent, training__resume=straight / "checkpoint_000004")) == 1


def test_a_finished_run_is_left_alone(straight: Path, sample_bags: Path, tmp_path: Path, capsys):
    """--resume on a complete run trains nothing and says so."""
    output = run(sample_bags, tmp_path, training__save_freq=2)
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*.safetensors")}
    run(sample_bags, tmp_path, "--resume", training__save_freq=2)
    assert "nothing left to train" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*.safetensors")} == before


# -- sick numbers, full disks, killed workers


def test_training_goes_on_while_a_checkpoint_is_written(sample_bags: Path, tmp_path: Path, monkeypatch):
    """A slow disk: steps are taken during the save, one save is in flight at a time, and what is written is the state
    of the step that it is named after, not of the steps since."""
    steps, spans = [0], []
    original_step, original_move = train.Trainer.train_step, saving.move_into_place

    def counted(self, raw):
        flags = original_step(self, raw)
        steps.append(self.step)
        return flags

    def slow(temporary, final):
        saved, deadline = int(final.name.removeprefix("checkpoint_")), time.monotonic() + 30
        while steps[-1] <= saved < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        spans.append((saved, steps[-1]))
        return original_move(temporary, final)

    settings = {"training__steps": 12, "training__save_freq": 4, "training__val_fraction": 0}
    plain = run(sample_bags, tmp_path / "plain", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", counted)
        patch.setattr(saving, "move_into_place", slow)
        slowed = run(sample_bags, tmp_path / "slow", **settings)
    assert [saved for saved, _ in spans] == [4, 8, 12]
    assert all(reached > saved for saved, reached in spans[:2]), "no step was taken while a checkpoint was written"
    for name in ("checkpoint_000004", "checkpoint_000008"):
        ours, theirs = weights(slowed / name), weights(plain / name)
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
