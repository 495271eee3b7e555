"""The policy runner: whichever backend and LeRobot version runs a checkpoint, the robot gets the same actions, once
normalised, or one line that says why not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from ur10e_deploy import policy_runner
from ur10e_deploy.config import WARM_UP_INFERENCES, PolicyError, RobotContract
from ur10e_deploy.policy_runner import PolicyRunner
from ur10e_deploy.sources import BagSource

from act_model import ACTION
from lerobot_checkpoint import CheckpointError, load_policy
from rosbag_dataset import UR_JOINTS, resize_image
from tests.lerobot_044 import launch
from tests.policies import (
    CHUNK,
    POLICIES,
    SAID,
    TWO_CAMERAS,
    as_batch,
    contract_of,
    exchange,
    observation,
    random_observation,
    said,
    save_ours,
    trained,
    trained_absolute,
    two_cameras_contract,
)
from tests.tiny import ROOT

__all__ = ["exchange", "trained", "trained_absolute"]  # fixtures

TOLERANCE_RAD = 1e-5


def runner_of(exchange: Path, name: str = "ours, two cameras", **options) -> PolicyRunner:
    return PolicyRunner(POLICIES[name](exchange), device="cpu", said=said(name), **options)


def ours(exchange: Path, folder: Path) -> Path:
    """A copy of ours, away from its manifest, to be broken."""
    return Path(shutil.copytree(POLICIES["ours, two cameras"](exchange), folder / "copy"))


def edit_weights(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


# -- backends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_native_and_lerobot_032_give_the_same_actions(exchange: Path, name: str):
    """Within 1e-5 rad, on our checkpoints and on LeRobot's own; a directory that 0.3.2 does not read is refused by
    backend lerobot, and run natively by auto, which says so."""
    state, images = observation(exchange, name)
    native = runner_of(exchange, name, backend="native").predict_chunk(state, images)
    auto = runner_of(exchange, name)
    np.testing.assert_allclose(auto.predict_chunk(state, images), native, rtol=0, atol=TOLERANCE_RAD)
    if name == "LeRobot 0.4.4's own":
        assert auto.backend == "native" and auto.notes and "0.3.2 does not read this config.json" in auto.notes[0]
        with pytest.raises(PolicyError, match="backend lerobot: .* use --backend native"):
            runner_of(exchange, name, backend="lerobot")
    else:
        assert (auto.backend, auto.backend_version, auto.notes) == ("lerobot", "0.3.2", [])


@pytest.mark.parametrize("name", POLICIES)
def test_our_runner_under_lerobot_044_gives_the_same_actions(exchange: Path, name: str):
    """The same in an environment with 0.4.4, which normalises outside the policy: the right way round there, too."""
    results = json.loads((exchange / "044.json").read_text())[name]
    native = runner_of(exchange, name, backend="native").predict_chunk(*observation(exchange, name))
    for backend in ("native", "auto") if name == "LeRobot 0.3.2's own" else ("native", "auto", "lerobot"):
        np.testing.assert_allclose(results[backend]["chunk"], native, rtol=0, atol=TOLERANCE_RAD)
    if name == "LeRobot 0.3.2's own":
        assert results["auto"]["backend"] == "native"
        assert (
            f"{launch.version()} normalises in processors, and there is no policy_preprocessor.json"
            in results["auto"]["notes"][0]
        )
        assert "no policy_preprocessor.json" in results["lerobot"]["error"]
    else:
        assert (results["auto"]["backend"], results["auto"]["version"]) == ("lerobot", launch.version())
        assert results["auto"]["notes"] == []


@pytest.mark.parametrize("version", ["0.3.2", "0.4.4"])
def test_lerobots_own_checkpoints_act_as_that_lerobot_acts(exchange: Path, version: str):
    """Not only do our backends agree: they agree with what the version that wrote it computed when it wrote it."""
    expected = load_file(exchange / f"reference-{version}.safetensors")["chunk"][0].numpy()
    for backend in ("native", "auto"):
        runner = runner_of(exchange, f"LeRobot {version}'s own", backend=backend)
        chunk = runner.predict_chunk(*random_observation(TWO_CAMERAS))
        np.testing.assert_allclose(chunk, expected, rtol=0, atol=TOLERANCE_RAD)


def test_without_lerobot_auto_runs_natively_and_says_so(exchange: Path, monkeypatch: pytest.MonkeyPatch):
    """The evaluator needs no lerobot; asking for it where it is not installed is one line."""
    monkeypatch.setitem(sys.modules, "lerobot.configs.policies", None)  # what import does with a missing module
    runner = runner_of(exchange)
    assert runner.backend == "native" and "lerobot cannot be imported" in runner.notes[0]
    with pytest.raises(PolicyError, match="lerobot cannot be imported"):
        runner_of(exchange, backend="lerobot")


def test_a_lerobot_that_normalises_otherwise_is_refused(exchange: Path, monkeypatch: pytest.MonkeyPatch):
    """A version that un-normalises once more, or not at all, gives actions and no error: only comparing tells."""
    from lerobot.policies.act.modeling_act import ACTPolicy

    right = ACTPolicy.predict_action_chunk
    for wrong in (
        lambda self, batch: self.unnormalize_outputs({ACTION: right(self, batch)})[ACTION],
        lambda self, batch: self.normalize_targets({ACTION: right(self, batch)})[ACTION],
    ):
        monkeypatch.setattr(ACTPolicy, "predict_action_chunk", wrong)
        for backend in ("auto", "lerobot"):  # auto must not fall back: something is wrong here
            with pytest.raises(PolicyError, match="does not normalise exactly once"):
                runner_of(exchange, backend=backend)


# -- checkpoints that must not run ---------------------------------------------------------------------------------


def drop_buffers(directory: Path) -> None:
    edit_weights(directory, lambda t: [t.pop(key) for key in list(t) if "buffer_" in key])


def drop_processors(directory: Path) -> None:
    for file in directory.glob("policy_*"):
        file.unlink()


def unnormalised(directory: Path) -> None:
    drop_buffers(directory)
    drop_processors(directory)


def infinite_buffers(directory: Path) -> None:
    """What 0.3.2 saves of a policy whose statistics were never set."""
    drop_processors(directory)
    edit_weights(
        directory, lambda t: t.update({k: torch.full_like(v, torch.inf) for k, v in t.items() if "buffer" in k})
    )


def half_loaded(directory: Path) -> None:
    edit_weights(directory, lambda t: [t.pop(key) for key in list(t) if key.startswith("model.decoder.")])


def one_buffer_of_three(directory: Path) -> None:
    edit_weights(directory, lambda t: [t.pop(key) for key in list(t) if key.startswith("unnormalize_outputs")])


@pytest.mark.parametrize("backend", ["auto", "lerobot", "native"])
@pytest.mark.parametrize(
    "damage, line",
    [
        (unnormalised, "no normalisation, neither buffers in model.safetensors nor policy_preprocessor.json"),
        (infinite_buffers, "the statistics were never set"),
        (half_loaded, "missing decoder"),
        (one_buffer_of_three, "no mean of action"),
    ],
)
def test_unnormalised_and_half_loaded_checkpoints_are_refused(exchange, tmp_path, backend, damage, line):
    """By every backend, in one line: LeRobot itself loads all of these, and acts."""
    broken = ours(exchange, tmp_path)
    damage(broken)
    with pytest.raises(CheckpointError, match=line) as refused:
        PolicyRunner(broken, backend=backend, device="cpu")
    assert "\n" not in str(refused.value)


def test_lerobot_itself_would_run_them(exchange: Path, tmp_path: Path):
    """Why the test above matters: from_pretrained takes the half-loaded directory without an error."""
    from lerobot.policies.act.modeling_act import ACTPolicy

    broken = ours(exchange, tmp_path)
    half_loaded(broken)
    ACTPolicy.from_pretrained(broken)


def test_only_the_normalisation_that_the_installed_version_reads_is_needed(exchange: Path, tmp_path: Path):
    """A union whose buffers are gone still has 0.4's processors: 0.3.2 cannot run it, ours can, the same actions."""
    state, images = random_observation(TWO_CAMERAS)
    expected = runner_of(exchange, backend="native").predict_chunk(state, images)
    stripped = ours(exchange, tmp_path)
    drop_buffers(stripped)
    runner = PolicyRunner(stripped, device="cpu")
    assert runner.backend == "native" and "model.safetensors has none" in runner.notes[0]
    np.testing.assert_array_equal(runner.predict_chunk(state, images), expected)


