"""pretrained_model/: the real LeRobot 0.3.2 and 0.4.4 act on ours as we do, and we on theirs as they do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from act_model import ACTConfig
from lerobot_checkpoint import load_policy, save_checkpoint
from lerobot_checkpoint.layout import POSTPROCESSOR_FILE, PREPROCESSOR_FILE
from lerobot_checkpoint.lerobot_writing import lerobot_config
from tests.checkpoints import CAMERAS, make_run, random_stats, raw_observation, settings
from tests.lerobot_044 import launch

ACTION_TOLERANCE = 1e-5  # rad
VERSIONS = ("0.3.2", "0.4.4")


def exchange_jobs(folder: Path) -> list:
    """Our checkpoints and raw observations for both camera sets, and what LeRobot has to do with them."""
    jobs = []
    for name, image_shapes in CAMERAS.items():
        place = folder / name.replace(" ", "-")
        run = make_run(image_shapes)
        ours = save_checkpoint(place / "ours", 1, **run) / "pretrained_model"
        observation, stats = str(place / "observation.safetensors"), str(place / "stats.safetensors")
        save_file(raw_observation(image_shapes), observation)
        flat = {f"{key}.{n}": torch.tensor(value) for key, pair in run["stats"].items() for n, value in pair.items()}
        save_file(flat, stats)
        asked = dict(observation=observation, out=str(place / "ours.out"))
        jobs.append(["act", dict(pretrained=str(ours), **asked)])
        native = dict(pretrained=str(place / "native"), observation=observation, out=str(place / "native.out"))
        jobs.append(["write", dict(settings=settings(image_shapes), image_shapes=image_shapes, stats=stats, **native)])
    return jobs


@pytest.fixture(scope="module")
def exchanged_044(tmp_path_factory) -> Path:
    return launch.run_once(tmp_path_factory, "checkpoint-exchange", exchange_jobs)


@pytest.fixture(scope="module")
def exchanged_032(tmp_path_factory) -> Path:
    from tests.lerobot_044 import reference  # imports lerobot

    folder = tmp_path_factory.mktemp("exchange-032")
    for function, arguments in exchange_jobs(folder):
        getattr(reference, function)(**arguments)
    return folder


@pytest.fixture
def exchanged(request, lerobot, name) -> Path:
    folder = request.getfixturevalue(f"exchanged_{lerobot.replace('.', '')}")
    return folder / name.replace(" ", "-")


@pytest.mark.parametrize("lerobot", VERSIONS)
@pytest.mark.parametrize("name", CAMERAS)
def test_lerobot_acts_on_our_checkpoint_as_we_do(exchanged, name, lerobot):
    """The same raw observation gives the same joint angles in LeRobot and in our Policy, chunk and first action."""
    theirs = load_file(exchanged / "ours.out")
    policy = load_policy(exchanged / "ours")
    chunk = policy.predict_chunk(raw_observation(CAMERAS[name]))
    assert (chunk - theirs["chunk"]).abs().max() <= ACTION_TOLERANCE
    assert (chunk[:, 0] - theirs["first"]).abs().max() <= ACTION_TOLERANCE
    assert chunk.std() > 0.1  # the angles do differ


@pytest.mark.parametrize("lerobot", VERSIONS)
@pytest.mark.parametrize("name", CAMERAS)
def test_we_act_on_lerobots_own_checkpoint_as_it_does(exchanged, name, lerobot):
    """load_policy reads what this LeRobot's save_pretrained wrote: same statistics, same joint angles."""
    theirs = load_file(exchanged / "native.out")
    policy = load_policy(exchanged / "native")
    chunk = policy.predict_chunk(raw_observation(CAMERAS[name]))
    assert (chunk - theirs["chunk"]).abs().max() <= ACTION_TOLERANCE
    assert policy.act_config == ACTConfig(**settings(CAMERAS[name]))
    assert policy.image_shapes == CAMERAS[name] and policy.train_config is None
    expected = random_stats(policy.act_config)
    assert all(np.array_equal(policy.stats[key][n], expected[key][n]) for key in expected for n in ("mean", "std"))


@pytest.mark.parametrize("name", CAMERAS)
def test_config_json_is_lerobot_032s(tmp_path, name):
    """Every field and value of config.json is what 0.3.2 itself writes for this policy, except push_to_hub."""
    from tests.lerobot_044 import reference

    image_shapes = CAMERAS[name]
    run = make_run(image_shapes)
    reference.make_config(settings(image_shapes), image_shapes)._save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "config.json").read_text())
    ours = lerobot_config(run["act_config"], image_shapes, run["policy_fields"])
    ours = json.loads(json.dumps(ours))
    assert set(ours) == set(theirs)
    assert ours == {**theirs, "push_to_hub": False}
    assert list(ours["input_features"]) == list(theirs["input_features"])  # the cameras' order


@pytest.mark.parametrize("name", CAMERAS)
def test_processor_files_are_lerobot_044s(exchanged_044, name):
    """The processors' JSON and file names are what 0.4.4 itself writes."""
    place = exchanged_044 / name.replace(" ", "-")
    ours, theirs = place / "ours" / "last" / "pretrained_model", place / "native"
    for file in (PREPROCESSOR_FILE, POSTPROCESSOR_FILE):
        assert json.loads((ours / file).read_text()) == json.loads((theirs / file).read_text())
    assert {p.name for p in ours.iterdir()} - {p.name for p in theirs.iterdir()} == {"train_config.json"}
