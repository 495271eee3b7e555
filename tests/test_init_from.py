"""training.init_from: a new run that begins with another policy, ours or LeRobot's, on other bags."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from lerobot_checkpoint import load_policy, load_training_state
from tests.bags import CAMERA_TOPIC, make_take, write_bag
from tests.policies import CHUNK, POLICIES, SETTINGS, TWO_CAMERAS, contract_of, exchange, trained, trained_absolute
from tests.tiny import arguments, assert_same_run, run, run_process, torchrun, trainer, weights

__all__ = ["exchange", "trained", "trained_absolute"]  # fixtures

OF_ITS_OWN = ("decoder_pos_embed.", "action_head.", "vae_encoder_action_input_proj.")  # with other actions and chunks


@pytest.fixture(scope="module")
def other_bags(sample_bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of the six recordings."""
    folder = tmp_path_factory.mktemp("other") / "bags"
    folder.mkdir()
    for number in (0, 2, 4):
        (folder / f"episode_{number:03d}").symlink_to(sample_bags / f"episode_{number:03d}")
    return folder


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], but: tuple[str, ...] = ()) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith(but or ("-",)))


def test_a_run_on_other_bags_begins_with_these_weights(trained: Path, other_bags: Path, tmp_path: Path, capsys):
    """A new run: the weights are the policy's; step, optimizer and statistics are new, and what was done is said. (A
    run's directory stands for its last checkpoint.)"""
    ready = trainer(other_bags, tmp_path, training__init_from=trained, model__pretrained_backbone="true")
    assert_equal(ready.model.state_dict(), weights(trained))
    assert ready.step == 0 and not ready.optimizer.state
    theirs, fresh = load_policy(trained), trainer(other_bags, tmp_path / "fresh")
    assert not np.array_equal(ready.stats["action"]["mean"], theirs.stats["action"]["mean"])
    for key, pair in fresh.stats.items():
        assert all(np.array_equal(ready.stats[key][name], pair[name]) for name in pair)
    said = capsys.readouterr().out
    assert f"training.init_from: weights from {theirs.path}\n" in said
    assert "statistics of state, color, action the new data's" in said
    started = ready.contract["started_from"]
    assert started["path"] == str(theirs.path) and len(started["weights_sha256"]) == 64
    assert started["statistics_kept"] == started["not_loaded"] == [] and started["code"] == ready.contract["code"]


def test_kept_statistics_outlast_a_resume_and_the_policy(trained: Path, other_bags: Path, tmp_path: Path, capsys):
    """init_stats: keep normalises, and wraps angles, as the policy did. A resume goes on bit for bit, when the policy
    that the run began with is gone, and the checkpoint still says what it was."""
    source = Path(shutil.copytree(trained / "last/pretrained_model", tmp_path / "source"))
    kept = {"training__init_from": source, "training__init_stats": "keep", "training__save_freq": 2}
    unbroken = run(other_bags, tmp_path / "a", training__steps=4, **kept)
    assert "statistics of state, color, action that policy's" in capsys.readouterr().out
    broken = run(other_bags, tmp_path / "b", training__steps=2, **kept)
    shutil.rmtree(source)
    run(other_bags, tmp_path / "b", "--resume", training__steps=4, **kept)
    assert "training.init_from is not loaded again" in capsys.readouterr().out
    assert_same_run(broken, unbroken)
    policy = load_policy(broken)
    for key, pair in load_policy(trained).stats.items():
        assert all(np.array_equal(policy.stats[key][name], pair[name]) for name in pair)
    assert policy.train_config["angle_reference_rad"] == contract_of(trained)["angle_reference_rad"]
    assert policy.train_config["started_from"] == contract_of(unbroken)["started_from"]
    assert policy.train_config["started_from"]["path"] == str(source)