# -- modes ---------------------------------------------------------------------------------------------------------


def steps(runner: PolicyRunner, count: int) -> np.ndarray:
    """(count, 6) actions for as many different observations."""
    return np.stack([runner.predict(*random_observation(TWO_CAMERAS, seed)) for seed in range(count)])


@pytest.mark.parametrize("backend", ["native", "lerobot"])
@pytest.mark.parametrize("coefficient, n_action_steps", [(None, 4), (None, CHUNK), (0.01, 1), (0.3, 1)])
def test_modes_are_lerobots_select_action(exchange, tmp_path, backend, coefficient, n_action_steps):
    """The queue of n_action_steps, and the temporal ensemble with the checkpoint's coefficient, give step by step what
    LeRobot's own select_action gives; over more than one chunk, and again after reset()."""
    from lerobot.policies.act.modeling_act import ACTPolicy

    contract = two_cameras_contract(
        json.loads((POLICIES["ours, two cameras"](exchange) / "train_config.json").read_text())
    )
    fields = dict(temporal_ensemble_coeff=coefficient, n_action_steps=n_action_steps)
    checkpoint = save_ours(tmp_path, contract, **fields)
    policy = ACTPolicy.from_pretrained(checkpoint)
    runner = PolicyRunner(checkpoint, backend=backend, device="cpu")  # mode auto: what the checkpoint says
    assert runner.mode == ("chunk" if coefficient is None else "ensemble")
    for count in (3, 25):
        policy.reset()
        runner.reset()
        expected = []
        for seed in range(count):
            batch = as_batch(*random_observation(TWO_CAMERAS, seed))
            expected.append(policy.select_action(batch)[0].numpy())
        np.testing.assert_allclose(steps(runner, count), expected, rtol=0, atol=TOLERANCE_RAD)


