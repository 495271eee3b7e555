"""The main job through its real entry: a folder of bags becomes a checkpoint, and every mistake is one line."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from lerobot_checkpoint import load_policy
from rosbag_dataset import ChunkDataset, load_episodes, split_episodes
from tests.bags import make_take, write_bag
from tests.tiny import ROOT, arguments, error_line, metrics, run, run_process, trainer
from train import TrainingConfig, learning_rates, lr_factor
from training.identity import VERSION

SEVEN_FILES = {
    "config.json",
    "model.safetensors",
    "policy_preprocessor.json",
    "policy_preprocessor_step_3_normalizer_processor.safetensors",
    "policy_postprocessor.json",
    "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
    "train_config.json",
}


@pytest.fixture(scope="module")
def finished(sample_bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a complete tiny run; read-only for the tests."""
    return run(sample_bags, tmp_path_factory.mktemp("finished"))


# -- what a run leaves behind


def test_the_checkpoint_is_the_seven_files_beside_the_training_state(finished: Path):
    """checkpoint_NNNNNN/pretrained_model holds exactly what the seeds list; `last` is a relative link."""
    for step in (3, 6):
        assert {p.name for p in (finished / f"checkpoint_{step:06d}/pretrained_model").iterdir()} == SEVEN_FILES
        assert (finished / f"checkpoint_{step:06d}/training_state").is_dir()
    assert os.readlink(finished / "last") == "checkpoint_000006"


def test_metrics_have_one_line_per_log_freq(finished: Path):
    """step, loss, l1_loss, kl_loss, lr, grad_norm, speeds, data_wait_fraction; the loss is their sum."""
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["loss"] == pytest.approx(line["l1_loss"] + 10 * line["kl_loss"], rel=1e-5)
        assert line["lr"] == 1e-4 and line["grad_norm"] > 0 and line["samples_per_s"] > 0
        assert 0 <= line["data_wait_fraction"] <= 1


def test_whole_episodes_are_held_out_and_recorded(finished: Path):
    """val_fraction 0.1 of six episodes is one whole episode, named in the contract; `best` follows its L1."""
    contract = json.loads((finished / "last/pretrained_model/train_config.json").read_text())
    assert len(contract["held_out_episodes"]) == 1 and len(contract["training_episodes"]) == 5
    assert not set(contract["held_out_episodes"]) & set(contract["training_episodes"])
    validated = {line["step"]: line["val_l1_loss"] for line in metrics(finished, "val_l1_loss")}
    assert list(validated) == [3, 6]
    assert os.readlink(finished / "best") == f"checkpoint_{min(validated, key=validated.get):06d}"


def test_the_contract_says_what_a_robot_must_know(finished: Path):
    """train_config.json: actions, joints in order, sign, wrap, fps, images' age, resize, cameras, clock, code."""
    contract = json.loads((finished / "last/pretrained_model/train_config.json").read_text())
    assert contract["action_mode"] == "delta"
    assert contract["joint_names"][0] == "shoulder_pan_joint" and len(contract["joint_names"]) == 6
    assert (
        contract["joint_sign"] == [1.0] * 6 and contract["wrap_angles"] is True and contract["revolute"] == [True] * 6
    )
    assert contract["fps"] == 30.0 and contract["time_source"] == "receive"
    assert contract["image_resize"] == [32, 48] and "INTER_AREA" in contract["image_resize_interpolation"]
    assert contract["cameras"] == {"color": "/camera/color/image_raw"}
    assert contract["image_shapes"] == {"color": [32, 48]}
    age_s = contract["image_age_s"]["color"]  # at most data.max_offset_ms
    assert set(contract["image_age_s"]) == {"color"} and abs(age_s["median"]) < 0.01 and 0 < age_s["most"] <= 0.05
    assert contract["code"]["version"] == VERSION and len(contract["code"]["source_sha256"]) == 64
    assert contract["config"]["training"]["steps"] == 6


