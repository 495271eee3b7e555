"""The offline evaluation through its real entry: what it writes is what the policy does, every way to be wrong about
the data is one line, and a gate stops a chain."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ur10e_deploy import compare, offline_eval, report
from ur10e_deploy.checks import EvalError, check_data, check_source, told_action_mode
from ur10e_deploy.episode_result import ChunkErrors
from ur10e_deploy.lerobot_dataset import LeRobotDatasetSource
from ur10e_deploy.policy_runner import PolicyRunner
from ur10e_deploy.results import positions_ahead, screen
from ur10e_deploy.sources import AbsentVideo, BagSource, EpisodeData

from lerobot_checkpoint import load_policy
from rosbag_dataset import UR_JOINTS, ChunkDataset, Episode, load_episodes, settings_from, wrap_to_pi
from tests.bags import make_take, write_bag
from tests.once import once
from tests.policies import contract_of, exchange, trained, trained_absolute, trained_relative
from tests.tiny import ROOT
from ur10e import link_frames

__all__ = ["exchange", "trained", "trained_absolute", "trained_relative"]  # fixtures

JOINTS = [name.removesuffix("_joint") for name in UR_JOINTS]
PER_JOINT = ("joint_position", "predicted_action", "gt_action", "abs_error")


def evaluate(checkpoint: Path, output: Path, *flags: str, bags: Path | None = None, dataset: Path | None = None) -> int:
    """The command in this process; -> its exit code. Native and on the CPU unless the flags say otherwise."""
    data = ["--bags", str(bags)] if bags else ["--dataset", str(dataset)]
    options = [] if "--backend" in flags else ["--backend", "native"]
    fixed = ["--checkpoint", str(checkpoint), "--output", str(output), "--device", "cpu", *options]
    return offline_eval.main([*fixed, *data, *flags])


def refused(capsys: pytest.CaptureFixture, run, *arguments: Any, **options: Any) -> str:
    """The one line of a run that must exit 1."""
    capsys.readouterr()
    try:
        code = run(*arguments, **options)
    except SystemExit as stop:  # argparse
        code = stop.code
    err = capsys.readouterr().err
    assert code == 1
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err and err.strip().endswith(lines[0]), err
    return lines[0]


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def columns(folder: Path, prefix: str, file: str = "episode_000.parquet") -> np.ndarray:
    """(N, 6) of a group of columns."""
    table = pq.read_table(folder / file)
    return np.stack([table[f"{prefix}_{name}"].to_numpy() for name in JOINTS], axis=1)


@pytest.fixture(scope="session")
def evaluated(trained: Path, sample_bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Episodes 3 (held out) and 0 (trained on) of the sample bags, with a rollout; by LeRobot, in chunks of 8."""

    def make(folder: Path) -> None:
        flags = ("--episode", "3", "0", "--rollout", "--backend", "lerobot")
        assert evaluate(trained, folder / "out", *flags, bags=sample_bags) == 0

    return once(tmp_path_factory, "evaluated", make) / "out"


# -- an independent way to the same numbers -----------------------------------------------------------------------


def episodes_as_trained(checkpoint: Path, bags: Path) -> list[Episode]:
    config = contract_of(checkpoint)["config"]
    folders = {"bag_dir": bags, "cache_dir": Path(config["data"]["cache_dir"])}
    return load_episodes(settings_from({**config["data"], **config["conventions"], **folders}), progress=False)[0]


def chunks_of(checkpoint: Path, episode: Episode) -> tuple[np.ndarray, np.ndarray]:
    """Every frame that has an action, through the trainer's own dataset in one batch: -> (chunks (N, 8, 6), frames)."""
    policy, dataset = load_policy(checkpoint), ChunkDataset([episode], 8)
    batch = dataset.__getitems__(range(len(dataset)))
    observation = {"observation.state": torch.from_numpy(batch["observation.state"])}
    for camera in episode.image_shape:
        pixels = torch.from_numpy(batch[f"observation.images.{camera}"])
        observation[f"observation.images.{camera}"] = pixels.permute(0, 3, 1, 2).float() / 255
    return policy.predict_chunk(observation).numpy(), np.array([dataset.locate(i)[1] for i in range(len(dataset))])


# -- what it writes ------------------------------------------------------------------------------------------------


def test_the_files_of_an_evaluation(evaluated: Path):
    expected = {f"episode_{i:03d}{end}" for i in (0, 3) for end in (".parquet", ".png", "_rollout.png")}
    expected |= {"all_episodes.parquet", "overview.png", "report.html", "summary.json"}
    assert {p.name for p in evaluated.iterdir()} == expected


def test_the_columns_are_the_seeds_with_units(evaluated: Path):
    """joint_position_*, predicted_action_*, gt_action_*, abs_error_*, inference_time_s, step, frame and episode index,
    timestamp; every physical quantity says its unit in the schema."""
    schema = pq.read_schema(evaluated / "episode_003.parquet")
    groups = [f"{group}_{joint}" for group in (*PER_JOINT, "rollout_position") for joint in JOINTS]
    plain = ["episode_index", "step", "frame_index", "timestamp"]
    assert schema.names == [*plain, *groups, "inference_time_s", "control_step_s"]
    unit = {name: (schema.field(name).metadata or {}).get(b"unit", b"").decode() for name in schema.names}
    assert {unit[f"{group}_elbow"] for group in ("joint_position", "rollout_position")} == {"rad"}
    assert {unit[f"{group}_elbow"] for group in PER_JOINT[1:]} == {"rad per frame"}
    assert unit["timestamp"] == unit["inference_time_s"] == unit["control_step_s"] == "s"
    assert b"elbow_joint" in schema.field("gt_action_elbow").metadata[b"description"]
    assert schema.metadata[b"action_mode"] == b"delta"