def test_every_step_executes_the_first_action_of_each_chunk(exchange: Path):
    runner = runner_of(exchange, mode="every-step", backend="native")
    expected = [runner.predict_chunk(*random_observation(TWO_CAMERAS, seed))[0] for seed in range(4)]
    np.testing.assert_array_equal(steps(runner, 4), expected)
    assert runner.latency()["inference"]["count"] == 4  # predict_chunk is not a control step


def test_n_action_steps_can_be_fewer_than_the_checkpoints_but_not_more_than_a_chunk(exchange: Path):
    runner = runner_of(exchange, mode="chunk", backend="native", n_action_steps=2)
    steps(runner, 5)
    assert runner.latency()["inference"]["count"] == 3
    with pytest.raises(PolicyError, match="n_action_steps is 11; expected 1 to 10"):
        runner_of(exchange, n_action_steps=CHUNK + 1)


def test_a_fork_has_a_queue_and_a_latency_of_its_own(exchange: Path):
    """A rollout beside the teacher-forced run must not take its actions, nor be counted as its time."""
    runner = runner_of(exchange, backend="native")
    alone = steps(runner, 3)
    runner.reset()
    fork = runner.fork()
    mixed = []
    for seed in range(3):
        fork.predict(*random_observation(TWO_CAMERAS, 100 + seed))
        mixed.append(runner.predict(*random_observation(TWO_CAMERAS, seed)))
    np.testing.assert_array_equal(mixed, alone)
    assert runner.latency()["inference"]["count"] == 2 and fork.latency()["inference"]["count"] == 1


# -- latency -------------------------------------------------------------------------------------------------------