def test_the_sync_report_and_the_summary_are_written(finished: Path):
    """sync_report.json tells of every bag; summary.json has the errors beside the baselines; the picture is a PNG."""
    report = json.loads((finished / "sync_report.json").read_text())
    assert len(report["episodes"]) == 6 and report["skipped"] == [] and len(report["held_out"]) == 1
    assert all(e["frames"] > 60 and e["topics"] for e in report["episodes"])
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["mae_rad"]) == {"policy", "no motion", "mean action"}
    assert summary["held_out"] and summary["episodes"] == report["held_out"]
    assert (finished / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_errors_are_those_of_the_saved_checkpoint(finished: Path, sample_bags: Path):
    """The mean absolute error in summary.json is recomputed from the checkpoint on disk and the bags."""
    cfg = train.load_config(ROOT / "config.yaml", [a[11:] for a in arguments(sample_bags, finished.parent)[2:]])
    episodes, _ = load_episodes(train.bag_settings(cfg), progress=False)
    summary = json.loads((finished / "summary.json").read_text())
    episode = next(e for e in episodes if [e.name] == summary["episodes"])
    policy = load_policy(finished)
    errors = []
    for batch in (ChunkDataset([episode], 8)[i] for i in range(0, len(episode.time_ns) - 1)):
        image = torch.from_numpy(batch["observation.images.color"]).permute(2, 0, 1)[None] / 255
        state = torch.from_numpy(batch["observation.state"])[None]
        observation = {"observation.state": state, "observation.images.color": image}
        errors.append(np.abs(policy.predict_chunk(observation)[0, 0].numpy() - batch["action"][0]))
    assert np.mean(errors) == pytest.approx(summary["mae_rad"]["policy"], rel=1e-4)
    recorded = episode.action[: len(errors)]
    assert np.abs(recorded).mean() == pytest.approx(summary["mae_rad"]["no motion"], rel=1e-6)


def test_real_lerobot_drives_the_trained_checkpoint(finished: Path):
    """LeRobot loads the run's `last` as it lies there and gives our own model's actions within 1e-5 rad: 0.3.2, or what
    else is installed here, which normalises outside the policy from 0.4 on."""
    from lerobot.policies.act.modeling_act import ACTPolicy

    from tests.lerobot_044.reference import load_processors

    ours = load_policy(finished)
    theirs = ACTPolicy.from_pretrained(finished / "last" / "pretrained_model").eval()
    generator = torch.Generator().manual_seed(0)
    observation = {
        "observation.state": torch.rand(1, 6, generator=generator) * 2 - 1,
        "observation.images.color": torch.rand(1, 3, 32, 48, generator=generator),
    }
    preprocess, postprocess = load_processors(theirs, str(finished / "last" / "pretrained_model"))
    with torch.no_grad():
        expected = postprocess(theirs.select_action(preprocess(dict(observation))))
    assert (ours.predict_chunk(observation)[:, 0] - expected).abs().max() < 1e-5


def test_the_same_seed_gives_the_same_run(finished: Path, sample_bags: Path, tmp_path: Path):
    """Two runs are equal bit for bit, with loader workers or without; another seed is another run."""
    again = run(sample_bags, tmp_path, training__num_workers=2)
    assert [m["loss"] for m in metrics(again)] == [m["loss"] for m in metrics(finished)]
    ours, theirs = (load_policy(d).model.state_dict() for d in (again, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    other = run(sample_bags, tmp_path / "other", training__seed=20261122, training__steps=2)
    assert metrics(other)[0]["loss"] != metrics(finished)[0]["loss"]


def test_statistics_come_from_training_episodes_only(finished: Path, sample_bags: Path):
    """The held-out episode must not leak into the normalisation that the checkpoint carries."""
    cfg = train.load_config(ROOT / "config.yaml", [a[11:] for a in arguments(sample_bags, finished.parent)[2:]])
    episodes, _ = load_episodes(train.bag_settings(cfg), progress=False)
    names = json.loads((finished / "last/pretrained_model/train_config.json").read_text())["training_episodes"]
    states = np.concatenate([e.state for e in episodes if e.name in names]).astype(np.float64)
    stats = load_policy(finished).stats["observation.state"]
    np.testing.assert_allclose(np.asarray(stats["mean"]), states.mean(axis=0), rtol=1e-5)
    everything = np.concatenate([e.state for e in episodes]).astype(np.float64).mean(axis=0)
    assert np.abs(everything - np.asarray(stats["mean"])).max() > 1e-3


def test_training_and_validation_see_their_own_episodes(sample_bags: Path, tmp_path: Path):
    """The loader's samples are of training episodes, the validation's of held-out ones, as the seed splits them; the
    score is the L1 of the policy as a robot runs it, computed here by hand."""
    cfg = train.load_config(ROOT / "config.yaml", [a[11:] for a in arguments(sample_bags, tmp_path)[2:]])
    episodes, _ = load_episodes(train.bag_settings(cfg), progress=False)

    def names(seed: int) -> list[list[str]]:
        return [[e.name for e in side] for side in split_episodes(episodes, 0.4, seed)]

    seed = next(seed for seed in range(100) if names(seed) != names(42) and names(seed)[1])
    ready = trainer(sample_bags, tmp_path, training__seed=seed, training__val_fraction=0.4)
    seen = [list(dict.fromkeys(d.locate(i)[0] for i in range(len(d)))) for d in (ready.dataset, ready.held_out_dataset)]
    assert seen == names(seed)

    held_out = ChunkDataset([e for e in episodes if e.name in names(seed)[1]], 8)
    batch = {name: torch.from_numpy(array) for name, array in held_out.__getitems__(range(len(held_out))).items()}
    batch["observation.images.color"] = batch["observation.images.color"].permute(0, 3, 1, 2) / 255
    for name, of in ready.stats.items():
        batch[name] = (batch[name] - torch.tensor(of["mean"])) / (torch.tensor(of["std"]) + 1e-8)
    score = ready._validate()
    assert ready.model.training
    with torch.inference_mode():
        predicted, _ = ready.model.eval()(batch)
    errors = (predicted - batch["action"])[~batch["action_is_pad"]].abs()
    assert score == pytest.approx(errors.mean().item(), rel=1e-5)


def test_two_cameras_train_and_are_named_in_the_checkpoint(tmp_path: Path):
    """data.camera_topics {name: topic}: each becomes observation.images.<name>, in this order."""
    for i in range(2):
        take = make_take(seconds=1.0, size=(40, 48), seed=i)
        wrist = [("/wrist/image", t, message) for topic, t, message in take.messages() if topic != "/joint_states"]
        write_bag(tmp_path / f"bags/bag_{i}", [*take.messages(), *wrist])
    cameras = "{wrist: /wrist/image, color: /camera/color/image_raw}"
    output = run(tmp_path / "bags", tmp_path, data__camera_topics=cameras, training__steps=2, model__chunk_size=8)
    policy = load_policy(output)
    assert policy.act_config.cameras == ("wrist", "color")
    assert set(policy.stats) >= {"observation.images.wrist", "observation.images.color"}


# -- mistakes, as a user sees them


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"data__bag_dir": "/nowhere/bags"}, ["data.bag_dir", "/nowhere/bags"]),
        ({"data__camera_topic": "/cam"}, ["/cam", "/camera/color/image_raw (sensor_msgs/msg/Image"]),
        ({"data__joint_topic": "/camera/color/image_raw"}, ["JointState", "sensor_msgs/msg/Image"]),
        ({"data__joint_names": "[a, b, c, d, e, f]"}, ["a, b, c, d, e, f", "elbow_joint"]),
        ({"training__device": "cuda"}, ["training.device", "cuda is not available"]),
        ({"model__pretrained_backbone": "/no/weights.pth"}, ["model.pretrained_backbone", "/no/weights.pth"]),
        ({"training__resume": "/no/checkpoint"}, ["/no/checkpoint"]),
        ({"data__max_offset_ms": "0"}, ["max_offset_ms"]),
        ({"training__seed": -1}, ["training.seed", "at least 0"]),
        ({"data__ros_distro": "groovy"}, ["data.ros_distro", "groovy", "humble"]),
    ],
)
def test_a_mistake_is_one_line_and_a_non_zero_exit(
    sample_bags: Path, tmp_path: Path, capsys, overrides: dict, words: list[str]
):
    """What was found, what was expected, where; no traceback, and no half-made run left in the way."""
    assert train.main(arguments(sample_bags, tmp_path, **overrides)) == 1
    errors = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(word in errors[0] for word in words), errors[0]
    assert not list((tmp_path / "run").glob("checkpoint_*"))


