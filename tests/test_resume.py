"""Resume is exact, stopping is orderly, checkpoints survive. What takes minutes is in tests/soak_*.py."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lerobot_checkpoint
import train
from lerobot_checkpoint import file_sha256, load_policy, load_training_state, saving
from lerobot_checkpoint.layout import MANIFEST_FILE, TRAINING_STATE_FILE
from lerobot_checkpoint.training_state import training_state_bytes
from tests.tiny import ROOT, arguments, error_line, metrics, run, run_process
from training.metrics import read_metrics
from training.run_dir import STOP_MARKER

EVERY_STEP = {"training__log_freq": 1, "training__save_freq": 2}


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_policy(output_dir).model.state_dict()


def assert_same_run(one: Path, other: Path) -> None:
    """Final weights, optimizer state and every logged loss are equal to the last bit."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (load_training_state(d / "last")["optimizer"]["state"] for d in (one, other))
    assert all(torch.equal(ours[i][key], theirs[i][key]) for i in ours for key in ours[i])
    for field in ("loss", "val_l1_loss"):
        exact = ("step", "loss", "l1_loss", "kl_loss", "lr", "grad_norm", "val_l1_loss")
        lines = [[{k: m[k] for k in exact if k in m} for m in metrics(d, field)] for d in (one, other)]
        assert lines[0] == lines[1]


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


def test_resume_between_log_lines_keeps_the_half_full_window(sample_bags: Path, tmp_path: Path):
    """Saved at step 3 with log_freq 2: the line of step 4 averages steps 3 and 4, before and after a resume."""
    odd = {"training__save_freq": 3, "training__log_freq": 2}
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


def test_two_runs_in_one_output_directory_are_refused(sample_bags: Path, tmp_path: Path):
    """The second would delete the save that the first has in flight."""
    process = start(sample_bags, tmp_path, training__steps=5000, training__log_freq=1)
    try:
        wait_for_step(tmp_path / "run", 1, process)
        assert "another process is training there" in error_line(run_process(sample_bags, tmp_path, "--resume"))
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model__dim_model": 64}, ["model.dim_model (was 32, is 64)"]),
        ({"data__fps": 15}, ["data.fps (was 30.0, is 15.0)"]),
        ({"training__seed": 3}, ["training.seed (was 42, is 3)"]),
        ({"conventions__action_mode": "absolute"}, ["action_mode (was delta, is absolute)"]),
        ({"training__val_fraction": 0}, ["held-out episodes"]),
    ],
)
def test_a_changed_model_or_changed_data_is_refused(straight: Path, sample_bags: Path, capsys, change, words):
    """Resuming on another model or other samples would be another run under the same name."""
    before = sorted(p.name for p in straight.iterdir())
    assert train.main(arguments(sample_bags, straight.parent, ("--resume",), **change)) == 1
    error = capsys.readouterr().err
    assert "cannot resume" in error and all(word in error for word in words), error
    assert sorted(p.name for p in straight.iterdir()) == before


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


def test_a_file_browsers_traces_do_not_start_a_run_over(straight: Path, sample_bags: Path, tmp_path: Path):
    """A .DS_Store in each checkpoint and its folders: the run goes on from the newest all the same."""
    output = run(sample_bags, tmp_path, training__steps=4, training__save_freq=2)
    for folder in [f for f in output.glob("checkpoint_*/**/") if f.is_dir()]:
        (folder / ".DS_Store").write_bytes(b"\0Bud1")
    run(sample_bags, tmp_path, "--resume", training__save_freq=2)
    assert_same_run(output, straight)


def test_best_is_found_again_after_a_kill_between_the_links(sample_bags: Path, tmp_path: Path):
    """`best` follows the scores in the checkpoints, wherever the link was left; it is not pruned meanwhile."""
    output = run(sample_bags, tmp_path, training__save_freq=1)
    best = (output / "best").resolve()
    for wrong in lerobot_checkpoint.list_checkpoints(output):
        lerobot_checkpoint.point_link(output, "best", wrong)
        run(sample_bags, tmp_path, "--resume", training__save_freq=1)
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
        (checkpoint / TRAINING_STATE_FILE).write_bytes(training_state_bytes(state))
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


# -- stopping


def start(bags: Path, folder: Path, *flags: str, **overrides) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *arguments(bags, folder, flags, **overrides)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(output_dir: Path, step: int, process: subprocess.Popen, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    path = output_dir / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not come this far"
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 2)])
def test_a_signal_saves_and_exits_75_and_the_run_continues_exactly(
    sample_bags: Path, tmp_path: Path, number: signal.Signals, workers: int
):
    """SIGTERM and Ctrl-C: finish the step, save, exit 75, leave a marker; resumed, it is the unbroken run."""
    long = {"training__steps": 40, "training__log_freq": 1, "training__save_freq": 1000}
    process = start(sample_bags, tmp_path, **long, training__num_workers=workers)
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
    run(sample_bags, tmp_path, "--resume", **long)
    assert not (output / "stopped.json").exists()
    assert_same_run(output, run(sample_bags, tmp_path / "unbroken", **long))


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
import concurrent.futures._base as base, os, signal, sys, train
def acquire(self):
    for i, future in enumerate(self.futures):
        future._condition.acquire()
        if i == 0 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
sent, base._AcquireFutures.__enter__ = [], acquire
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


def test_a_signal_after_an_error_does_not_hide_it(tmp_path: Path, monkeypatch, capsys):
    """torchrun's SIGTERM reaches a rank that is about to say what is wrong: it says it, and exits with 1."""
    original = train.print_error
    monkeypatch.setattr(train, "print_error", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or original(*a))
    assert train.main(arguments(tmp_path / "nowhere", tmp_path)) == 1
    assert "error: " in capsys.readouterr().err


# -- sick numbers, full disks, killed workers


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


def test_old_checkpoints_are_pruned_after_a_good_save(sample_bags: Path, tmp_path: Path):
    """keep_checkpoints newest stay, and what `best` points at."""
    output = run(sample_bags, tmp_path, training__save_freq=1, training__keep_checkpoints=2)
    kept = {p.name for p in lerobot_checkpoint.list_checkpoints(output)}
    assert kept == {"checkpoint_000005", "checkpoint_000006", (output / "best").resolve().name}


def test_overwrite_clears_what_a_killed_run_was_pruning(sample_bags: Path, tmp_path: Path):
    """Else the new run, pruning the same checkpoint, could not move it out of the way."""
    (tmp_path / "run/.tmp-checkpoint_000001-pruned/training_state").mkdir(parents=True)
    output = run(sample_bags, tmp_path, "--overwrite", training__save_freq=1, training__keep_checkpoints=1)
    assert "checkpoint_000001" not in {p.name for p in lerobot_checkpoint.list_checkpoints(output)}
    assert not list(output.glob(".tmp-*"))


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


def test_wandb_continues_the_same_run(sample_bags: Path, tmp_path: Path):
    """The run's id lies in the checkpoint, so that a resumed run draws on the same curve."""
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for steps in (3, 6):
        result = run_process(sample_bags, tmp_path, "--resume", env=env, wandb__enabled="true", training__steps=steps)
        assert result.returncode == 0, result.stderr
    folders = [p.name for p in (tmp_path / "run/wandb").glob("offline-run-*")]
    assert len(folders) == 2 and len({name.rsplit("-", 1)[1] for name in folders}) == 1
