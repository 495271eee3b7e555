"""The output directory: damage is named, the newest whole checkpoint found, and nothing that is needed removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import lerobot_checkpoint as checkpoints
from lerobot_checkpoint import CheckpointError, load_policy, save_checkpoint
from lerobot_checkpoint.layout import LISTED_FILES, MANIFEST_FILE
from tests.checkpoints import checkpoint, run, saved_once

__all__ = ["checkpoint", "run", "saved_once"]  # fixtures

# -- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [*LISTED_FILES, MANIFEST_FILE])
def test_verify_names_the_damaged_file(checkpoint, file):
    """A missing, truncated or changed file is named, whichever it is."""
    path = checkpoint / file
    content = path.read_bytes()
    damages = {"truncated": content[: len(content) // 2], "changed": content[:-1] + bytes([content[-1] ^ 1])}
    if file == MANIFEST_FILE:
        del damages["changed"]  # a changed closing brace is a truncation
    for damage in damages.values():
        path.write_bytes(damage)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.verify_checkpoint(checkpoint)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path}: missing"):
        checkpoints.verify_checkpoint(checkpoint)
    path.write_bytes(content)
    checkpoints.verify_checkpoint(checkpoint)


@pytest.mark.parametrize("file", ["pretrained_model/notes.txt", "training_state/more/x.pt", "README.md", ".DS_Store"])
def test_files_of_others_are_nobodys_business(checkpoint, file):
    """A note, or what a file browser leaves in each folder, makes no checkpoint worse."""
    (checkpoint / file).parent.mkdir(exist_ok=True)
    (checkpoint / file).write_text("?")
    checkpoints.verify_checkpoint(checkpoint)
    assert checkpoints.newest_checkpoint(checkpoint.parent) == checkpoint


def test_verify_knows_which_step_it_is(checkpoint):
    """A checkpoint under another step's name is refused: resuming would lie about the step."""
    renamed = checkpoint.rename(checkpoint.with_name("checkpoint_000006"))
    with pytest.raises(CheckpointError, match="holds step 5 by its manifest"):
        checkpoints.verify_checkpoint(renamed)


def test_newest_skips_damage_and_says_so(run, tmp_path):
    """The newest checkpoint that verifies is used; each newer one is reported with its reason."""
    paths = [save_checkpoint(tmp_path, step, **run) for step in (1, 2, 3)]
    os.truncate(paths[2] / "training_state" / "training_state.pt", 10)
    (paths[1] / "pretrained_model" / "config.json").unlink()
    heard: list[str] = []
    assert checkpoints.newest_checkpoint(tmp_path, on_bad=heard.append) == paths[0]
    assert len(heard) == 2 and "training_state.pt: 10 bytes" in heard[0] and "config.json: missing" in heard[1]
    assert checkpoints.newest_checkpoint(tmp_path / "nowhere") is None
    # A policy needs no training state, but weights that are not those which were written are refused ...
    assert load_policy(tmp_path).path.parent == paths[2]
    os.truncate(paths[2] / "pretrained_model" / "model.safetensors", 10_000)
    with pytest.raises(CheckpointError, match="model.safetensors: 10000 bytes; expected"):
        load_policy(tmp_path)  # ... and an older policy does not run unasked
    with pytest.raises(CheckpointError, match="training_state.pt: unreadable"):
        checkpoints.load_training_state(paths[2])


# -- links, pruning, leftovers ------------------------------------------------------------------------------------


@pytest.fixture
def outputs(saved_once, tmp_path) -> Path:
    """Four checkpoints' directories; only names matter here."""
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint_{step:06d}" / "pretrained_model").mkdir(parents=True)
    return tmp_path


def test_prune_never_removes_what_links_point_at(outputs):
    """The newest `keep` stay, and whatever `last` and `best` point at."""
    checkpoints.point_link(outputs, "best", outputs / "checkpoint_000001")
    checkpoints.point_link(outputs, "last", outputs / "checkpoint_000002")
    removed = checkpoints.prune(outputs, keep=1)
    assert [p.name for p in removed] == ["checkpoint_000003"]
    assert sorted(p.name[-1] for p in outputs.glob("checkpoint_*")) == ["1", "2", "4"]
    checkpoints.point_link(outputs, "best", outputs / "checkpoint_000004")
    assert [p.name for p in checkpoints.prune(outputs, keep=2)] == ["checkpoint_000001"]
    assert not list(outputs.glob(".tmp-*"))
    with pytest.raises(CheckpointError, match="asked to keep 0"):
        checkpoints.prune(outputs, keep=0)


def test_links_point_at_checkpoints_only(outputs):
    """A link to nothing is refused; a link that exists is replaced."""
    with pytest.raises(CheckpointError, match="checkpoint_000009 is not there"):
        checkpoints.point_link(outputs, "best", outputs / "checkpoint_000009")
    for step in (1, 2):
        checkpoints.point_link(outputs, "best", outputs / f"checkpoint_{step:06d}")
    assert os.readlink(outputs / "best") == "checkpoint_000002"


def test_leftovers_are_cleaned(outputs):
    """Temporary names go; an .old whose successor never arrived is put back, another one goes."""
    (outputs / ".tmp-checkpoint_000005-1" / "pretrained_model").mkdir(parents=True)
    (outputs / ".tmp-last-1").symlink_to("checkpoint_000005")
    os.rename(outputs / "checkpoint_000002", outputs / "checkpoint_000002.old")
    (outputs / "checkpoint_000003.old").mkdir()
    names = [p.name for p in checkpoints.list_checkpoints(outputs)]
    assert names == ["checkpoint_000001", "checkpoint_000002.old", "checkpoint_000003", "checkpoint_000004"]
    assert checkpoints.clean_leftovers(outputs) == [
        ".tmp-checkpoint_000005-1", ".tmp-last-1", "checkpoint_000002.old", "checkpoint_000003.old",
    ]  # fmt: skip
    assert sorted(p.name for p in outputs.iterdir()) == [f"checkpoint_00000{step}" for step in (1, 2, 3, 4)]
    assert checkpoints.clean_leftovers(outputs) == []
