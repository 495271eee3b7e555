"""Small checkpoints for the tests of lerobot_checkpoint/: a random model with random statistics, saved, to be broken.

Fixtures here are imported by the test files that use them. Nothing here may import lerobot: the tests that kill saves
check that saving needs none.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from act_model import ACT, ACTConfig
from lerobot_checkpoint import Stats, save_checkpoint, stats_shapes

# "wrist" before "front": an order that sorting would change. Their sizes differ too.
CAMERAS = {"one camera": dict(top=(40, 56)), "two cameras": dict(wrist=(64, 33), front=(40, 56))}


def settings(image_shapes: dict) -> dict:
    return dict(
        state_dim=6, action_dim=7, cameras=tuple(image_shapes), chunk_size=10, dim_model=32, n_heads=4,
        dim_feedforward=48, feedforward_activation="relu", n_encoder_layers=1, n_decoder_layers=1,
        n_vae_encoder_layers=1, use_vae=True, latent_dim=8, dropout=0.1, pre_norm=False, vision_backbone="resnet18",
        replace_final_stride_with_dilation=False,
    )  # fmt: skip


def random_stats(config: ACTConfig) -> Stats:
    rng = np.random.default_rng(0)
    return {
        key: dict(mean=rng.normal(size=shape).astype(np.float32), std=rng.uniform(0.1, 1.0, shape).astype(np.float32))
        for key, shape in stats_shapes(config).items()
    }


def make_run(image_shapes: dict) -> dict:
    """save_checkpoint's keyword arguments, for a random model with random statistics."""
    torch.manual_seed(0)
    config = ACTConfig(**settings(image_shapes))
    return dict(
        model_state=ACT(config).state_dict(),
        act_config=config,
        image_shapes=image_shapes,
        stats=random_stats(config),
        policy_fields=dict(
            n_action_steps=10,
            temporal_ensemble_coeff=None,
            kl_weight=10.0,
            optimizer_lr=1e-5,
            optimizer_weight_decay=1e-4,
            optimizer_lr_backbone=1e-5,
        ),
        train_config=dict(seed=7, model=dict(pretrained_backbone="resnet18.pt")),
        training_state=dict(step=1, rng=torch.get_rng_state(), losses=[0.5, None], name="run"),
    )


def raw_observation(image_shapes: dict) -> dict[str, torch.Tensor]:
    """What a robot gives: joints in rad, images uint8 / 255."""
    generator = torch.Generator().manual_seed(3)
    observation = {"observation.state": torch.randn(2, 6, generator=generator)}
    for camera, size in image_shapes.items():
        pixels = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=generator)
        observation[f"observation.images.{camera}"] = pixels.float() / 255
    return observation


@pytest.fixture(scope="module")
def run() -> dict:
    return make_run(CAMERAS["one camera"])


@pytest.fixture(scope="module")
def saved_once(run, tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("saved"), 5, **run)


@pytest.fixture
def pretrained(saved_once, tmp_path) -> Path:
    """A copy of a pretrained_model/ directory, away from its manifest, to be broken."""
    return Path(shutil.copytree(saved_once / "pretrained_model", tmp_path / "copy"))


@pytest.fixture
def checkpoint(saved_once, tmp_path) -> Path:
    """A copy of a whole checkpoint, to be broken."""
    return Path(shutil.copytree(saved_once, tmp_path / saved_once.name))


def edit_json(path: Path, edit: Callable[[Any], object]) -> None:
    """Rewrite a JSON file with its content changed by `edit`, in place."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """The same for a safetensors file."""
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)