REFUSED = {
    "a camera more": (
        {"data__camera_topics": f"{{color: {CAMERA_TOPIC}, wrist: /wrist}}"}, "cameras: wrist only in this run;"),
    "a joint less": (
        {"data__joint_names": "[shoulder_pan_joint, shoulder_lift_joint, elbow_joint, wrist_1_joint, wrist_2_joint]",
         "model__state_dim": 5, "model__action_dim": 5}, "states: wrist_3_joint only in that policy;"),
    "a gripper more": (
        {"data__state_topics": "{gripper: '/gripper:position[0]'}", "model__state_dim": 7, "model__action_dim": 7},
        "states: gripper only in this run;"),
    "joints in another order": (
        {"data__joint_names": "[shoulder_lift_joint, shoulder_pan_joint, elbow_joint, wrist_1_joint, wrist_2_joint, "
                              "wrist_3_joint]"}, "states: shoulder_pan_joint, shoulder_lift_joint, elbow_joint"),
    "a joint turned round": (
        {"conventions__apply_joint_sign": "true", "conventions__joint_sign": "[1, 1, -1, 1, 1, 1]"},
        "joint signs (was [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], is [1.0, 1.0, -1.0, 1.0, 1.0, 1.0])"),
    "other turns": ({"conventions__wrap_angles": "false"}, "conventions.wrap_angles (was True, is False)"),
    "other actions": ({"conventions__action_mode": "absolute"}, "conventions.action_mode (was delta, is absolute)"),
    "another chunk": ({"model__chunk_size": 4, "model__n_action_steps": 4}, "model.chunk_size (was 8, is 4)"),
    "another network": ({"model__dim_model": 64, "model__n_heads": 4},
                        "model.dim_model (was 32, is 64); model.n_heads (was 2, is 4)"),
    "nothing there": ({"training__init_from": "/nowhere"}, "training.init_from: /nowhere: no config.json"),
    "nothing to keep": ({"training__init_from": "null", "training__init_stats": "keep"},
                        "training.init_stats: found keep, expected new without training.init_from"),
    "no part of nothing": ({"training__init_from": "null", "training__init_partial": "true"},
                           "training.init_partial: found True, expected false without training.init_from"),
}  # fmt: skip


@pytest.mark.parametrize("change, words", REFUSED.values(), ids=list(REFUSED))
def test_what_does_not_fit_is_refused_by_name(trained: Path, sample_bags: Path, tmp_path: Path, capsys, change, words):
    """In one line, before a bag is decoded."""
    given = {"training__init_from": trained, "data__cache_dir": tmp_path / "cache"} | change
    assert train.main(arguments(sample_bags, tmp_path, **given)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: training.init_") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "cache").exists()


def test_a_run_does_not_overwrite_what_it_begins_with(trained: Path, sample_bags: Path, tmp_path: Path, capsys):
    """--overwrite would remove the policy before it is read: refused, and still there."""
    copied = Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))
    for path in (copied, copied / "last"):
        assert train.main(arguments(sample_bags, tmp_path, ("--overwrite",), training__init_from=path)) == 1
        assert f"training.init_from: found {path}, expected a policy outside" in capsys.readouterr().err
    assert_equal(weights(copied), weights(trained))


def test_in_part_what_fits_is_loaded_and_the_rest_is_listed(trained: Path, other_bags: Path, tmp_path: Path, capsys):
    """init_partial, with other actions and another chunk: what depends on these begins as in any run with this seed.
    Statistics that are kept are those of what means the same."""
    other = {"conventions__action_mode": "absolute", "model__chunk_size": 4, "model__n_action_steps": 4}
    begun = {"training__init_from": trained, "training__init_partial": "true", "training__init_stats": "keep"}
    ready, fresh = trainer(other_bags, tmp_path, **other, **begun), trainer(other_bags, tmp_path / "fresh", **other)
    ours, theirs, anew = ready.model.state_dict(), weights(trained), fresh.model.state_dict()
    assert_equal(ours, theirs, but=(*OF_ITS_OWN, "vae_encoder_pos_enc"))
    of_its_own = [name for name in ours if name.startswith(OF_ITS_OWN)]
    assert all(torch.equal(ours[name], anew[name]) for name in (*of_its_own, "vae_encoder_pos_enc"))
    assert sorted(ready.contract["started_from"]["not_loaded"]) == sorted(of_its_own) and len(of_its_own) == 5
    said = capsys.readouterr().out
    assert ", without vae_encoder_action_input_proj, decoder_pos_embed, action_head, which begin as in any run" in said
    assert "statistics of state, color that policy's, of action the new data's" in said
    assert "conventions.action_mode (was delta, is absolute); model.chunk_size (was 8, is 4)" in said
    for feature, stats in (("observation.state", load_policy(trained).stats), ("action", fresh.stats)):
        assert np.array_equal(ready.stats[feature]["std"], stats[feature]["std"])