def test_every_number_is_what_the_policy_does(evaluated: Path, trained: Path, sample_bags: Path):
    """States, recorded and predicted actions and errors of each step equal those of the trainer's own data path and
    load_policy, although LeRobot ran here: chunks of 8, the queue executed to its end."""
    episodes = episodes_as_trained(trained, sample_bags)
    for index in (0, 3):
        episode, file = episodes[index], f"episode_{index:03d}.parquet"
        chunks, frames = chunks_of(trained, episode)
        table = pq.read_table(evaluated / file)
        np.testing.assert_array_equal(table["frame_index"], frames)
        np.testing.assert_array_equal(table["step"], np.arange(len(frames)))
        assert set(table["episode_index"].to_pylist()) == {index}
        np.testing.assert_allclose(table["timestamp"], (episode.time_ns[frames] - episode.time_ns[0]) / 1e9)
        np.testing.assert_array_equal(columns(evaluated, "joint_position", file), episode.state[frames])
        np.testing.assert_array_equal(columns(evaluated, "gt_action", file), episode.action[frames])
        steps = np.arange(len(frames))
        expected = chunks[steps - steps % 8, steps % 8]
        np.testing.assert_allclose(columns(evaluated, "predicted_action", file), expected, rtol=0, atol=1e-5)
        error = np.abs(columns(evaluated, "predicted_action", file) - episode.action[frames])
        np.testing.assert_array_equal(columns(evaluated, "abs_error", file), error)
        inferred = table["inference_time_s"].is_valid().to_numpy()
        np.testing.assert_array_equal(inferred, steps % 8 == 0)  # null: from the queue, and in no average of latency
        assert (table["control_step_s"].to_numpy()[inferred] > 0).all()


