"""What a run is compared by, and how the code that trained is named."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

import train
from tests.osmo_modules import modules
from tests.tiny import ROOT
from training import identity


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files that OSMO injects, and nothing else."""
    for name in modules():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_code_has_the_same_hash_at_home_and_on_a_cluster(copy: Path):
    """A checkpoint says which code trained it; an injected copy has no git history to ask."""
    assert identity.source_version(copy) == identity.source_version()


@pytest.mark.parametrize("name", ["train.py", "act_model.py", "training/summary.py", "rosbag_dataset/topics.py",
                                  "lerobot_checkpoint/layout.py"])  # fmt: skip
def test_every_file_counts_with_its_place(copy: Path, name: str):
    """A changed file, a file more, and a file that only moved to another room give another hash."""
    before = identity.source_version(copy)
    content = (copy / name).read_text()
    (copy / name).write_text(content + "\n# changed\n")
    changed = identity.source_version(copy)
    (copy / name).write_text(content)
    assert identity.source_version(copy) == before != changed
    if "/" in name:
        (copy / name).rename((copy / name).with_name("moved.py"))
        assert identity.source_version(copy) != before


@pytest.mark.parametrize("scheduler", [s for s in dataclasses.fields(train.TrainingConfig)
                                       if s.name == "scheduler"][0].metadata["choices"])  # fmt: skip
def test_a_schedules_own_settings_are_compared(scheduler: str):
    """Whatever schedule there is or will be: a resumed run says that its warm-up, its floor or its length changed."""
    settings = dataclasses.asdict(train.Config(training=train.TrainingConfig(scheduler=scheduler)))
    compared = identity.learning_settings(settings)
    own = {"training.warmup_steps", "training.min_lr", "training.steps"}
    assert (own <= set(compared)) == (scheduler != "none") and "training.lr" in compared


def test_differences_name_what_changed():
    """Of nested values only the keys that differ; tuples and lists are the same after a file."""
    was = {"a": 1, "b": [1, 2], "c": {"x": 1, "y": 2}, "gone": 0}
    now = {"a": 2, "b": (1, 2), "c": {"x": 1, "y": 3}, "new": None}
    assert identity.differences(was, now) == ["a (was 1, is 2)", "c (y)"]