def test_latency_counts_inferences_and_cached_pops_apart(exchange: Path, monkeypatch: pytest.MonkeyPatch):
    """A network of 50 ms that is asked every fifth step is not real-time at 30 Hz, although the mean step takes 10 ms;
    the published evaluators say that it is. Warm-up inferences are in neither list."""
    chunk = policy_runner.NativeBackend.chunk

    def slow(self, batch):
        time.sleep(0.05)
        return chunk(self, batch)

    monkeypatch.setattr(policy_runner.NativeBackend, "chunk", slow)
    runner = runner_of(exchange, backend="native", n_action_steps=5)
    steps(runner, 20)
    latency = runner.latency()
    assert latency["inference"]["count"] == 4 and latency["cached_pop"]["count"] == 16
    assert latency["warm_up"]["count"] == WARM_UP_INFERENCES
    assert latency["inference"]["p50_ms"] >= 50 > 20 > latency["cached_pop"]["p50_ms"]
    assert (
        latency["inference"]["p99_ms"] == latency["inference"]["max_ms"]
    )  # of four, the 99th percentile is the largest
    assert latency["realtime_30hz"] is False
    assert runner.step(*random_observation(TWO_CAMERAS)).seconds >= 0.05


def test_percentiles_are_observed_values():
    report = policy_runner.Latency([], [i / 1000 for i in range(1, 201)], []).report()
    assert [report["inference"][p] for p in ("p50_ms", "p95_ms", "p99_ms", "max_ms")] == [101.0, 191.0, 199.0, 200.0]
    assert report["realtime_30hz"] is False and report["cached_pop"]["p99_ms"] is None
    assert policy_runner.Latency([], [0.02] * 99 + [0.9], []).report()["realtime_30hz"] is False
    assert policy_runner.Latency([], [0.02] * 200 + [0.9], []).report()["realtime_30hz"] is True
    assert policy_runner.Latency().report()["realtime_30hz"] is None


# -- observations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda s, i: (s[:5], i), r"the state has shape \(5,\)"),
        (lambda s, i: (s[None], i), r"the state has shape \(1, 6\)"),
        (lambda s, i: (s.astype(str), i), "type <U"),
        (lambda s, i: (np.where(np.arange(6) == 2, np.nan, s), i), "not finite: elbow_joint nan"),
        (lambda s, i: (np.where(np.arange(6) == 0, np.inf, s), i), "not finite: shoulder_pan_joint inf"),
        (lambda s, i: (s, {"wrist": i["wrist"]}), "images of wrist; the policy needs wrist, front"),
        (lambda s, i: (s, i | {"top": i["wrist"]}), "images of wrist, front, top; the policy needs wrist, front"),
        (lambda s, i: (s, i | {"front": i["front"] / 255}), "camera front: found float64"),
        (lambda s, i: (s, i | {"front": i["front"].transpose(2, 0, 1)}), r"found uint8 \(3, 40, 56\)"),
        (lambda s, i: (s, i | {"front": i["front"][..., :1]}), r"found uint8 \(40, 56, 1\)"),
        (lambda s, i: (s, i | {"front": i["front"].tolist()}), "camera front: found list"),
        (lambda s, i: (s, i | {"front": i["front"][:0]}), r"camera front: an image of 0x56 \(HxW\) has no pixels"),
        (lambda s, i: (s, list(i.values())), "images are list; expected {camera: "),
        (lambda s, i: (s, i | {"front": i["front"][::2]}), "images are 20x56; the policy was trained on 40x56"),
    ],
)
def test_an_observation_that_does_not_fit_is_refused_in_one_line(exchange: Path, change, line: str):
    """On every step, also on those that would only take an action from the queue: a robot whose joint sensor fails
    must not go on for the rest of a chunk."""
    runner = runner_of(exchange, backend="native")
    state, images = random_observation(TWO_CAMERAS)
    for _ in range(2):  # before and after an inference
        with pytest.raises(PolicyError, match=line) as refused:
            runner.predict(*change(state, images))
        assert "\n" not in str(refused.value)
        runner.predict(state, images)