def test_the_summary_is_of_all_steps(evaluated: Path, trained: Path, sample_bags: Path):
    """Overall and per joint MAE, RMSE and largest error, and both baselines, recomputed from the parquet file."""
    summary, file = summary_of(evaluated), "all_episodes.parquet"
    assert pq.read_table(evaluated / file)["episode_index"].to_pylist() == [3] * 94 + [0] * 94
    recorded, predicted = (columns(evaluated, p, file).astype(np.float64) for p in ("gt_action", "predicted_action"))
    mean_action = load_policy(trained).stats["action"]["mean"]
    for name, action in {
        "policy": predicted,
        "no motion": 0 * recorded,
        "mean action": mean_action + 0 * recorded,
    }.items():
        error, found = np.abs(action - recorded), summary["error"][name]
        assert found["mae"] == pytest.approx(error.mean(), rel=1e-6)
        assert found["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-6)
        assert found["max"] == pytest.approx(error.max(), rel=1e-6)
        for j, joint in enumerate(JOINTS):
            assert found["per_joint"][joint]["mae"] == pytest.approx(error[:, j].mean(), rel=1e-6)
    assert summary["unit"] == "rad per frame" and summary["frames"] == 188
    better = summary["error"]["policy"]["mae"] < min(summary["error"][b]["mae"] for b in ("no motion", "mean action"))
    assert summary["verdict"]["better_than_baselines"] is better
    assert [e["trained_on"] for e in summary["episodes"]] == [False, True]
    by_episode = [e["mae"]["policy"] for e in summary["episodes"]]
    assert np.mean(by_episode) == pytest.approx(summary["error"]["policy"]["mae"])
    assert any("training saw episode_000" in note for note in summary["notes"])


@pytest.mark.parametrize("mode, every", [("chunk", 8), ("every-step", 1)])
def test_error_by_position_in_the_chunk(trained, sample_bags, tmp_path, mode, every):
    """Each inferred chunk against the actions recorded from there, up to the episode's end and no further."""
    assert evaluate(trained, tmp_path / "out", "--mode", mode, "--episode", "1", bags=sample_bags) == 0
    episode = episodes_as_trained(trained, sample_bags)[1]
    chunks, frames = chunks_of(trained, episode)
    per_position: list[list[float]] = [[] for _ in range(8)]
    for i in range(0, len(frames), every):
        for ahead in range(min(8, len(frames) - i)):
            per_position[ahead].append(np.abs(chunks[i, ahead] - episode.action[frames[i + ahead]]).mean())
    found = summary_of(tmp_path / "out")["error_by_chunk_position"]
    assert found["count"] == [len(errors) for errors in per_position]
    np.testing.assert_allclose(found["mae"], [np.mean(errors) for errors in per_position], rtol=1e-3)


def test_a_rollout_follows_the_policys_own_actions(evaluated: Path, trained: Path, sample_bags: Path):
    """Deltas are added up from the first recorded state on; the images stay the recorded ones."""
    source = source_of(sample_bags, Path(contract_of(trained)["config"]["data"]["cache_dir"]), trained)
    runner = PolicyRunner(trained, backend="native", device="cpu")
    path, position = [], None
    for frame in source.frames(3, 0, 94):
        position = frame.state_rad.astype(np.float64) if position is None else position
        path.append(position)
        position = position + runner.predict(position, frame.images)
    found = columns(evaluated, "rollout_position", "episode_003.parquet")
    np.testing.assert_allclose(found, path, rtol=0, atol=1e-4)
    drift = np.abs(found - columns(evaluated, "joint_position", "episode_003.parquet"))
    assert drift[0].max() == 0 and drift[-1].max() > 1e-3
    summary = summary_of(evaluated)["rollout"]
    other = np.abs(columns(evaluated, "rollout_position") - columns(evaluated, "joint_position"))
    assert summary["pieces"] == 2 and summary["max_rad"] == pytest.approx(max(drift.max(), other.max()), rel=1e-6)
    assert summary["final_mean_rad"] == pytest.approx(np.mean([drift[-1], other[-1]]), rel=1e-6)
    first = [d[:8] for d in (drift, other)]  # 0 to 0.25 s
    assert summary["over_time"][0]["mean_rad"] == pytest.approx(np.mean(first), rel=1e-6)


def test_nothing_crosses_a_cut_in_the_recording(trained: Path, tmp_path: Path):
    """A bag whose camera stopped for half a second: queue, chunk errors and rollout start anew behind the cut."""
    take = make_take(seconds=2.0, size=(12, 16))
    gone = np.zeros(len(take.images), bool)
    gone[20:36] = True  # 18 frames in front of the cut: the third chunk of 8 is cut short there
    messages, image = [], 0
    for topic, time_ns, message in take.messages():
        if topic.endswith("image_raw"):
            image += 1
            if gone[image - 1]:
                continue
        messages.append((topic, time_ns, message))
    write_bag(tmp_path / "bags/cut", messages)
    assert evaluate(trained, tmp_path / "out", "--rollout", bags=tmp_path / "bags") == 0
    (episode,) = episodes_as_trained(trained, tmp_path / "bags")
    assert len(episode.segments) == 2
    chunks, frames = chunks_of(trained, episode)
    start = np.array([episode.segments[episode.segments[:, 0] <= t][-1, 0] for t in frames])
    position = (frames - start) % 8
    row_of = {t: i for i, t in enumerate(frames)}
    expected = np.stack([chunks[row_of[t - p], p] for t, p in zip(frames, position, strict=True)])
    np.testing.assert_allclose(columns(tmp_path / "out", "predicted_action"), expected, rtol=0, atol=1e-5)
    first = frames == start
    rolled, recorded = (columns(tmp_path / "out", p) for p in ("rollout_position", "joint_position"))
    np.testing.assert_array_equal(rolled[first], recorded[first])
    summary = summary_of(tmp_path / "out")
    assert summary["rollout"]["pieces"] == 2 and summary["episodes"][0]["frames_without_action"] == 2
    lengths = [stop - begin - 1 for begin, stop in episode.segments]  # with an action
    counts = [sum(max(0, min(8, n - i)) > ahead for n in lengths for i in range(0, n, 8)) for ahead in range(8)]
    assert summary["error_by_chunk_position"]["count"] == counts


def test_start_frame_and_num_steps(trained: Path, sample_bags: Path, tmp_path: Path):
    flags = ("--episode", "2", "--start-frame", "40", "--num-steps", "5", "--mode", "ensemble")
    assert evaluate(trained, tmp_path / "out", *flags, bags=sample_bags) == 0
    table = pq.read_table(tmp_path / "out/episode_002.parquet")
    assert table["frame_index"].to_pylist() == [40, 41, 42, 43, 44] and table["step"].to_pylist() == [0, 1, 2, 3, 4]
    assert not (tmp_path / "out/all_episodes.parquet").exists()
    summary = summary_of(tmp_path / "out")
    assert summary["policy"]["ensemble_m"] == 0.01 and summary["latency"]["inference"]["count"] == 5
    assert summary["selection"] == {"episodes": [2], "start_frame": 40, "num_steps": 5}


def test_who_was_evaluated_on_what(evaluated: Path, trained: Path, sample_bags: Path):
    """Checkpoint: path, step, SHA-256 of its weights, the trainer's code; dataset: its identity; versions, mode."""
    summary = summary_of(evaluated)
    weights = (trained / "last/pretrained_model/model.safetensors").read_bytes()
    policy = summary["policy"]
    assert policy["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert policy["step"] == 6 and policy["name"] == "run/checkpoint_000006"
    assert policy["trained_by"] == contract_of(trained)["code"]
    assert (policy["backend"], policy["backend_version"], policy["mode"]) == ("lerobot", "0.3.2", "chunk")
    assert summary["dataset"]["path"] == str(sample_bags) and len(summary["dataset"]["sha256"]) == 64
    assert summary["versions"]["torch"] == str(torch.__version__) and summary["versions"]["lerobot"] == "0.3.2"
    latency = summary["latency"]
    assert latency["inference"]["count"] == 24 and latency["cached_pop"]["count"] == 164  # 12 chunks of 8 in 94, twice


# -- LeRobot datasets ----------------------------------------------------------------------------------------------


def test_a_dataset_gives_what_its_bags_give(exchange: Path, trained: Path, sample_bags: Path, tmp_path: Path):
    """The same two episodes, converted by LeRobot 0.4.4 itself: state, action and lossless images at the camera's size
    give the same actions step by step. All episodes are the default; what was told from the numbers is said."""
    assert evaluate(trained, tmp_path / "dataset", dataset=exchange / "dataset") == 0
    assert evaluate(trained, tmp_path / "bags", "--episode", "0", "1", bags=sample_bags) == 0
    for file in ("episode_000.parquet", "episode_001.parquet"):
        for prefix in PER_JOINT:
            from_bags = columns(tmp_path / "bags", prefix, file)
            np.testing.assert_array_equal(columns(tmp_path / "dataset", prefix, file)[: len(from_bags)], from_bags)
    notes = summary_of(tmp_path / "dataset")["notes"]
    assert any("the recorded actions are delta, told from the numbers" in note for note in notes)
    assert any("color are resized from 96x128 to 32x48 (HxW), as in training: that changes" in note for note in notes)


def without_contract(trained: Path, folder: Path) -> Path:
    """What LeRobot itself would have written: the same policy, nothing about the robot."""
    copy = Path(shutil.copytree(trained / "last/pretrained_model", folder / "lerobot-like"))
    (copy / "train_config.json").unlink()
    return copy


def test_a_policy_without_a_contract_is_evaluated_by_flags(exchange, trained, tmp_path, capsys):
    """What is missing is demanded; with the flags the numbers are the same, and the report says where they are from."""
    policy, dataset = without_contract(trained, tmp_path), exchange / "dataset"
    line = refused(capsys, evaluate, policy, tmp_path / "out", dataset=dataset)
    assert "say --action-mode (delta or absolute or relative) and --wrap or --no-wrap" in line
    flags = ("--action-mode", "delta", "--wrap", "--episode", "1")
    line = refused(capsys, evaluate, policy, tmp_path / "out", *flags, dataset=dataset)
    assert (
        "images of camera color are 96x128; the policy was trained on 32x48" in line and "--image-resize 32 48" in line
    )
    flags = (*flags, "--image-resize", "32", "48")
    line = refused(capsys, evaluate, policy, tmp_path / "out", *flags, bags=dataset)
    assert "--bags" in line and "use --dataset" in line
    assert evaluate(policy, tmp_path / "out", *flags, dataset=dataset) == 0
    assert evaluate(trained, tmp_path / "contract", "--episode", "1", dataset=dataset) == 0
    for prefix in PER_JOINT:
        ours, theirs = (columns(tmp_path / f, prefix, "episode_001.parquet") for f in ("out", "contract"))
        np.testing.assert_array_equal(ours, theirs)
    assert any(
        "no contract in the checkpoint; by flags: delta actions, wrapped" in n
        for n in summary_of(tmp_path / "out")["notes"]
    )
    flags = ("--action-mode", "absolute", "--wrap", "--image-resize", "32", "48")
    line = refused(capsys, evaluate, policy, tmp_path / "other", *flags, dataset=dataset)
    assert "its actions are delta (mean |action - (next state - state)|" in line and "the policy's are absolute" in line


def edited_dataset(exchange: Path, folder: Path, change) -> Path:
    dataset = Path(shutil.copytree(exchange / "dataset", folder / "dataset"))
    info = json.loads((dataset / "meta/info.json").read_text())
    change(info)
    (dataset / "meta/info.json").write_text(json.dumps(info))
    return dataset


def rename_joints(names: list[str]):
    return lambda info: [info["features"][key].update(names=names) for key in ("observation.state", "action")]


def rename_camera(info: dict) -> None:
    info["features"]["observation.images.top"] = info["features"].pop("observation.images.color")


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda info: info.update(fps=10), "at 10 frames per second; the policy was trained at 30"),
        (rename_joints([UR_JOINTS[i] for i in (2, 1, 0, 3, 4, 5)]), "joints are elbow_joint, .* another order"),
        (rename_joints([f"{JOINTS[i]}.pos" for i in (2, 1, 0, 3, 4, 5)]), "joints are elbow.pos, .* another order"),
    ],
)
def test_a_dataset_that_means_something_else_is_refused(exchange, trained, tmp_path, capsys, change, line):
    dataset = edited_dataset(exchange, tmp_path, change)
    assert re.search(line, refused(capsys, evaluate, trained, tmp_path / "out", dataset=dataset))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [[f"{joint}.pos" for joint in JOINTS], [f"motor_{j}" for j in range(6)]])
