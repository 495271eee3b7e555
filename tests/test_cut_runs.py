"""Runs on recordings that are cut into episodes, through train.py and the offline evaluation; what a summary costs."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ur10e_deploy import offline_eval
from ur10e_deploy.sources import BagSource

import train
from lerobot_checkpoint import load_policy, load_training_state
from rosbag_dataset import ChunkDataset, find_bags, load_episodes, settings_from
from tests.bags import settings, write_bag
from tests.checks import entries
from tests.test_cutting import SIDECAR, session
from tests.tiny import arguments, metrics, run
from training import identity, summary, validation
from training.ranks import World
from training.run_dir import STOP_MARKER


@pytest.fixture(autouse=True)
def short_summaries(monkeypatch):
    """What the summary looks at is one test's subject, and the others' waiting."""
    monkeypatch.setattr(summary, "SUMMARY_FRAMES", 10)


CUT = {"data__episodes": "file", "data__keep_failures": "true"}


@pytest.fixture
def one_bag(tmp_path: Path) -> Path:
    """A folder with one recording of three demonstrations and its sidecar."""
    bag = write_bag(tmp_path / "bags" / "session", session().messages(), "mcap")
    (bag / "episodes.yaml").write_text(SIDECAR)
    return tmp_path / "bags"


def contract_of(output: Path) -> dict:
    return json.loads((output / "last/pretrained_model/train_config.json").read_text())


def data_settings(output: Path) -> dict:
    """The settings that a run's bags were read with, from its checkpoint."""
    config = contract_of(output)["config"]
    folders = {name: Path(config["data"][name]) for name in ("bag_dir", "cache_dir")}
    return {**config["data"], **config["conventions"], **folders}


def test_one_bag_with_three_demonstrations_holds_one_out(one_bag: Path, tmp_path: Path, capsys):
    """Validated on, and said, with what that is worth; decoded once; evaluated by its name, with the states and frames
    that training had; resumed only as it was cut."""
    output = run(one_bag, tmp_path, **CUT, training__steps=2)
    said, contract = capsys.readouterr().out, contract_of(output)
    (held_out,) = contract["held_out_episodes"]
    everything = sorted([*contract["training_episodes"], held_out])
    assert everything == [f"session@{s}s" for s in ("00000.500", "00004.500", "00008.500")]
    assert f"2 episodes, 1 held out ({held_out})" in said and "held-out episodes of session are from recordings" in said
    assert len(metrics(output, "val_l1_loss")) == 1 and len(entries(tmp_path / "tiny-cache")) == 1
    report = json.loads((output / "sync_report.json").read_text())
    assert [e["episode"] for e in report["episodes"]] == everything
    assert report["held_out"] == json.loads((output / "summary.json").read_text())["episodes"] == [held_out]

    fixed = ["--device", "cpu", "--backend", "native", "--output", str(tmp_path / "eval")]
    assert offline_eval.main(["--checkpoint", str(output), "--bags", str(one_bag), *fixed]) == 0
    evaluated = json.loads((tmp_path / "eval/summary.json").read_text())
    assert [e["name"] for e in evaluated["episodes"]] == [held_out]
    values = data_settings(output)
    episodes, _ = load_episodes(settings_from(values), progress=False)
    index = [e.name for e in episodes].index(held_out)
    table = pq.read_table(tmp_path / f"eval/episode_{index:03d}.parquet")
    np.testing.assert_allclose(table["joint_position_elbow"].to_numpy(), episodes[index].state[:-1, 2], atol=1e-6)
    source = BagSource(one_bag, values, values["cache_dir"])
    dataset = ChunkDataset([episodes[index]], 1)
    for frame in source.frames(index, 0, 9):
        np.testing.assert_array_equal(frame.images["color"], dataset[frame.index]["observation.images.color"])
    sha256 = source.identity["sha256"]
    assert source.identity["episodes"] == 3 and source.identity["read_with"]["episodes"] == "file"

    sidecar = one_bag / "session/episodes.yaml"
    sidecar.write_text(SIDECAR.replace("stop_s: 11.5", "stop_s: 11.0"))
    assert BagSource(one_bag, values, values["cache_dir"]).identity["sha256"] != sha256
    resume = CUT | {"training__steps": 3}
    assert train.main(arguments(one_bag, tmp_path, ("--resume",), **resume)) == 1
    assert (
        "cannot resume, the run has changed" in (error := capsys.readouterr().err) and "(session@00008.500s)" in error
    )
    sidecar.write_text(SIDECAR)
    assert train.main(arguments(one_bag, tmp_path, ("--resume",), **resume | {"data__episodes": "bag"})) == 1
    assert "data.episodes (was file, is bag)" in capsys.readouterr().err
    run(one_bag, tmp_path, "--resume", **resume)
    assert contract_of(output)["held_out_episodes"] == [held_out]


