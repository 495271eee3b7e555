"""Saving: what was saved comes back to the last bit, and no bad content, kill or full disk leaves half of it."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import lerobot_checkpoint as checkpoints
from act_model import ACT
from lerobot_checkpoint import CheckpointError, load_policy, save_checkpoint
from lerobot_checkpoint.saving import host_copy
from tests.checkpoints import run

__all__ = ["run"]  # fixture


def test_save_and_load_round_trip(run, tmp_path):
    """Weights, statistics, configuration and training state come back as they went in, to the last bit."""
    path = save_checkpoint(tmp_path, 5000, **run)
    assert path == tmp_path / "checkpoint_005000" and os.readlink(tmp_path / "last") == path.name
    checkpoints.verify_checkpoint(path)
    policy = load_policy(tmp_path)
    assert policy.path == path / "pretrained_model" and not policy.model.training
    for key, tensor in policy.model.state_dict().items():
        assert torch.equal(tensor, run["model_state"][key]), key
    for key, pair in run["stats"].items():
        assert all(np.array_equal(policy.stats[key][name], value) for name, value in pair.items())
    for field in ("act_config", "image_shapes", "policy_fields", "train_config"):
        assert getattr(policy, field) == run[field]
    state = checkpoints.load_training_state(path)
    assert torch.equal(state.pop("rng"), run["training_state"]["rng"])
    assert state == dict(step=1, losses=[0.5, None], name="run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_005000", "last"]  # nothing temporary


def test_channels_last_weights_are_stored_plain(run, tmp_path):
    """Weights in channels_last come back the same: the file format knows one memory order only."""
    model = ACT(run["act_config"])
    model.load_state_dict(run["model_state"])
    model.to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path, 1, **{**run, "model_state": model.state_dict()})
    loaded = load_policy(tmp_path).model.state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in run["model_state"].items())


def test_all_files_can_be_read_by_whom_new_files_can(run, tmp_path):
    """safetensors makes files for their owner alone; a checkpoint may be another user's to run, or a container's."""
    before = os.umask(0o027)
    try:
        path = save_checkpoint(tmp_path, 1, **run)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in path.rglob("*") if file.is_file()} == {"0o640"}


def test_what_is_saved_in_the_background_is_what_was_there(run, tmp_path):
    """...when it was asked for, whatever becomes of the tensors; again with the next save, in the same memory."""
    saver, bias = checkpoints.CheckpointSaver(), run["model_state"]["action_head.bias"]
    stored = []
    for step in (1, 2):
        bias.fill_(step)
        saver.submit(tmp_path, step, **run)
        bias.fill_(-1)
        copies = saver._copies["model_state"]["action_head.bias"]
        stored.append(copies.data_ptr())
        saver.wait()
    assert stored[0] == stored[1]
    paths = checkpoints.list_checkpoints(tmp_path)
    assert [load_policy(path).model.action_head.bias[0].item() for path in paths] == [1, 2]


def test_copies_are_made_anew_where_a_tensor_has_changed():
    """Another shape, another kind of number, another order in memory, one more, one less."""
    first = {"a": torch.ones(3), "b": [torch.ones(2, 3), torch.ones(2), 5], "c": torch.ones(1), "d": (torch.ones(1),)}
    second = {"a": torch.zeros(4), "b": [torch.zeros(3, 2).t(), torch.zeros(2).double(), 6],
              "d": (torch.zeros(1), torch.zeros(1))}  # fmt: skip
    copied = host_copy(second, host_copy(first))
    assert copied.keys() == second.keys() and copied["b"][2] == 6
    pairs = zip(
        (copied["a"], *copied["b"][:2], *copied["d"]), (second["a"], *second["b"][:2], *second["d"]), strict=True
    )
    for copy, tensor in pairs:
        assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype and copy.stride() == tensor.stride()
        assert copy.data_ptr() != tensor.data_ptr()


def test_steps_sort_beyond_six_digits(run, tmp_path):
    """Names are padded to the run's length, and order is by number in any case."""
    names = [save_checkpoint(tmp_path, step, **run).name for step in (999_999, 1_000_000)]
    names.append(save_checkpoint(tmp_path, 20, **run, total_steps=1_500_000).name)
    assert names == ["checkpoint_999999", "checkpoint_1000000", "checkpoint_0000020"]
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == [names[2], names[0], names[1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_state={}), "model.safetensors: model_state does not fit act_config: missing"),
        (dict(image_shapes=dict(front=(4, 4))), "config.json: image_shapes has ['front']; expected ['top']"),
        (dict(policy_fields={}), "config.json: policy_fields has []; expected"),
        (dict(stats={}), "stats: no mean of observation.state"),
        (dict(train_config=dict(path=Path("x"))), "train_config.json: Object of type"),
        (
            dict(training_state=dict(rng=dict(numpy=[np.zeros(3)]))),
            "training_state/training_state.pt: training_state['rng']['numpy'][0] is numpy.ndarray; expected tensors",
        ),
        (dict(training_state=dict(lr=np.float64(1))), "training_state['lr'] is numpy.float64"),
    ],
)
def test_bad_contents_are_refused_before_the_disk_is_touched(run, tmp_path, change, message):
    """A checkpoint that could not be read back is never written; the message says what is wrong."""
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path / "out", 1, **{**run, **change})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_policy_fields_that_lerobot_refuses_are_refused(run, tmp_path):
    """A temporal ensemble takes one action a time; more steps than a chunk has cannot be taken."""
    for fields in (dict(temporal_ensemble_coeff=0.01), dict(n_action_steps=11)):
        with pytest.raises(CheckpointError, match="n_action_steps is 1[01]; expected 1 to 1"):
            save_checkpoint(tmp_path, 1, **{**run, "policy_fields": {**run["policy_fields"], **fields}})