def test_other_names_of_the_same_joints_are_said(exchange: Path, trained: Path, tmp_path: Path, names: list[str]):
    dataset = edited_dataset(exchange, tmp_path, rename_joints(names))
    assert evaluate(trained, tmp_path / "out", "--num-steps", "3", dataset=dataset) == 0
    notes = summary_of(tmp_path / "out")["notes"]
    assert any(f"joints {', '.join(names)} are taken to be the policy's" in note for note in notes)


# -- absolute actions ----------------------------------------------------------------------------------------------


def test_an_absolute_policy_and_its_baseline(trained_absolute: Path, sample_bags: Path, tmp_path: Path):
    """Errors in rad; no motion is the present position; a rollout goes where the policy says. Nothing was held out."""
    assert evaluate(trained_absolute, tmp_path / "out", "--episode", "4", "--rollout", bags=sample_bags) == 0
    summary = summary_of(tmp_path / "out")
    assert summary["unit"] == "rad" and summary["policy"]["mode"] == "ensemble"
    position, predicted, recorded = (columns(tmp_path / "out", p, "episode_004.parquet") for p in PER_JOINT[:3])
    assert summary["error"]["no motion"]["mae"] == pytest.approx(
        np.abs(wrap_to_pi(recorded - position)).mean(), rel=1e-4
    )
    assert summary["error"]["policy"]["mae"] == pytest.approx(np.abs(recorded - predicted).mean(), rel=1e-4)
    rolled = columns(tmp_path / "out", "rollout_position", "episode_004.parquet")
    assert np.abs(rolled[1:] - predicted[:-1]).max() < 0.5 * np.abs(predicted).max()  # jumps where the policy points


def test_a_relative_policy_is_compared_by_where_it_leads(trained_relative: Path, sample_bags: Path, tmp_path: Path):
    """Offsets count from the state in which the chunk was predicted; what is queued and compared are positions."""
    out = tmp_path / "out"
    assert evaluate(trained_relative, out, "--episode", "4", "--mode", "chunk", bags=sample_bags) == 0
    summary = summary_of(out)
    assert summary["unit"] == "rad" and summary["contract"]["action_mode"] == "relative"
    position, predicted, recorded = (columns(out, p, "episode_004.parquet") for p in PER_JOINT[:3])
    np.testing.assert_allclose(recorded[:-1], position[1:], atol=1e-5)
    network = load_policy(trained_relative)
    source = source_of(sample_bags, tmp_path / "cache", trained_relative)
    image = torch.from_numpy(next(iter(source.frames(4))).images["color"]).permute(2, 0, 1)[None] / 255
    state = torch.from_numpy(position[:1].astype(np.float32))
    offsets = network.predict_chunk({"observation.state": state, "observation.images.color": image})[0].numpy()
    np.testing.assert_allclose(predicted[: len(offsets)], position[0] + offsets, atol=1e-5)


