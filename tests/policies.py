"""Policies for the tests of the evaluation: trained by us, written by LeRobot 0.3.2 and by 0.4.4; made once per run.

POLICIES[name](exchange) is a checkpoint; observation(exchange, name) what it sees; see exchange() for the rest
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from ur10e_deploy.sources import BagSource

from act_model import ACT, ACTConfig
from lerobot_checkpoint import load_policy, save_checkpoint, stats_shapes
from rosbag_dataset import UR_JOINTS
from tests.lerobot_044 import launch
from tests.once import once
from tests.tiny import ROOT, run

TWO_CAMERAS = {"wrist": (64, 33), "front": (40, 56)}  # an order that sorting would change, and sizes that differ
SAID = {"action_mode": "delta", "wrap_angles": False}  # what a person says of LeRobot's own checkpoints
CHUNK = 10
SETTINGS = dict(
    state_dim=6, action_dim=6, cameras=tuple(TWO_CAMERAS), chunk_size=CHUNK, dim_model=32, n_heads=4,
    dim_feedforward=48, feedforward_activation="relu", n_encoder_layers=1, n_decoder_layers=1, n_vae_encoder_layers=1,
    use_vae=True, latent_dim=8, dropout=0.1, pre_norm=False, vision_backbone="resnet18",
    replace_final_stride_with_dilation=False,
)  # fmt: skip


@pytest.fixture(scope="session")
def trained(sample_bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a tiny run of train.py on the sample bags (delta actions, images of 32x48).

    The seed is one that holds out episode_003 alone.
    """
    return once(tmp_path_factory, "trained-delta", lambda folder: run(sample_bags, folder, training__seed=24)) / "run"


@pytest.fixture(scope="session")
def trained_absolute(sample_bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with absolute actions, and a coefficient of temporal ensembling."""

    def make(folder: Path) -> None:
        run(
            sample_bags, folder, conventions__action_mode="absolute", training__steps=3, training__val_fraction=0,
            model__temporal_ensemble_coeff=0.01, model__n_action_steps=1,
        )  # fmt: skip

    return once(tmp_path_factory, "trained-absolute", make) / "run"


@pytest.fixture(scope="session")
def trained_relative(sample_bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with relative actions."""

    def make(folder: Path) -> None:
        run(sample_bags, folder, conventions__action_mode="relative", training__steps=3, training__val_fraction=0)

    return once(tmp_path_factory, "trained-relative", make) / "run"


def contract_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "last/pretrained_model/train_config.json").read_text())


def random_stats(config: ACTConfig) -> dict[str, dict[str, np.ndarray]]:
    """Far from mean 0 and std 1: normalised twice, or not at all, is another policy."""
    rng = np.random.default_rng(0)
    return {
        key: dict(mean=rng.normal(size=shape).astype(np.float32), std=rng.uniform(0.1, 0.5, shape).astype(np.float32))
        for key, shape in stats_shapes(config).items()
    }


def save_ours(folder: Path, train_config: dict[str, Any], **policy_fields: Any) -> Path:
    """A checkpoint of ours with random weights, two cameras and statistics that matter; -> pretrained_model/."""
    torch.manual_seed(0)
    config = ACTConfig(**SETTINGS)
    fields = dict(
        n_action_steps=CHUNK, temporal_ensemble_coeff=None, kl_weight=10.0, optimizer_lr=1e-5,
        optimizer_weight_decay=1e-4, optimizer_lr_backbone=1e-5,
    )  # fmt: skip
    saved = save_checkpoint(
        folder, 5, model_state=ACT(config).state_dict(), act_config=config, image_shapes=TWO_CAMERAS,
        stats=random_stats(config), policy_fields=fields | policy_fields, train_config=train_config,
        training_state=dict(step=5),
    )  # fmt: skip
    return saved / "pretrained_model"


def two_cameras_contract(contract: dict[str, Any]) -> dict[str, Any]:
    return contract | {
        "image_resize": None,
        "angle_reference_rad": [0.0] * 6,  # LeRobot's policies are asked with the same states, which they do not wrap
        "cameras": dict.fromkeys(TWO_CAMERAS, "/camera"),
        "image_shapes": {camera: list(shape) for camera, shape in TWO_CAMERAS.items()},
    }