def test_no_images_at_all_and_images_that_cannot_be_written(exchange: Path, recwarn: pytest.WarningsRecorder):
    """None is refused where images are needed; a driver's read-only buffer is taken as it is, without a warning."""
    runner = runner_of(exchange, backend="native")
    state, images = random_observation(TWO_CAMERAS)
    with pytest.raises(PolicyError, match="images are NoneType; expected"):
        runner.predict(state, None)
    for image in images.values():
        image.flags.writeable = False
    runner.predict(state, images)
    assert not recwarn.list


def test_actions_that_are_not_finite_never_come_out(exchange: Path, tmp_path: Path):
    broken = ours(exchange, tmp_path)
    edit_weights(broken, lambda t: t["model.action_head.bias"].fill_(float("nan")))
    with pytest.raises(PolicyError, match="actions are not finite"):
        PolicyRunner(broken, backend="native", device="cpu")  # found by the warm-up, before any robot moves


def test_camera_images_are_resized_as_in_training(trained: Path, sample_bags: Path, tmp_path: Path):
    """A robot's image at the camera's size gives exactly the actions of the frame that training decoded and resized."""
    contract = contract_of(trained)
    values = contract["config"]["data"] | contract["config"]["conventions"]
    camera = BagSource(sample_bags, values | {"image_resize": None}, tmp_path)
    seen = BagSource(sample_bags, values, Path(values["cache_dir"]))
    runner = PolicyRunner(trained, backend="native", device="cpu")
    for robot, training in zip(camera.frames(0, 10, 13), seen.frames(0, 10, 13), strict=True):
        assert robot.images["color"].shape == (96, 128, 3) and training.images["color"].shape == (32, 48, 3)
        one, other = (runner.predict_chunk(f.state_rad, f.images) for f in (robot, training))
        np.testing.assert_array_equal(one, other)
        nearest = {"color": robot.images["color"][::3, ::3][:, :48]}  # another way to shrink is another policy
        nearest["color"] = resize_image(np.ascontiguousarray(nearest["color"]), (32, 48))
        assert np.abs(runner.predict_chunk(robot.state_rad, nearest) - one).max() > 0


def test_angles_are_wrapped_as_in_training(trained: Path):
    """A UR joint reads up to two turns, the policy knows angles around its reference. Those there are untouched."""
    runner = PolicyRunner(trained, backend="native", device="cpu")
    state, images = random_observation({"color": (32, 48)})
    expected = runner.predict_chunk(state, images)
    turned = state.astype(np.float64) + 2 * np.pi * np.array([1, -1, 0, 2, 0, -1])
    np.testing.assert_allclose(runner.predict_chunk(turned, images), expected, rtol=0, atol=1e-6)
    reference = np.array(contract_of(trained)["angle_reference_rad"])
    edge = (reference + [np.pi, -np.pi, 3.1, -3.1, 0, np.pi]).astype(np.float32)
    np.testing.assert_array_equal(runner.contract.wrap(edge), edge)


# -- the contract --------------------------------------------------------------------------------------------------


def test_the_contract_is_read_from_train_config(trained: Path, trained_absolute: Path):
    delta, absolute = (PolicyRunner(path, backend="native", device="cpu") for path in (trained, trained_absolute))
    assert delta.contract.state_names == UR_JOINTS and delta.contract.revolute == (True,) * 6
    assert (delta.contract.action_mode, delta.contract.action_unit) == ("delta", "rad per frame")
    assert (absolute.contract.action_mode, absolute.contract.action_unit) == ("absolute", "rad")
    assert delta.contract.image_resize == (32, 48) and delta.contract.cameras == {"color": (32, 48)}
    assert delta.contract.fps == 30.0 and delta.contract.wrap_angles and len(delta.contract.held_out_episodes) == 1
    assert delta.contract.state_labels[0] == "shoulder_pan" and delta.contract.source == "train_config.json"
    assert (absolute.mode, absolute.ensemble_m) == ("ensemble", 0.01)