def source_of(bags: Path, cache: Path, checkpoint: Path, **changes: Any) -> BagSource:
    config = contract_of(checkpoint)["config"]
    return BagSource(bags, {**config["data"], **config["conventions"], **changes}, cache)


def test_no_motion_is_on_the_turn_of_the_recorded_action(trained_absolute: Path, tmp_path: Path):
    """The state is wrapped, absolute actions are not: behind the seam both differ by a turn, and standing still is not
    an error of 2 pi."""

    def path(t: np.ndarray) -> np.ndarray:
        return np.stack([seam - 0.14 + 0.4 * t] + [0.3 * np.sin(t + j) for j in range(5)], axis=1)

    reference = contract_of(trained_absolute)["angle_reference_rad"][0]
    seam = reference + np.pi  # which the joint passes after 0.35 s
    write_bag(tmp_path / "bags/seam", make_take(seconds=1.5, size=(12, 16), path=path).messages())
    assert evaluate(trained_absolute, tmp_path / "out", bags=tmp_path / "bags") == 0
    position, recorded = (columns(tmp_path / "out", p) for p in ("joint_position", "gt_action"))
    assert position[-1, 0] < reference < position[0, 0] and np.isfinite(recorded).all()
    per_joint = summary_of(tmp_path / "out")["error"]["no motion"]["per_joint"]
    assert per_joint["shoulder_pan"]["max"] == pytest.approx(0.4 / 30, rel=0.05)


@pytest.mark.parametrize("mode", ["delta", "absolute"])
def test_the_kind_of_action_is_told_from_the_numbers(trained: Path, sample_bags: Path, tmp_path: Path, mode: str):
    """Exactly recorded ones, and commands that lead the measured joints by three frames; neither when it is neither."""
    contract = PolicyRunner(trained, backend="native", device="cpu").contract
    source = source_of(sample_bags, tmp_path, trained, action_mode=mode)
    data = source.episode(0)
    assert told_action_mode([data], contract)[0] == mode
    leading = np.roll(data.action, -3, axis=0)
    leading[-4:] = np.nan
    object.__setattr__(data, "action", leading)
    assert told_action_mode([data], contract)[0] == mode
    object.__setattr__(data, "action", np.full_like(leading, 20.0))
    assert told_action_mode([data], contract)[0] is None


def test_data_unlike_the_training_data_are_said(trained: Path, sample_bags: Path, tmp_path: Path):
    """Degrees, another sign or another joint order change nothing that is checked otherwise: the numbers show it."""
    runner = PolicyRunner(trained, backend="native", device="cpu")
    source = source_of(sample_bags, tmp_path, trained)
    assert check_data([source.episode(0)], source, runner) == []
    flipped = source_of(sample_bags, tmp_path, trained, apply_joint_sign=True, joint_sign=[1, -1, 1, 1, 1, 1])
    (note,) = check_data([flipped.episode(0)], flipped, runner)
    assert re.match("shoulder_lift is more than 6 standard deviations .* in 100% of the frames", note)


# -- which episodes ------------------------------------------------------------------------------------------------


def test_the_default_of_bags_is_what_training_held_out(trained: Path, sample_bags: Path, tmp_path: Path, capsys):
    assert evaluate(trained, tmp_path / "out", "--num-steps", "3", bags=sample_bags) == 0
    summary = summary_of(tmp_path / "out")
    assert [e["name"] for e in summary["episodes"]] == contract_of(trained)["held_out_episodes"]
    assert "those that training held out" in capsys.readouterr().out

    seen = tmp_path / "seen"  # only bags that were trained on: nothing to choose by itself
    shutil.copytree(sample_bags / "episode_000", seen / "episode_000")
    line = refused(capsys, evaluate, trained, tmp_path / "other", bags=seen)
    assert "no held-out episode of the checkpoint is in it" in line and "choose with --episode" in line

    shutil.move(seen / "episode_000", tmp_path / "new" / "never_seen")
    assert evaluate(trained, tmp_path / "other", "--num-steps", "3", bags=tmp_path / "new") == 0
    assert any("training saw none" in note for note in summary_of(tmp_path / "other")["notes"])


def test_missing_episodes_are_refused_or_skipped_as_asked(trained: Path, sample_bags: Path, tmp_path: Path, capsys):
    """The chain asks for episodes 0 1 2 3 of whatever it was given."""
    flags = ("--num-steps", "2", "--episode", "5", "6", "9")
    line = refused(capsys, evaluate, trained, tmp_path / "out", *flags, bags=sample_bags)
    assert "no episode 6, 9" in line and "it has 6 episodes, 0 to 5" in line and "--skip-missing-episodes" in line
    assert evaluate(trained, tmp_path / "out", *flags, "--skip-missing-episodes", bags=sample_bags) == 0
    summary = summary_of(tmp_path / "out")
    assert summary["selection"]["episodes"] == [5]
    assert any("episodes 6, 9 are skipped" in note for note in summary["notes"])
    flags = ("--skip-missing-episodes", "--episode", "7")
    assert "none of 7 is in" in refused(capsys, evaluate, trained, tmp_path / "none", *flags, bags=sample_bags)