def test_a_run_from_before_episodes_were_cut_goes_on(sample_bags: Path, tmp_path: Path, monkeypatch, capsys):
    """Its fingerprint has none of the keys: one bag was one episode, and is; so it is for its evaluation."""
    fingerprint, before = identity.fingerprint, identity.BEFORE_CUTTING
    quick = {"training__steps": 2, "training__val_fraction": 0}
    with monkeypatch.context() as patch:
        patch.setattr(identity, "fingerprint", lambda *a: {k: v for k, v in fingerprint(*a).items() if k not in before})
        output = run(sample_bags, tmp_path, **quick)
    assert not set(before) & set(load_training_state(output / "last")["fingerprint"])
    still = arguments(sample_bags, tmp_path, ("--resume",), data__episodes="still", data__trim_still_s=0.1, **quick)
    assert train.main(still) == 1
    error = capsys.readouterr().err
    assert "data.episodes (was bag, is still)" in error and "data.trim_still_s (was None, is 0.1)" in error
    run(sample_bags, tmp_path, "--resume", **quick | {"training__steps": 3})
    assert set(before) < set(load_training_state(output / "last")["fingerprint"])
    values = data_settings(output)
    for key in (
        "episodes",
        "episode_pause_s",
        "episode_marker_topic",
        "keep_failures",
        "trim_still_s",
        "min_episode_s",
    ):
        del values[key]
    source = BagSource(sample_bags, values, tmp_path / "cache")
    assert [source.episode_name(i) for i in source.episode_indices()] == [bag.name for bag in find_bags(sample_bags)]


def test_a_bag_that_cannot_be_cut_is_one_episode_that_cannot_be_evaluated(one_bag: Path, tmp_path: Path):
    """A bag without its sidecar is an error when it is asked for; the episodes of the others have their places."""
    shutil.copytree(one_bag / "session", one_bag / "again")
    (one_bag / "again/episodes.yaml").unlink()
    values = settings(one_bag, episodes="file").__dict__ | {"camera_topic": None}
    source = BagSource(one_bag, values, tmp_path / "cache")
    assert [source.episode_name(i) for i in source.episode_indices()] == [
        "again", "session@00000.500s", "session@00008.500s"
    ]  # fmt: skip
    with pytest.raises(offline_eval.SourceError, match=r"again: .*episodes.yaml: not there"):
        source.episode(0)
    assert source.episode(2).name == "session@00008.500s"


# -- the summary --------------------------------------------------------------------------------------------------


def test_the_summary_of_a_long_episode_looks_at_few_frames(sample_bags: Path, tmp_path: Path, monkeypatch, capsys):
    """Errors are averaged over frames evenly from all of it, the picture has a stretch without holes, it is said how
    many of all these are; there is a progress bar. (Ten frames are a long episode here.)"""
    asked: list[int] = []
    predict, original = validation.predict, summary.draw
    monkeypatch.setattr(validation, "predict", lambda *a: (asked.extend(a[3]["index"].tolist()), predict(*a))[1])
    drawn: list[np.ndarray] = []
    monkeypatch.setattr(summary, "draw", lambda *a: (drawn.append(a[2]), original(*a))[1])
    output = run(sample_bags, tmp_path, training__steps=2)
    facts, said = json.loads((output / "summary.json").read_text()), capsys.readouterr()
    episodes, _ = load_episodes(settings_from(data_settings(output)), progress=False)
    (episode,) = (e for e in episodes if [e.name] == facts["episodes"])
    count = len(episode.time_ns) - 1
    evenly = [i * count // 10 for i in range(10)]
    middle = list(range((count - 10) // 2, (count - 10) // 2 + 10))
    assert count > 50 and asked == evenly + middle and drawn[0].tolist() == middle
    assert (facts["frames"], facts["frames_in_episodes"]) == (10, count)
    batch = {k: torch.from_numpy(v) for k, v in ChunkDataset([episode], 8).__getitems__(evenly).items()}
    batch["observation.images.color"] = batch["observation.images.color"].permute(0, 3, 1, 2) / 255
    predicted = load_policy(output).predict_chunk({k: v for k, v in batch.items() if k.startswith("observation.")})
    expected = np.abs(predicted[:, 0].numpy() - episode.action[evenly]).mean()
    assert facts["mae_rad"]["policy"] == pytest.approx(expected, rel=1e-4)
    assert f"on 1 held-out episode (10 of {count} frames, evenly): policy" in said.out
    assert "summary: 100%" in said.err and "20/20" in said.err


def test_a_signal_during_the_summary_ends_it(sample_bags: Path, tmp_path: Path, monkeypatch, capsys):
    """Exit 75: all is saved but the summary, which --resume makes; nothing half-made is left."""
    predict, quick = validation.predict, {"training__steps": 2, "training__val_fraction": 0}
    with monkeypatch.context() as patch:
        patch.setattr(validation, "predict", lambda *a: (signal.raise_signal(signal.SIGTERM), predict(*a))[1])
        assert train.main(arguments(sample_bags, tmp_path, **quick)) == 75
    error = capsys.readouterr().err
    assert "stopped by SIGTERM during the summary; the training is complete and saved, --resume sums it up" in error
    output = tmp_path / "run"
    assert (output / STOP_MARKER).exists() and not list(output.glob("summary.*"))
    assert load_training_state(output / "last")["step"] == 2
    run(sample_bags, tmp_path, "--resume", **quick)
    assert (output / "summary.json").exists() and (output / "summary.png").exists()


def test_a_stop_during_the_summary_waits_for_no_rank():
    """The other ranks have left by then, and the process group with them."""
    World(rank=0, local_rank=0, size=2, node=0, nodes=1).leave_stopped(together=True)
