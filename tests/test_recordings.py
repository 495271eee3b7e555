"""data.lerobot_dataset: train.py on a LeRobot dataset, here one that our own export wrote from the sample bags."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from ur10e_deploy import offline_eval

import train
from rosbag_dataset import ChunkDataset, Episode, load_episodes, split_episodes
from tests import tiny
from tests.once import once
from tests.test_deploy_dataset import edit_info, edit_table
from tests.test_exporting import export
from tests.tiny import arguments, assert_same_run, error_line, run, run_process

ABSOLUTE = {"conventions__action_mode": "absolute"}


@pytest.fixture(scope="module")
def dataset(sample_bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample bags, with pictures as they are."""
    return (
        once(tmp_path_factory, "as-dataset", lambda f: export(sample_bags, f / "set", "--images", "--task=a")) / "set"
    )


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    """The same, to change."""
    return Path(shutil.copytree(dataset, tmp_path / "set"))


def loaded(folder: Path, tmp_path: Path, **overrides: object) -> tuple[list[Episode], train.Config]:
    """The episodes that a training has, of bags or, as `lerobot_dataset`, of a dataset."""
    argv = arguments(folder, tmp_path, **overrides)
    cfg = train.load_config(Path(argv[1]), [a.removeprefix("--override=") for a in argv[2:]])
    find = train.finder(cfg.data.lerobot_dataset)
    return load_episodes(train.bag_settings(cfg), 1, False, find)[0], cfg


def samples(episodes: list[Episode]) -> dict[str, np.ndarray]:
    chunks = ChunkDataset(episodes, 8)
    return chunks.__getitems__(range(len(chunks)))


@pytest.mark.parametrize("action_mode", ["absolute", "delta", "relative"])
def test_a_dataset_gives_the_samples_of_its_bags(
    dataset: Path, sample_bags: Path, tmp_path: Path, action_mode: str
) -> None:
    """State, pictures, chunks and padding, in all action modes."""
    modes = {"conventions__action_mode": action_mode}
    of_bags, _ = loaded(sample_bags, tmp_path, **modes)
    of_dataset, cfg = loaded(sample_bags, tmp_path, data__lerobot_dataset=dataset, **modes)
    wanted, found = samples(of_bags), samples(of_dataset)
    assert wanted.keys() == found.keys()
    for key in wanted:
        if key == "action":
            np.testing.assert_allclose(found[key], wanted[key], atol=1e-6 if action_mode != "absolute" else 0)
        else:
            assert np.array_equal(found[key], wanted[key]), key
    assert (cfg.data.fps, cfg.data.camera_topics) == (30, {"color": "observation.images.color"})


def test_the_same_recordings_are_held_out(dataset: Path, sample_bags: Path, tmp_path: Path) -> None:
    """As in a training on the bags, at the size of the export's pictures."""
    size = {"conventions__image_resize": "null"}
    of_bags, _ = loaded(sample_bags, tmp_path, **size)
    of_dataset, _ = loaded(sample_bags, tmp_path, data__lerobot_dataset=dataset, **size)
    for seed in range(4):
        sides = [[int(e.name[-1]) for e in split_episodes(of, 0.4, seed)[1]] for of in (of_bags, of_dataset)]
        assert sides[0] == sides[1] != []