def test_episodes_without_their_videos_are_refused_or_skipped_as_asked(
    trained: Path, exchange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """A dataset that was copied in part. (That an absent file raises AbsentVideo is tests/test_deploy_dataset.py's.)"""
    read, absent = LeRobotDatasetSource.episode, {0}

    def episode(self: LeRobotDatasetSource, index: int) -> EpisodeData:
        if index in absent:
            raise AbsentVideo(f"file-{index:03d}.mp4: is absent")
        return read(self, index)

    monkeypatch.setattr(LeRobotDatasetSource, "episode", episode)
    flags, dataset = ("--num-steps", "2", "--skip-missing-episodes"), exchange / "dataset"
    assert "is absent" in refused(capsys, evaluate, trained, tmp_path / "out", "--num-steps", "2", dataset=dataset)
    assert evaluate(trained, tmp_path / "out", *flags, dataset=dataset) == 0
    summary = summary_of(tmp_path / "out")
    assert summary["selection"]["episodes"] == [1]
    assert "episodes 0 are skipped: videos of theirs are absent" in summary["notes"]
    absent.add(1)
    line = refused(capsys, evaluate, trained, tmp_path / "none", *flags, dataset=dataset)
    assert "none of the 2 episodes has all its videos" in line


# -- gates and exit codes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gates, code",
    [
        (("--max-mae", "1", "--max-p99-ms", "1e6"), 0),
        (("--max-mae", "1e-9"), 3),
        (("--max-p99-ms", "1e-3"), 3),
        (("--max-mae", "1", "--max-p99-ms", "1e-3"), 3),
        (("--max-mae", "nan"), 3),
    ],
)
def test_gates(trained, sample_bags, tmp_path, capsys, gates, code):
    """Exit 3 when a gate is exceeded, with all results written; a policy that is merely bad exits 0."""
    assert evaluate(trained, tmp_path / "out", "--num-steps", "12", *gates, bags=sample_bags) == code
    (held_out,) = contract_of(trained)["held_out_episodes"]
    for name in ("summary.json", "report.html", f"{held_out}.parquet", f"{held_out}.png"):
        assert (tmp_path / "out" / name).exists()
    found = summary_of(tmp_path / "out")["verdict"]["gates"]
    assert [gate["gate"] for gate in found] == list(gates[::2])
    assert all(gate["passed"] for gate in found) == (code == 0)
    assert ("EXCEEDED" in capsys.readouterr().out) == (code == 3)