def test_a_checkpoint_without_a_contract_needs_the_flags(exchange: Path):
    """LeRobot's own checkpoints do not say what a delta is: a person must, all of it demanded in one line."""
    checkpoint = POLICIES["LeRobot 0.3.2's own"](exchange)
    with pytest.raises(PolicyError, match=r"--action-mode \(delta or absolute or relative\) and --wrap or --no-wrap$"):
        PolicyRunner(checkpoint, device="cpu")
    with pytest.raises(PolicyError, match="say --wrap or --no-wrap$"):
        PolicyRunner(checkpoint, device="cpu", said={"action_mode": "delta"})
    with pytest.raises(PolicyError, match="--wrap: the dataset does not name the UR arm's joints"):
        PolicyRunner(checkpoint, device="cpu", said=SAID | {"wrap_angles": True})
    names = [f"left_{name}" for name in UR_JOINTS[:5]] + ["gripper"]
    runner = PolicyRunner(checkpoint, device="cpu", said=SAID | {"wrap_angles": True, "joint_names": names})
    assert runner.contract.revolute == (True,) * 5 + (False,)
    with pytest.raises(PolicyError, match="--image-resize 9 9"):
        PolicyRunner(checkpoint, device="cpu", said=SAID | {"image_resize": (9, 9)})


def test_lerobots_own_train_config_is_not_taken_for_a_contract(exchange: Path, tmp_path: Path):
    """lerobot-train writes a train_config.json, too."""
    copy = shutil.copytree(POLICIES["LeRobot 0.4.4's own"](exchange), tmp_path / "copy")
    (copy / "train_config.json").write_text(json.dumps({"dataset": {"repo_id": "x"}, "policy": {"type": "act"}}))
    with pytest.raises(PolicyError, match="say --action-mode"):
        PolicyRunner(copy, device="cpu")


@pytest.mark.parametrize(
    "flag, line",
    [
        ({"action_mode": "absolute"}, "--action-mode: found absolute, but .*train_config.json says action_mode delta"),
        ({"wrap_angles": False}, "--wrap: found False, but .* says wrap_angles True"),
        ({"image_resize": (64, 64)}, r"--image-resize: found \(64, 64\), but .* says image_resize \(32, 48\)"),
    ],
)
def test_a_flag_that_contradicts_the_contract_is_refused(trained: Path, flag: dict, line: str):
    with pytest.raises(PolicyError, match=line):
        PolicyRunner(trained, device="cpu", said=flag)


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda c: c.pop("joint_names"), "not the contract that train.py writes .*joint_names"),
        (lambda c: c.update(joint_names=["a", "b"]), "2 joint_names; config.json has 6 joints"),
        (
            lambda c: c.update(action_mode="velocity"),
            "action_mode is 'velocity'; expected delta or absolute or relative",
        ),
        (lambda c: c.update(image_resize=[10, 10]), r"image_resize is \(10, 10\); config.json says"),
    ],
)
def test_a_broken_contract_is_one_line(exchange: Path, tmp_path: Path, change, line: str):
    broken = ours(exchange, tmp_path)
    contract = json.loads((broken / "train_config.json").read_text())
    change(contract)
    (broken / "train_config.json").write_text(json.dumps(contract))
    with pytest.raises(PolicyError, match=line) as refused:
        PolicyRunner(broken, device="cpu")
    assert "\n" not in str(refused.value)