def random_observation(shapes: dict[str, tuple[int, int]], seed: int = 3) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What a robot gives: (6,) joint positions in rad, and a uint8 image per camera."""
    rng = np.random.default_rng(seed)
    images = {camera: rng.integers(0, 256, (*shape, 3), np.uint8) for camera, shape in shapes.items()}
    return rng.uniform(-2, 2, 6).astype(np.float32), images


def as_batch(state: np.ndarray, images: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The same as LeRobot and load_policy take it: a batch of one, images (1, 3, H, W) in [0, 1]."""
    batch = {f"observation.images.{c}": torch.from_numpy(i).permute(2, 0, 1)[None] / 255 for c, i in images.items()}
    return {"observation.state": torch.from_numpy(state)[None], **{k: v.contiguous() for k, v in batch.items()}}


POLICIES: dict[str, Callable[[Path], Path]] = {
    "trained by us": lambda exchange: Path((exchange / "trained").read_text()),
    "ours, two cameras": lambda exchange: exchange / "ours/checkpoint_000005/pretrained_model",
    "LeRobot 0.3.2's own": lambda exchange: exchange / "lerobot-0.3.2",
    "LeRobot 0.4.4's own": lambda exchange: exchange / "lerobot-0.4.4",
}


def said(name: str) -> dict[str, Any]:
    return SAID if "own" in name else {}


def observation(exchange: Path, name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return random_observation(load_policy(POLICIES[name](exchange)).image_shapes)


@pytest.fixture(scope="session")
def exchange(trained: Path, sample_bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every policy, what each LeRobot gives for its own (reference-<version>.safetensors), what our
    runner gives under LeRobot 0.4.4 (044.json), and dataset/, a LeRobot v3.0 dataset that 0.4.4 wrote from two bags."""
    return once(tmp_path_factory, "policy-exchange", lambda folder: _exchange(folder, trained, sample_bags))


def _exchange(folder: Path, trained: Path, sample_bags: Path) -> None:
    from tests.lerobot_044 import reference  # imports lerobot 0.3.2

    (folder / "trained").write_text(str(trained))
    save_ours(folder / "ours", two_cameras_contract(contract_of(trained)))
    state, images = random_observation(TWO_CAMERAS)
    save_file(as_batch(state, images), folder / "observation.safetensors")
    stats = random_stats(ACTConfig(**SETTINGS))
    flat = {f"{key}.{name}": torch.tensor(value) for key, pair in stats.items() for name, value in pair.items()}
    save_file(flat, folder / "stats.safetensors")
    write = dict(
        settings=SETTINGS, image_shapes=TWO_CAMERAS, stats=str(folder / "stats.safetensors"),
        observation=str(folder / "observation.safetensors"),
    )  # fmt: skip

    def target(version: str) -> dict[str, str]:
        out = str(folder / f"reference-{version}.safetensors")
        return write | dict(pretrained=str(folder / f"lerobot-{version}"), out=out)

    reference.write(**target("0.3.2"))
    values = contract_of(trained)["config"]["data"] | contract_of(trained)["config"]["conventions"]
    bags = BagSource(sample_bags, values | {"image_resize": None}, folder / "cache")
    for index in (0, 1):
        episode = bags.episode(index)
        colour = np.stack([frame.images["color"] for frame in bags.frames(index)])
        np.savez(folder / f"episode{index}.npz", state=episode.state_rad, action=episode.action, color=colour)

    for i, name in enumerate(POLICIES):
        where = observation(folder, name) if name != "LeRobot 0.4.4's own" else random_observation(TWO_CAMERAS)
        np.savez(folder / f"observation{i}.npz", state=where[0], **where[1])
    jobs = [["write", target("0.4.4")], ["write_dataset", dict(folder=str(folder), names=list(UR_JOINTS))]]
    jobs += [
        ["run_policies", dict(
            policies={n: [str(find(folder)), str(folder / f"observation{i}.npz"), said(n)]
                      for i, (n, find) in enumerate(POLICIES.items())},
            out=str(folder / "044.json"),
        )]
    ]  # fmt: skip
    run_044(folder, jobs)


def run_044(folder: Path, jobs: list) -> None:
    """Run policy_jobs.py under LeRobot 0.4.4, with our modules, and with rosbags, which that environment lacks."""
    lacking = folder / "lacking-packages"  # links, so that nothing else of this environment is seen there
    lacking.mkdir()
    installed = next((launch.PYTHON.parents[1] / "lib").glob("python3*/site-packages"))
    for package in ("rosbags", "ruamel", "lz4", "backports", "apsw"):
        if not (installed / package).exists() and (spec := importlib.util.find_spec(package)):
            place = Path(next(iter(spec.submodule_search_locations)))
            (lacking / package).symlink_to(place)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launch.run_script("policy_jobs.py", folder, path=(ROOT, ROOT / "deploy", lacking))