def test_the_command_line_as_a_user_runs_it(trained: Path, sample_bags: Path, tmp_path: Path):
    """python -m ur10e_deploy.offline_eval: exit codes reach the shell, errors are one line without a traceback."""
    command = [sys.executable, "-m", "ur10e_deploy.offline_eval", "--bags", str(sample_bags), "--num-steps", "2"]
    command += ["--device", "cpu", "--output", str(tmp_path / "out"), "--max-mae", "1e-9", "--checkpoint"]
    env = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'deploy'}",
        "PATH": "/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
    }
    run = subprocess.run([*command, str(trained)], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 3 and "Traceback" not in run.stderr, run.stderr
    assert f"open first  {tmp_path / 'out'}/report.html" in run.stdout
    assert "lerobot 0.3.2 on cpu" in run.stdout
    run = subprocess.run([*command, str(tmp_path)], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr


@pytest.mark.parametrize(
    "flags, line",
    [
        ((), "one of the arguments --dataset --bags is required"),
        (("--bags", "BAGS", "--dataset", "DATASET"), "not allowed with argument"),
        (("--bags", "BAGS", "--episode"), "--episode: expected at least one argument"),
        (("--bags", "BAGS", "--episode", "one"), "--episode: invalid int value: 'one'"),
        (("--bags", "BAGS", "--episode", "1", "1"), "a number is given twice"),
        (("--bags", "BAGS", "--episode", "-1"), "no episode -1"),
        (("--bags", "BAGS", "--start-frame", "-1"), "--start-frame -1"),
        (("--bags", "BAGS", "--start-frame", "500"), "no recorded action from --start-frame 500 on; it has 9. frames"),
        (("--bags", "BAGS", "--num-steps", "0"), "--num-steps 0"),
        (("--bags", "BAGS", "--device", "cuda:7"), "invalid choice: 'cuda:7'"),
        (("--bags", "BAGS", "--device", "mps"), "device mps: not available on this machine"),
        (("--bags", "BAGS", "--mode", "quick"), "invalid choice: 'quick'"),
        (("--bags", "BAGS", "--action-mode", "absolute"), "--action-mode: found absolute, but"),
        (("--bags", "NOTHING"), "expected a folder of ROS 2 bags .* found nothing"),
        (("--dataset", "NOTHING"), "expected the folder of a LeRobot dataset, found nothing"),
        (("--dataset", "BAGS"), "expected a LeRobot dataset with meta/info.json, found episode_000"),
        (("--bags", "BAGS", "--checkpoint", "NOTHING"), "no config.json, pretrained_model/ or checkpoint_NNNNNN/ here"),
        (("--bags", "BAGS", "--output", "BAGS"), "holds .*, which no evaluation writes"),
        (("--bags", "BAGS", "--output", "FILE"), "is a file; name a folder"),
        (("--bags", "BAGS", "--output", "FILE/out"), "Not a directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_1(trained, sample_bags, tmp_path, capsys, flags, line):
    """And nothing is written."""
    (tmp_path / "file").write_text("")
    places = {
        "BAGS": sample_bags,
        "NOTHING": tmp_path / "nothing",
        "FILE/out": tmp_path / "file/out",
        "FILE": tmp_path / "file",
    }
    given = [str(places.get(flag, flag)) for flag in flags]
    for name, default in (("--checkpoint", trained), ("--output", tmp_path / "out")):
        if name not in given:
            given += [name, str(default)]
    options = [] if "--device" in given else ["--device", "cpu"]
    assert re.search(line, refused(capsys, offline_eval.main, [*given, *options, "--backend", "native"]))
    assert not (tmp_path / "out").exists() and {p.name for p in tmp_path.iterdir()} == {"file"}


def test_a_recording_without_the_policys_camera_is_refused(trained: Path, sample_bags: Path, tmp_path: Path):
    contract = PolicyRunner(trained, backend="native", device="cpu").contract
    other = source_of(sample_bags, tmp_path, trained, camera_topics={"top": "/camera/color/image_raw"})
    with pytest.raises(EvalError, match="no camera color; the policy needs it, found top"):
        check_source(other, contract)


# -- the output directory ------------------------------------------------------------------------------------------


def test_an_earlier_evaluation_is_written_over_and_nothing_else(trained, sample_bags, tmp_path, capsys):
    """Said; and no file of the earlier one is left to be taken for one of this."""
    out = tmp_path / "out"
    assert evaluate(trained, out, "--episode", "0", "1", "--num-steps", "2", "--rollout", bags=sample_bags) == 0
    (out / ".episode_000.png.partial").write_text("of a killed one")
    assert evaluate(trained, out, "--episode", "2", "--num-steps", "2", bags=sample_bags) == 0
    assert f"replaced the evaluation that was in {out}" in capsys.readouterr().out
    names = {"episode_002.parquet", "episode_002.png", "overview.png", "report.html", "summary.json"}
    assert {p.name for p in out.iterdir()} == names
    (out / "thesis.tex").write_text("mine")
    line = refused(capsys, evaluate, trained, out, "--episode", "2", "--num-steps", "2", bags=sample_bags)
    assert "holds thesis.tex, which no evaluation writes" in line
    assert {p.name for p in out.iterdir()} == names | {"thesis.tex"}


def test_an_interrupted_evaluation_is_not_taken_for_a_complete_one(trained, sample_bags, tmp_path, capsys, monkeypatch):
    """summary.json comes last: with an earlier one in place, Ctrl-C in the second episode leaves none."""
    out, flags = tmp_path / "out", ("--episode", "0", "1", "--num-steps", "4")
    assert evaluate(trained, out, *flags, bags=sample_bags) == 0
    step, calls = PolicyRunner.step, []

    def interrupted(self, *observation):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self, *observation)

    monkeypatch.setattr(PolicyRunner, "step", interrupted)
    assert evaluate(trained, out, *flags, bags=sample_bags) == 130
    assert "interrupted" in capsys.readouterr().err
    assert {p.name for p in out.iterdir()} == {"episode_000.parquet", "episode_000.png"}
    assert "summary.json: not there" in refused(capsys, compare.main, [str(out)])


# -- what a person looks at ----------------------------------------------------------------------------------------


def test_the_report_is_self_contained_and_says_the_verdict_first(evaluated: Path):
    """One file that opens anywhere: every picture is inside, nothing is loaded; the verdict stands above everything."""
    page = (evaluated / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert page.count("data:image/png;base64,") == 5  # an overview; predictions and a rollout of each episode
    verdict = report.verdict_text(summary_of(evaluated)).split("; ")[0]
    assert 0 < page.index('class="verdict') < page.index("<table") and escape(verdict) in page
    for word in ("shoulder_pan", "episode_003", "images stay the recorded ones", "weights sha256"):
        assert word in page
    for name in ("overview.png", "episode_000.png", "episode_003_rollout.png"):
        assert (evaluated / name).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_all_but_the_pictures_is_there(trained, sample_bags, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert evaluate(trained, tmp_path / "out", "--num-steps", "3", bags=sample_bags) == 0
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".parquet", ".html", ".json"}
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_a_dataset_without_its_decoder_is_one_line(trained, tmp_path, capsys, monkeypatch):
    """The trainer's environment has no av: evaluating on bags needs none."""
    monkeypatch.setitem(sys.modules, "av", None)
    for name in [name for name in sys.modules if "lerobot_dataset" in name.split(".")]:
        monkeypatch.delitem(sys.modules, name)
    line = refused(capsys, evaluate, trained, tmp_path / "out", dataset=tmp_path)
    assert "av is not installed; `uv pip install av`" in line


@pytest.mark.parametrize("deltas", [True, False])
def test_how_far_a_chunk_leads_from_the_truth(trained: Path, trained_absolute: Path, deltas: bool):
    """Half a second and a second ahead, in joint space and at the UR10e's flange: a pan that is 10 mrad off at a reach
    of r turns the tool by 10 mm per metre of it. Horizons beyond the chunk are not there; other arms have no tool."""
    contract = PolicyRunner(trained if deltas else trained_absolute, backend="native", device="cpu").contract
    state = np.array([0.1, -1.2, 1.5, -1.8, -1.5, 0.2])
    truth = state + np.outer(np.arange(1, 21), np.full(6, 0.01))  # 20 frames at 30 Hz
    guess = truth + np.array([0.01, 0, 0, 0, 0, 0])
    errors = ChunkErrors(20, 6, 30.0, deltas)
    as_actions = (lambda q: np.diff(q, axis=0, prepend=state[None])) if deltas else (lambda q: q)
    for _ in range(2):
        errors.add(as_actions(guess).astype(np.float32), as_actions(truth).astype(np.float32), state)
    errors.add(as_actions(guess).astype(np.float32), as_actions(truth)[:5].astype(np.float32), state)  # a short piece
    (row,) = positions_ahead(errors, contract)
    assert (row["seconds"], row["chunks"]) == (0.5, 2)
    assert row["joint_rad_mean"] == pytest.approx(0.01 / 6, rel=1e-3)
    flange = link_frames(truth[14])[6, :3, 3]
    assert row["tool_m_mean"] == pytest.approx(0.01 * np.hypot(*flange[:2]), rel=1e-2)
    other = dataclasses.replace(contract, state_names=tuple(f"joint_{i}" for i in range(6)))
    assert positions_ahead(errors, other)[0]["tool_m_mean"] is None


def test_the_screen_does_not_promise_success(evaluated: Path):
    """An offline error ranked simulated policies backwards."""
    said = screen(summary_of(evaluated), evaluated, "")
    assert "this does not predict success at the task: python -m sim.rollout measures that" in said


def test_verdicts_in_words(evaluated: Path):
    """Neither of the two words may be lost in a good mood."""
    summary = summary_of(evaluated)
    summary["error"]["policy"]["mae"] = 0.001
    for name, mae in (("no motion", 0.003), ("mean action", 0.002)):
        summary["error"][name]["mae"] = mae
    summary["verdict"] |= {"better_than_baselines": True, "times_better_than_best_baseline": 2.0, "realtime_30hz": True}
    summary["latency"]["inference"]["p99_ms"] = 12.0
    assert report.verdict_text(summary) == (
        "better than both baselines ('mean action', the better of them, is off by 2.0 times as much); "
        "real-time at 30 Hz (p99 of 24 inferences 12.0 ms, limit 33.3)"
    )
    summary["error"]["policy"]["mae"] = 0.0025
    summary["verdict"] |= {"better_than_baselines": False, "realtime_30hz": False}
    said = report.verdict_text(summary)
    assert said.startswith("NOT better than 'mean action' (mean absolute error 0.0025 against 0.002); NOT real-time")


# -- compare -------------------------------------------------------------------------------------------------------


def results(folder: Path, evaluated: Path, name: str, mae: float, **changes: Any) -> Path:
    summary = summary_of(evaluated)
    summary["error"]["policy"]["mae"] = mae
    for key, value in changes.items():
        summary[key] = summary[key] | value if isinstance(value, dict) else value
    (folder / name).mkdir(parents=True)
    (folder / name / "summary.json").write_text(json.dumps(summary))
    return folder / name


def test_compare_ranks_the_same_frames_best_first(evaluated: Path, tmp_path: Path, capsys):
    arms = [results(tmp_path, evaluated, f"lr-{name}", mae) for name, mae in (("a", 0.003), ("b", 0.001), ("c", 0.002))]
    assert compare.main([*map(str, arms), "--output", str(tmp_path / "picture.png")]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^\s*(\d)\s+(lr-\w)", out, re.M) == [("1", "lr-b"), ("2", "lr-c"), ("3", "lr-a")]
    assert "different sets of frames" not in out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": {"sha256": "of another"}},
        {"selection": {"episodes": [1]}},
        {"selection": {"num_steps": 5}},
        {"unit": "rad"},
        {"contract": {"fps": 10.0}},
    ],
)
def test_compare_does_not_rank_across_different_data(evaluated: Path, tmp_path: Path, capsys, changes: dict):
    """An easier recording makes any policy look better: two groups, each with a first place, and it says so."""
    a = results(tmp_path, evaluated, "a", 0.003)
    b = results(tmp_path, evaluated, "b", 0.001, **changes)
    c = results(tmp_path, evaluated, "c", 0.002)
    assert compare.main([str(a), str(b), str(c), "--output", str(tmp_path / "picture.png")]) == 0
    out = capsys.readouterr().out
    assert "2 different sets of frames: ranked within each set, not across" in out
    assert re.findall(r"^\s*(\d)  (\w) ", out, re.M) == [("1", "c"), ("2", "a"), ("1", "b")]


@pytest.mark.parametrize("limit, code", [("0.001", 0), ("0.0009", 3)])
def test_a_gate_of_a_comparison_is_about_the_best(evaluated: Path, tmp_path: Path, capsys, limit: str, code: int):
    """One may meet it alone; beyond it the exit code is 3, after table and picture. Of two sets none is the best."""
    arms = [str(results(tmp_path, evaluated, name, mae)) for name, mae in (("worse", 0.002), ("best", 0.001))]
    options = ["--output", str(tmp_path / "picture.png"), "--max-mae", limit, "--max-p99-ms", "1e9"]
    assert compare.main([*arms, *options]) == code
    *_, mae, p99 = capsys.readouterr().out.splitlines()
    assert mae == f"gate: --max-mae {limit}: {'EXCEEDED' if code else 'passed'} by the best (0.001)"
    assert p99.startswith("gate: --max-p99-ms 1e+09: passed by the best (") and (tmp_path / "picture.png").exists()
    other = str(results(tmp_path, evaluated, "other", 0.001, unit="rad"))
    assert "2 different sets of frames, expected one" in refused(capsys, compare.main, [*arms, other, *options])


def test_compare_refuses_what_is_no_evaluation(evaluated: Path, tmp_path: Path, capsys):
    assert "summary.json: not there" in refused(capsys, compare.main, [str(tmp_path)])
    (tmp_path / "summary.json").write_text('{"error": {}}')
    assert "not an evaluation's summary" in refused(capsys, compare.main, [str(evaluated), str(tmp_path)])
    (tmp_path / "summary.json").write_text("{")
    assert "not an evaluation's summary" in refused(capsys, compare.main, [str(tmp_path)])
    assert not (tmp_path / "comparison.png").exists()