def test_the_doors_to_the_robots_own_convention(exchange: Path, tmp_path: Path):
    """JointState lists joints in its own order and on any turn, which stays (commands must not turn a joint back); the
    policy's signs are applied on the way in, and taken off its actions on the way out."""
    directory = ours(exchange, tmp_path)
    content = json.loads((directory / "train_config.json").read_text()) | {
        "joint_sign": [1.0, -1.0, 1.0, 1.0, -1.0, 1.0]
    }
    (directory / "train_config.json").write_text(json.dumps(content))
    contract = PolicyRunner(directory, backend="native", device="cpu").contract
    names = ["gripper", *reversed(UR_JOINTS)]
    state = contract.state_from_robot(names, [9.0, 0.6, 0.5, 0.4 + 2 * np.pi, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(state, [0.1, -0.2, 0.3, 0.4 + 2 * np.pi, -0.5, 0.6])
    np.testing.assert_allclose(contract.wrap(state), [0.1, -0.2, 0.3, 0.4, -0.5, 0.6])
    np.testing.assert_allclose(contract.to_robot(np.full(6, 0.5)), [0.5, -0.5, 0.5, 0.5, -0.5, 0.5])
    with pytest.raises(PolicyError, match="joints elbow_joint are missing; the robot sent"):
        contract.state_from_robot(["gripper"] + [n for n in UR_JOINTS if n != "elbow_joint"], range(6))
    with pytest.raises(PolicyError, match="7 joint names but 6 positions"):
        contract.state_from_robot(names, range(6))
    with pytest.raises(PolicyError, match="joints elbow_joint are there more than once"):
        contract.state_from_robot([*UR_JOINTS, "elbow_joint"], range(7))
    with pytest.raises(PolicyError, match="not finite: elbow_joint nan"):
        contract.state_from_robot(UR_JOINTS, [np.nan if name == "elbow_joint" else 0.1 for name in UR_JOINTS])


WRIST, ELBOW = UR_JOINTS.index("wrist_3_joint"), UR_JOINTS.index("elbow_joint")


@pytest.mark.parametrize(
    ("joint", "at_rad", "asked_rad", "command_rad"),
    [
        (WRIST, 0.2, 0.3, 0.3),
        (WRIST, 3.5, 3.4 - 2 * np.pi, 3.4),  # the policy knows the pose as -2.88
        (WRIST, -3.5, 2.9, 2.9 - 2 * np.pi),
        (WRIST, 6.2, 0.15, 0.15),  # the nearest, 6.43, is outside: the other way round
        (WRIST, -6.2, -0.15, -0.15),
        (ELBOW, 3.0, -3.1, -3.1),  # the elbow turns no further than half a turn
        (ELBOW, 3.0, 3.3, 3.3 - 2 * np.pi),
    ],
)
@pytest.mark.parametrize("reference", [0.0, 3.1])
def test_an_absolute_action_is_commanded_where_the_joint_is(
    exchange: Path, tmp_path: Path, joint, at_rad, asked_rad, command_rad, reference
):
    """Of the angles that mean the same pose: the nearest one inside the UR10e's limits; no joint is sent around."""
    absolute = {"action_mode": "absolute", "angle_reference_rad": [reference] * 6}
    contract = with_contract(exchange, tmp_path, **absolute)
    state, action = np.zeros(6), np.zeros(6, np.float32)
    state[joint], action[joint] = at_rad, asked_rad
    command = contract.joint_command(action, state, np.full(6, 9.0))  # the last command plays no part
    assert command[joint] == pytest.approx(command_rad, abs=1e-6) and np.abs(np.delete(command, joint)).max() == 0


def test_a_command_outside_a_joints_limits_is_refused(exchange: Path, tmp_path: Path):
    """Whoever adds deltas for too long, or asks for a pose that the elbow has not."""
    contract = with_contract(exchange, tmp_path, action_mode="delta")
    with pytest.raises(PolicyError, match="wrist_3 would go to 6.30.* outside its limits -6.283 to 6.283 rad"):
        contract.to_robot(
            contract.joint_command(np.float32([0, 0, 0, 0, 0, 0.05]), np.zeros(6), np.array([0, 0, 0, 0, 0, 6.25]))
        )
    contract = with_contract(exchange, tmp_path, action_mode="absolute", wrap_angles=False)
    with pytest.raises(PolicyError, match="elbow would go to 3.2"):
        contract.to_robot(contract.joint_command(np.float32([0, 0, 3.2, 0, 0, 0]), np.zeros(6), np.zeros(6)))


def test_a_state_is_given_on_the_turn_that_training_used(exchange: Path, tmp_path: Path):
    """Around the contract's reference; without one, as in older checkpoints, around 0; what fits stays to the bit."""
    seen = np.array([0.3, 3.5, -3.1, 3.5 - 2 * np.pi, 6.2, -0.5])
    around = [0.0, 3.1, 3.1, 3.1, 3.1, 3.1]
    contract = with_contract(exchange, tmp_path, action_mode="absolute", angle_reference_rad=around)
    expected = [0.3, 3.5, -3.1 + 2 * np.pi, 3.5, 6.2, -0.5 + 2 * np.pi]
    np.testing.assert_allclose(contract.wrap(seen), expected)
    inside = np.float32([0.3, 3.5, np.pi, 3.1 + np.pi, 3.1 - np.pi + 1e-6, 1.0])
    assert (contract.wrap(inside) == inside).all()
    older = with_contract(exchange, tmp_path, angle_reference_rad=None)
    np.testing.assert_allclose(older.wrap(seen), np.arctan2(np.sin(seen), np.cos(seen)))
    np.testing.assert_allclose(contract.beside(np.full(6, -3.1), np.full(6, 3.2)), np.full(6, -3.1 + 2 * np.pi))


def with_contract(exchange: Path, folder: Path, **changes: object) -> RobotContract:
    """The contract of a policy of ours with other content; None takes a key out."""
    directory = ours(exchange, folder / str(len(list(folder.iterdir()))))
    content = json.loads((directory / "train_config.json").read_text()) | changes
    content = {name: value for name, value in content.items() if value is not None or name not in changes}
    (directory / "train_config.json").write_text(json.dumps(content))
    return PolicyRunner(directory, backend="native", device="cpu").contract


def test_every_step_on_recordings_that_begin_at_rest_is_warned_about(exchange: Path, tmp_path: Path):
    """An arm at rest looks the same in every frame of it: the first action of each chunk hardly moves it."""
    for rest_s, mode, warned in ((0.2, "every-step", True), (0.2, "chunk", False), (0.05, "every-step", False),
                                 (None, "every-step", False)):  # fmt: skip
        directory = ours(exchange, tmp_path / f"{rest_s} {mode}")
        content = json.loads((directory / "train_config.json").read_text()) | {"rest_at_start_s": rest_s}
        (directory / "train_config.json").write_text(json.dumps(content))
        notes = PolicyRunner(directory, backend="native", device="cpu", mode=mode).notes
        assert any("begin with 0.2 s of rest" in note for note in notes) == warned


# -- what it needs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, line",
    [
        ({"device": "mps"}, r"device mps: not available on this machine \(found .*cpu\)"),
        ({"device": "tpu"}, "device is 'tpu'; expected one of auto, cpu, cuda, mps"),
        ({"backend": "tensorrt"}, "backend is 'tensorrt'"),
        ({"mode": "fast"}, "mode is 'fast'"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(exchange: Path, options: dict, line: str):
    with pytest.raises(PolicyError, match=line):
        PolicyRunner(POLICIES["ours, two cameras"](exchange), **{"device": "cpu"} | options)


def test_the_package_imports_neither_the_trainer_nor_lerobot_nor_ros():
    """It runs on a robot's computer: the trainer has no place there, and LeRobot only when it is used."""
    code = (
        "import sys, ur10e_deploy.offline_eval, ur10e_deploy.compare;"
        "print([m for m in ('train', 'lerobot', 'rclpy', 'wandb', 'matplotlib', 'av') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"PATH": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'deploy'}"},
    )  # fmt: skip
    assert result.stdout.strip() == "[]"


def test_the_network_is_the_one_in_the_checkpoint(exchange: Path):
    """predict_chunk is load_policy's, on the same raw observation: nothing is lost between image and batch."""
    checkpoint = POLICIES["ours, two cameras"](exchange)
    state, images = random_observation(TWO_CAMERAS)
    expected = load_policy(checkpoint).predict_chunk(as_batch(state, images))[0]
    chunk = PolicyRunner(checkpoint, backend="native", device="cpu").predict_chunk(state, images)
    np.testing.assert_allclose(chunk, expected.numpy(), rtol=0, atol=1e-6)