def test_a_run_on_a_dataset(dataset: Path, sample_bags: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It says what it trains on, resumes exactly, and its checkpoint is evaluated on the held-out episodes."""
    overrides = {"data__lerobot_dataset": dataset, "training__seed": 24, "training__log_freq": 3, **ABSOLUTE}
    whole = run(sample_bags, tmp_path / "whole", **overrides)
    said = capsys.readouterr().out
    assert "6 episodes at 30 Hz, cameras color, 6 states, 6 of them acted on; actions are positions, as its" in said
    run(sample_bags, tmp_path / "parts", training__steps=3, **overrides)
    run(sample_bags, tmp_path / "parts", "--resume", **overrides)
    assert_same_run(whole, tmp_path / "parts" / "run")
    contract = json.loads((whole / "last/pretrained_model/train_config.json").read_text())
    assert contract["config"]["data"]["lerobot_dataset"] == str(dataset)
    assert contract["units"] == ["rad"] * 6 and contract["joint_names"] == contract["config"]["data"]["joint_names"]
    held_out = [name.removeprefix("episode_") for name in contract["held_out_episodes"]]
    assert held_out
    options = ["--checkpoint", whole, "--dataset", dataset, "--episode", *map(int, held_out), "--num-steps", 5]
    assert offline_eval.main([str(o) for o in [*options, "--output", tmp_path / "eval"]]) == 0


def test_of_a_strangers_dataset(copy: Path, sample_bags: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It says neither what actions are, nor units, nor recordings: actions are taken for positions, which is said;
    states have no unit; each episode is a recording of its own. Settings of bags that have no use are named."""

    def foreign(info: dict) -> None:
        for key in ("observation.state", "action"):
            info["features"][key] |= {"names": {"motors": [f"m{i}.pos" for i in range(6)]}}
            info["features"][key].pop("units"), info["features"][key].pop("action_mode", None)

    edit_info(copy, foreign)
    for file in copy.glob("meta/episodes/*/*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.drop_columns([c for c in table.column_names if c.startswith("source/")]), file)
    episodes, cfg = loaded(sample_bags, tmp_path, data__lerobot_dataset=copy, data__fps=10, data__max_offset_ms=7)
    said = capsys.readouterr().out
    assert "taken for positions, as LeRobot's are; it does not say" in said
    assert "note: of bags alone, and not used: data.fps, data.max_offset_ms" in said
    assert cfg.data.joint_names == [f"m{i}.pos" for i in range(6)] and set(train.bag_settings(cfg).units) == {""}
    assert len({episode.recording_hash for episode in episodes}) == 6
    assert [episode.bag for episode in episodes] == [episode.name for episode in episodes]


def test_a_dataset_of_changes_gives_the_same_chunks(
    dataset: Path, copy: Path, sample_bags: Path, tmp_path: Path
) -> None:
    """Where an export says that its actions are changes per frame, they lead from the state: in every action mode."""
    edit_info(copy, lambda info: info["features"]["action"].update(action_mode="delta"))
    for file in copy.glob("data/*/*.parquet"):
        edit_table(file, lambda rows: [
            r.update(action=[a - s for a, s in zip(r["action"], r["observation.state"], strict=True)]) for r in rows
        ])  # fmt: skip
    of_both = [loaded(sample_bags, tmp_path, data__lerobot_dataset=d, **ABSOLUTE)[0] for d in (dataset, copy)]
    wanted, found = (samples(episodes)["action"] for episodes in of_both)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_parts_of_one_recording_are_on_one_side(copy: Path, sample_bags: Path, tmp_path: Path) -> None:
    """As an export of segments says which recording they are from; and they do not overlap in time."""
    for file in copy.glob("meta/episodes/*/*.parquet"):
        edit_table(file, lambda rows: [r.update({"source/bag": f"b{i // 3}", "source/recording": f"{i // 3}"})
                                       for i, r in enumerate(rows)])  # fmt: skip
    episodes, _ = loaded(sample_bags, tmp_path, data__lerobot_dataset=copy)
    for seed in range(8):
        held_out = [int(e.name[-1]) for e in split_episodes(episodes, 0.5, seed)[1]]
        assert held_out in ([], [0, 1, 2], [3, 4, 5]), held_out
    alone, _ = split_episodes([e for e in episodes if e.bag == "b0"], 0.4, 0)
    assert len(alone) == 2, "of the only recording single episodes are held out"


def test_another_file_is_another_episode(copy: Path, sample_bags: Path, tmp_path: Path) -> None:
    """The cache and a resumed run know an episode by its rows and its files."""
    before = {e.name: e.content_hash for e in loaded(sample_bags, tmp_path, data__lerobot_dataset=copy)[0]}
    file = next(copy.glob("data/*/file-000.parquet"))
    edit_table(file, lambda rows: rows[0].update(action=[0.5] * 6))
    after = {e.name: e.content_hash for e in loaded(sample_bags, tmp_path, data__lerobot_dataset=copy)[0]}
    assert before.keys() == after.keys() and before["episode_000000"] != after["episode_000000"]


REFUSED = {
    "no dataset": (shutil.rmtree, {}, r"data\.lerobot_dataset: .*: expected the folder of a LeRobot"),
    "other actions": (
        lambda root: edit_info(root, lambda i: i["features"]["action"].update(names=list("abcdef"))), {},
        "its actions are a, b, c, d, e, f, expected names that its states have, too: shoulder_pan_joint",
    ),
    "cut": (lambda root: None, {"data__episodes": "still"}, "data.episodes: found still, expected bag"),
    "degrees": (
        lambda root: [edit_table(f, lambda rows: [r.update({"observation.state": [90.0] * 6}) for r in rows])
                      for f in root.glob("data/*/*.parquet")], {}, "is 90 at .* looks like degrees",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_on_is_one_line(
    name: str, copy: Path, sample_bags: Path, tmp_path: Path, capsys
) -> None:
    """Which says the key, what was found, and what was expected."""
    damage, overrides, said = REFUSED[name]
    damage(copy)
    assert train.main(arguments(sample_bags, tmp_path, data__lerobot_dataset=copy, **overrides)) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(said, errors[0]), errors


def test_an_episode_that_is_damaged_can_be_left_out(copy: Path, sample_bags: Path, tmp_path: Path, capsys) -> None:
    """data.on_bad_bag: skip, as for a bag: it is named, and the others are trained on."""
    edit_table(next(copy.glob("data/*/file-000.parquet")), lambda rows: rows[1].update(frame_index=7))
    episodes, _ = loaded(sample_bags, tmp_path, data__lerobot_dataset=copy, data__on_bad_bag="skip")
    assert [e.name for e in episodes] == [f"episode_{i:06d}" for i in range(1, 6)]
    assert "skipped bag episode_000000: " in capsys.readouterr().err


def test_without_the_package_it_is_one_line(dataset: Path, sample_bags: Path, tmp_path: Path) -> None:
    """As in OSMO's tasks, into which the reader is not injected."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['lerobot_dataset'] = None")
    result = run_process(
        sample_bags, tmp_path, env={"PYTHONPATH": f"{tmp_path}:{tiny.ROOT}"}, data__lerobot_dataset=dataset
    )
    assert "lerobot_dataset is not there; OSMO's workflows train on bags" in error_line(result)
