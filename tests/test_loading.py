"""load_policy: it finds the policy in any of its directories, and refuses what would change the robot's actions."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lerobot_checkpoint import CheckpointError, load_policy, save_checkpoint
from lerobot_checkpoint.layout import NORMALIZER_FILE, POSTPROCESSOR_FILE, PREPROCESSOR_FILE, UNNORMALIZER_FILE
from tests.checkpoints import edit_json, edit_tensors, pretrained, run, saved_once

__all__ = ["pretrained", "run", "saved_once"]  # fixtures

WEIGHTS, PRE, POST = "model.safetensors", PREPROCESSOR_FILE, POSTPROCESSOR_FILE
NORMALIZER, UNNORMALIZER = NORMALIZER_FILE, UNNORMALIZER_FILE


def without_buffers(tensors: dict) -> None:
    for key in [key for key in tensors if not key.startswith("model.")]:
        del tensors[key]


def remove_processors(pretrained: Path) -> None:
    for path in pretrained.glob("policy_*"):
        path.unlink()


def scale(key: str, factor: float):
    return lambda tensors: tensors[key].mul_(factor)


@pytest.mark.parametrize("where", ["", "pretrained_model", ".."])
def test_load_policy_takes_any_of_its_directories(saved_once, where):
    """The checkpoint, its pretrained_model/ and the output directory all name the same policy."""
    assert load_policy(saved_once / where).path == saved_once / "pretrained_model"


def test_the_output_directory_of_lerobot_train(pretrained: Path, tmp_path: Path):
    """outputs/train/NAME/checkpoints/000100/pretrained_model, and a link `last`: as lerobot_train.py leaves them."""
    shutil.copytree(pretrained, tmp_path / "checkpoints/000100/pretrained_model")
    (tmp_path / "checkpoints/last").symlink_to("000100")
    assert load_policy(tmp_path).path == tmp_path / "checkpoints/000100/pretrained_model"


def test_output_directory_can_move(run, tmp_path):
    """Links are relative: a copied or mounted output directory still loads."""
    save_checkpoint(tmp_path / "a", 1, **run)
    os.rename(tmp_path / "a", tmp_path / "b")
    assert load_policy(tmp_path / "b").path == tmp_path / "b" / "checkpoint_000001" / "pretrained_model"


def test_either_normalisation_alone_is_enough(pretrained, run):
    """Buffers alone are 0.3.2's format, processors alone 0.4's: both give the statistics that were saved."""
    hidden = pretrained.with_name("hidden")
    shutil.copytree(pretrained, hidden)
    remove_processors(pretrained)
    edit_tensors(hidden / "model.safetensors", without_buffers)
    for directory in (pretrained, hidden):
        stats = load_policy(directory).stats
        assert all(np.array_equal(stats[key][n], v) for key, pair in run["stats"].items() for n, v in pair.items())


def test_no_normalisation_is_refused(pretrained):
    """Weights alone would drive the robot with un-normalised actions."""
    remove_processors(pretrained)
    edit_tensors(pretrained / "model.safetensors", without_buffers)
    with pytest.raises(CheckpointError, match="no normalisation, neither buffers in model.safetensors nor policy_pre"):
        load_policy(pretrained)


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        # Two statistics that contradict each other, wherever they are.
        (WEIGHTS, scale("normalize_inputs.buffer_observation_state.mean", 1.01), "observation.state contradict"),
        (WEIGHTS, scale("normalize_targets.buffer_action.std", 1.01), "statistics of action contradict"),
        (WEIGHTS, scale("unnormalize_outputs.buffer_action.mean", 1.01), "statistics of action contradict"),
        (NORMALIZER, scale("observation.images.top.std", 1.01), "observation.images.top contradict"),
        (UNNORMALIZER, scale("action.std", 1.01), "statistics of action contradict"),
        # One of them absent, or never set.
        (WEIGHTS, lambda t: t.pop("unnormalize_outputs.buffer_action.std"), "(buffers): no std of action"),
        (WEIGHTS, scale("normalize_inputs.buffer_observation_state.std", np.inf), "the statistics were never set"),
        (NORMALIZER, lambda t: t.pop("observation.state.mean"), "no mean of observation.state"),
        (UNNORMALIZER, lambda t: t.pop("action.mean"), f"{POST}: no mean of action"),
        (PRE, lambda j: j["steps"].pop(), f"{PRE}: no mean of observation.state"),
        (POST, lambda j: j["steps"][0].pop("state_file"), f"{POST}: no mean of action"),
        # A normalisation, or a step, other than ours.
        ("config.json", lambda j: j["normalization_mapping"].update(ACTION="MIN_MAX"), "normalization_mapping is"),
        (PRE, lambda j: j["steps"][3]["config"].update(eps=1e-6), "normalises with {'eps': 1e-06"),
        (PRE, lambda j: j["steps"][0]["config"].update(rename_map=dict(a="b")), "rename_observations_processor"),
        (POST, lambda j: j["steps"].append(dict(registry_name="delta")), "step delta {} is unknown here"),
        # Weights that are not this configuration's.
        (WEIGHTS, lambda t: t.pop("model.action_head.bias"), "missing action_head.bias; use a complete"),
        (WEIGHTS, lambda t: t.update({"model.x": torch.zeros(1)}), "unexpected x;"),
        (WEIGHTS, lambda t: t.update(x=torch.zeros(1)), "unexpected x;"),
        ("config.json", lambda j: j.update(dim_feedforward=64), "linear1.weight (48, 32) instead of (64, 32)"),
        # A configuration that this code cannot run.
        ("config.json", lambda j: j.update(type="diffusion"), "type is 'diffusion'; expected 'act'"),
        ("config.json", lambda j: j.update(dim_model=30), "ACTConfig.dim_model is 30; expected a multiple"),
        ("config.json", lambda j: j.pop("latent_dim"), "no 'latent_dim'"),
        (
            "config.json",
            lambda j: j["input_features"].update({"observation.environment_state": dict(type="ENV", shape=[2])}),
            "type of input observation.environment_state is 'ENV'; expected 'VISUAL'",
        ),
    ],
)
def test_load_policy_refuses(pretrained, file, edit, message):
    """What would change the robot's actions is refused, naming the file and what is wrong with it, in one line."""
    (edit_json if file.endswith(".json") else edit_tensors)(pretrained / file, edit)
    with pytest.raises(CheckpointError) as caught:
        load_policy(pretrained)
    assert message in str(caught.value) and str(pretrained) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", WEIGHTS, PRE, NORMALIZER, POST, UNNORMALIZER])
def test_load_policy_names_torn_files(pretrained, file):
    """Without a manifest too, a truncated or missing file is named."""
    path = pretrained / file
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match=f"{path}: not readable as"):
        load_policy(pretrained)
    path.unlink()
    name = pretrained if file == "config.json" else path
    with pytest.raises(CheckpointError, match=f"{name}: (missing|no config.json)"):
        load_policy(pretrained)


def test_a_path_that_holds_nothing(tmp_path):
    """The message says what a path may be."""
    with pytest.raises(CheckpointError, match="no config.json, pretrained_model/ or checkpoint_NNNNNN/ here"):
        load_policy(tmp_path / "nothing")