def test_an_error_leaves_no_traceback_in_a_real_process(tmp_path: Path):
    """The whole process: exit code, one line on stderr, nothing else."""
    result = run_process(tmp_path / "missing", tmp_path)
    assert str(tmp_path / "missing") in error_line(result) and result.returncode == 1
    assert result.stderr.count("\n") == 1


def test_rank_without_torchrun_is_refused(sample_bags: Path, tmp_path: Path):
    """A launcher that sets RANK alone would otherwise wait for ranks that never come."""
    line = error_line(run_process(sample_bags, tmp_path, env={"RANK": "0", "WORLD_SIZE": "2"}))
    assert "MASTER_ADDR" in line and "torchrun" in line


def test_training_works_with_none_of_the_extras(sample_bags: Path, tmp_path: Path):
    """matplotlib, wandb, lerobot, pyarrow, av and azure are not imported; only the picture is missing, and said."""
    blocked = ("matplotlib", "wandb", "lerobot", "pyarrow", "av", "azure")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import train; sys.exit(train.main(sys.argv[2:]))"
    result = run_process(sample_bags, tmp_path, launcher=(sys.executable, "-c", code), training__steps=2)
    assert result.returncode == 0, result.stderr
    assert "matplotlib is not installed" in result.stdout
    assert not (tmp_path / "run/summary.png").exists()
    result = run_process(
        sample_bags, tmp_path / "w", launcher=(sys.executable, "-c", code), wandb__enabled="true", training__steps=2
    )
    assert "pip install wandb" in error_line(result)