def test_what_the_policy_was_trained_on_is_no_new_recording(
    trained_absolute: Path, sample_bags: Path, tmp_path: Path, capsys
):
    """It held out nothing, so that what the new run holds out is not unseen: said, by the recordings' hashes."""
    given = {"training__init_from": trained_absolute, "conventions__action_mode": "absolute", "training__seed": 24}
    ready = trainer(sample_bags, tmp_path, **given)
    (held_out,) = [episode.name for episode in ready.held_out]
    assert f"was trained on what is held out here ({held_out}): its error" in capsys.readouterr().out
    ready.origin.trained_on[held_out] = "another recording of the same name"
    bags = train.bag_settings(ready.cfg)
    _, notes = ready.origin.on_data(ready.stats, [], ready.train_episodes, ready.held_out, bags)
    assert not any("held out" in note for note in notes)


def test_a_pose_that_is_now_a_turn_away_is_said(trained: Path, other_bags: Path, tmp_path: Path):
    """New statistics bring their own reference of angles; a joint that it turns is named."""
    ready = trainer(other_bags, tmp_path, training__init_from=trained)
    bags = train.bag_settings(ready.cfg)
    on_data = (ready.stats, [], ready.train_episodes, ready.held_out, bags)
    assert not any("whole turn" in note for note in ready.origin.on_data(*on_data)[1])
    ready.origin.their_reference_rad = [0.0, 0.0, ready.stats["observation.state"]["mean"][2] + np.pi, 0, 0, 0]
    (note,) = [note for note in ready.origin.on_data(*on_data)[1] if "whole turn" in note]
    assert "elbow_joint is a whole turn from where that policy saw it in " in note


@pytest.mark.parametrize("name", ["LeRobot 0.3.2's own", "LeRobot 0.4.4's own"])
def test_a_policy_that_lerobot_wrote(exchange: Path, tmp_path: Path, capsys, name: str):
    """All of its weights; what its states and actions are it does not say, and that is said. Its cameras have names."""
    messages = make_take(seconds=1.0).messages()
    cameras = {camera: f"/{camera}" for camera in TWO_CAMERAS}
    messages += [(topic, t, m) for at, t, m in messages if at == CAMERA_TOPIC for topic in cameras.values()]
    write_bag(tmp_path / "bags/a", messages)
    settings = {f"model__{key}": str(value).lower() for key, value in SETTINGS.items() if key != "cameras"}
    settings |= {"model__n_action_steps": CHUNK, "training__init_from": POLICIES[name](exchange)}
    topics = json.dumps(cameras).replace('"', "")
    ready = trainer(tmp_path / "bags", tmp_path, data__camera_topics=topics, **settings)
    assert_equal(ready.model.state_dict(), weights(POLICIES[name](exchange)))
    said = capsys.readouterr().out
    assert "it does not say what its states and actions are: taken for shoulder_pan_joint, " in said
    assert ready.contract["started_from"]["code"] == {}
    assert train.main(arguments(tmp_path / "bags", tmp_path, **settings)) == 1  # with the one camera "color"
    assert "cameras: front, wrist only in that policy; cameras: color only in this run" in capsys.readouterr().err


def test_a_resume_on_other_recordings_names_the_way(trained: Path, other_bags: Path, capsys):
    """It is another run, and training.init_from is how it begins with these weights."""
    assert train.main(arguments(other_bags, trained.parent, ("--resume",), training__seed=24)) == 1
    error = capsys.readouterr().err
    assert "cannot resume, the run has changed: training episodes (" in error
    assert f"training.init_from={trained}/checkpoint_000006\n" in error


def test_two_ranks_begin_with_it_and_average_it(trained: Path, other_bags: Path, tmp_path: Path):
    """Rank 0 alone reads the policy. The average (training.ema_decay) and the weights that are trained are exact after
    a resume."""
    given = {"training__init_from": trained, "training__ema_decay": 0.5, "training__save_freq": 2, "training__steps": 4}
    done = run_process(other_bags, tmp_path / "a", launcher=torchrun(2), **given)
    assert done.returncode == 0 and done.stdout.count("training.init_from: weights from") == 1, done.stderr
    unbroken = tmp_path / "a/run"
    broken = Path(shutil.copytree(unbroken, tmp_path / "b/run", symlinks=True))
    shutil.rmtree(broken / "checkpoint_000004")
    (broken / "last").unlink()
    resumed = run_process(other_bags, tmp_path / "b", "--resume", launcher=torchrun(2), **given)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(broken, unbroken)
    assert_equal(*(load_training_state(d / "last")["own_weights"] for d in (broken, unbroken)))