def test_output_directory_that_cannot_be_one(run, tmp_path):
    """A file where the output directory should be is a CheckpointError, like every failure."""
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match="checkpoint_000001: not written"):
        save_checkpoint(tmp_path / "out", 1, **run)


def test_last_that_is_a_directory_is_not_replaced(run, tmp_path):
    """Where a download turned the link into a directory: refused by name, and the checkpoint itself is complete."""
    (tmp_path / "last").mkdir()
    with pytest.raises(CheckpointError, match="last: cannot point it at checkpoint_000001"):
        save_checkpoint(tmp_path, 1, **run)
    checkpoints.verify_checkpoint(tmp_path / "checkpoint_000001")
    assert not list(tmp_path.glob(".tmp-*"))


# -- kills and full disks -----------------------------------------------------------------------------------------

KILLED_SAVES = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)  # no threads, so that this process may fork
from pathlib import Path
import lerobot_checkpoint as checkpoints
from tests.checkpoints import CAMERAS, make_run

assert "lerobot" not in sys.modules
run, out = make_run(CAMERAS["one camera"]), Path(sys.argv[1])

def save(step, marker):
    run["model_state"]["action_head.bias"].fill_(marker)
    run["training_state"] = dict(marker=marker)
    checkpoints.save_checkpoint(out, step, **run)

def loadable():
    # The marker of what a run would load now; weights and training state have to be of the same save.
    newest = checkpoints.newest_checkpoint(out)
    policy = checkpoints.load_policy(out)
    assert policy.path.parent == newest.resolve(), (policy.path, newest)
    marker = checkpoints.load_training_state(newest)["marker"]
    assert (policy.model.action_head.bias == marker).all()
    return marker

def fork_and_kill(child, delay=None):
    # Run child() in a fork that is killed after `delay` seconds, or kills itself; True if it was killed.
    pid = os.fork()
    if pid == 0:
        child()
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

def check_leftovers():
    checkpoints.clean_leftovers(out)
    assert (out / "last").exists()
    assert not [p.name for p in out.iterdir() if p.name.startswith(".tmp") or p.name.endswith(".old")]
"""


def run_killed_saves(script: str, out: Path) -> str:
    """Run KILLED_SAVES and `script`. It also asserts that saving and loading import no lerobot: a robot has none."""
    return subprocess.run(
        [sys.executable, "-c", KILLED_SAVES + textwrap.dedent(script), str(out)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=200,
    ).stdout


def test_kill_before_every_step_on_the_disk(tmp_path):
    """Killed before its n-th file operation, for every n, a save that replaces its own step loses nothing."""
    out = run_killed_saves(
        """
        OPERATIONS = ("open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir")
        def kill_before(n):
            left = n
            def hook(event, arguments):
                nonlocal left
                if event in OPERATIONS and str(out) in str(arguments[0]):
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)

        save(1, 0)
        marker, n, killed, outcomes = 0, 0, True, set()
        while killed:
            n += 1
            killed = fork_and_kill(lambda: (kill_before(n), save(1, n)))
            found = loadable()
            assert found in (marker, n), (found, marker, n)
            outcomes.add(found == n)
            marker = found
            check_leftovers()
        assert outcomes == {True, False}  # some kills came before the new one was in place, some after
        print(n)
        """,
        tmp_path / "out",
    )
    assert int(out) > 20  # there were that many operations to be killed before


def test_kill_at_random_moments(tmp_path):
    """Killed with SIGKILL at ten random moments of a loop of saves, a loadable `last` remains every time."""
    run_killed_saves(
        """
        save(1, 1)
        def train():
            step = checkpoints.list_checkpoints(out)[-1].name.removeprefix("checkpoint_")
            for step in range(int(step) + 1, 10**6):
                save(step, step)
                checkpoints.prune(out, keep=2)
        random.seed(0)
        marker = 1
        for _ in range(10):
            assert fork_and_kill(train, delay=random.uniform(0.1, 1.2))
            assert loadable() >= marker
            marker = loadable()
            check_leftovers()
        assert marker > 1
        """,
        tmp_path / "out",
    )


def test_an_end_that_torch_could_not_write_is_noticed(run, tmp_path, monkeypatch):
    """It closes its file without a look at whether the last bytes were taken. (Staged: the last 100 are cut off.)"""
    save = torch.save

    def cut(state: object, path: Path) -> None:
        save(state, path)
        os.truncate(path, path.stat().st_size - 100)

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(CheckpointError, match="checkpoint_000001: not written .it is cut short"):
        save_checkpoint(tmp_path, 1, **run)
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_earlier_checkpoints_alone(run, tmp_path):
    """With no space left: one clear line, no temporary files, and the earlier checkpoint and `last` as they were."""
    out = tmp_path / "small"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=70m", "tmpfs", out], capture_output=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        first = save_checkpoint(out, 1, **run)  # 45 MB
        if mounted.returncode != 0:  # no right to mount: no file may grow beyond 1 MB, which fails the same way
            resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(out, 2, **run)
        message = str(caught.value)
        assert message.startswith(f"{out / 'checkpoint_000002'}: not written (") and "\n" not in message
        assert "No space left on device" in message or mounted.returncode != 0
        with pytest.raises(CheckpointError, match="not written"):
            save_checkpoint(out, 1, **run)  # nor is a checkpoint lost that was to be replaced
        assert sorted(p.name for p in out.iterdir()) == ["checkpoint_000001", "last"]
        checkpoints.verify_checkpoint(first)
        assert load_policy(out).path.parent == first
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if mounted.returncode == 0:
            subprocess.run(["umount", out], check=True)