# -- the learning rate


def test_the_cosine_curve_point_by_point():
    """Linear warm-up to the peak, half a cosine to min_lr at the last step, as a pure function of the step."""
    training = TrainingConfig(steps=100, lr=1e-4, min_lr=1e-6, warmup_steps=10, scheduler="cosine")
    for step in range(100):
        if step < 10:
            expected = 1e-4 * (step + 1) / 10
        else:
            expected = 1e-6 + (1e-4 - 1e-6) * (1 + math.cos(math.pi * (step - 10) / 89)) / 2
        assert lr_factor(step, training, 1e-4) * 1e-4 == pytest.approx(expected, rel=1e-9), step
    assert lr_factor(9, training, 1e-4) == lr_factor(10, training, 1e-4) == 1.0
    assert lr_factor(99, training, 1e-4) * 1e-4 == pytest.approx(1e-6)
    assert lr_factor(500, training, 1e-4) * 1e-4 == pytest.approx(1e-6)  # a run that is resumed past its end


def test_both_groups_end_at_min_lr():
    """The backbone's rate has a peak of its own and the same last value, min_lr; `none` is constant."""
    training = TrainingConfig(steps=20, lr=1e-4, lr_backbone=2e-5, min_lr=1e-6, warmup_steps=5, scheduler="cosine")
    for step in range(20):
        lr, lr_backbone = learning_rates(step, training)
        assert lr == pytest.approx(1e-4 * lr_factor(step, training, 1e-4))
        progress = min(1.0, max(0.0, (step - 5) / 14))
        cosine = 1e-6 + (2e-5 - 1e-6) * (1 + math.cos(math.pi * progress)) / 2
        assert lr_backbone == pytest.approx(2e-5 * (step + 1) / 5 if step < 5 else cosine)
    assert lr == pytest.approx(1e-6) and lr_backbone == pytest.approx(1e-6)
    assert all(learning_rates(s, TrainingConfig(lr=3e-5, lr_backbone=2e-5)) == [3e-5, 2e-5] for s in range(10))


def test_a_backbone_that_is_slower_than_min_lr_or_frozen_stays_so():
    training = TrainingConfig(steps=20, min_lr=1e-6, warmup_steps=5, scheduler="cosine")
    assert [lr_factor(19, training, peak) for peak in (1e-7, 0.0)] == [1.0, 1.0]


def test_the_logged_learning_rate_is_the_one_used(sample_bags: Path, tmp_path: Path):
    """metrics.jsonl shows the schedule's value of its own step."""
    cosine = {"training__scheduler": "cosine", "training__warmup_steps": 2, "training__log_freq": 1}
    output = run(sample_bags, tmp_path, training__steps=4, training__lr_backbone=3e-5, **cosine)
    training = TrainingConfig(steps=4, lr=1e-4, warmup_steps=2, scheduler="cosine")
    assert [m["lr"] for m in metrics(output)] == pytest.approx([1e-4 * lr_factor(s, training, 1e-4) for s in range(4)])
