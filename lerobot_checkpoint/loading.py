"""Loading: from a path to a policy that acts, with exactly the normalisation that it was trained with.

It takes our checkpoints and what LeRobot 0.3.2 or 0.4+ wrote, and needs no LeRobot, so that it runs on a robot.
Must not know: the training state; a policy needs none of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from act_model import ACT, ACTConfig, describe_mismatch, full_float32

from .directory import newest_checkpoint, verify_folders
from .errors import CheckpointError
from .files import read_json, read_tensors
from .layout import CONFIG_FILE, MANIFEST_FILE, PRETRAINED_DIR, TRAIN_CONFIG_FILE, WEIGHTS_FILE
from .lerobot_reading import find_stats, parse_config
from .normalisation import Normalizer, Stats


@dataclass
class LoadedPolicy:
    """A network with the normalisation that it was trained with, and what its checkpoint says of it.

    Attributes:
        path: the pretrained_model directory that it came from.
        model: the network, in eval mode; it sees and gives normalised values.
        act_config: the network's shape.
        normalizer: the statistics on the model's device, ready to be applied.
        stats: the same statistics as float32 arrays.
        image_shapes: camera -> (H, W) in pixels of the images that the network was trained on, in its order.
        policy_fields: a value for each of POLICY_FIELDS.
        train_config: the content of train_config.json; None if the directory has none.
    """

    path: Path
    model: ACT
    act_config: ACTConfig
    normalizer: Normalizer
    stats: Stats
    image_shapes: dict[str, tuple[int, int]]
    policy_fields: dict[str, Any]
    train_config: dict[str, Any] | None

    @torch.inference_mode()
    def predict_chunk(self, observation: Mapping[str, Tensor]) -> Tensor:
        """What the policy would do from here on, for B observations.

        Args:
            observation: "observation.state" (B, state_dim) in rad and "observation.images.<camera>" (B, 3, H, W) in
                [0, 1], floating point, on the model's device.

        Returns:
            (B, chunk, action_dim) float32 in the robot's units: rad, or rad per frame.

        Raises:
            KeyError, ValueError: as Normalizer.normalize.
        """
        with full_float32():
            actions, _ = self.model(self.normalizer.normalize(observation))
        return self.normalizer.unnormalize_action(actions)


def load_policy(path: str | Path, device: torch.device | str = "cpu") -> LoadedPolicy:
    """Load a policy that this package, LeRobot 0.3.2 or LeRobot 0.4+ wrote.

    A policy that lies in a checkpoint, beside a manifest, is compared with it first.

    Args:
        path: a pretrained_model directory, a checkpoint directory, or an output directory (ours, or that of LeRobot's
            trainer), which stands for its `last`; ours without such a link for its newest checkpoint that verifies.
        device: where the network is to run.

    Raises:
        CheckpointError: nothing there; damaged; weights that do not fit; a normalisation that is absent or
            contradictory; or something in it that this code does not do.
    """
    directory = find_pretrained(Path(path))
    if directory.name == PRETRAINED_DIR and (directory.parent / MANIFEST_FILE).exists():
        verify_folders(directory.parent, (PRETRAINED_DIR,))

    act_config, image_shapes, policy_fields = parse_config(directory / CONFIG_FILE)
    tensors = read_tensors(directory / WEIGHTS_FILE)
    weights = {key.removeprefix("model."): tensors.pop(key) for key in list(tensors) if key.startswith("model.")}
    stats = find_stats(directory, act_config, buffers=tensors)

    with torch.device("meta"):  # no time spent on an initialisation that is overwritten
        model = ACT(act_config)
    if mismatch := describe_mismatch(model.state_dict(), weights):
        raise CheckpointError(
            f"{directory / WEIGHTS_FILE}: does not fit {CONFIG_FILE}: {mismatch}; use a complete checkpoint"
        )
    model.load_state_dict({key: tensor.float() for key, tensor in weights.items()}, assign=True)
    # Channels last, as pixels are stored, is 10 % faster on a CPU.
    model.to(device, memory_format=torch.channels_last)  # ty: ignore[no-matching-overload] - torch's stubs lack it

    train_config = directory / TRAIN_CONFIG_FILE
    return LoadedPolicy(
        path=directory,
        model=model.eval(),
        act_config=act_config,
        normalizer=Normalizer(stats, device),
        stats=stats,
        image_shapes=image_shapes,
        policy_fields=policy_fields,
        train_config=read_json(train_config) if train_config.exists() else None,
    )


def find_pretrained(path: Path) -> Path:
    """The pretrained_model directory that `path` stands for (see load_policy), resolved.

    Raises:
        CheckpointError: there is none; or `last` is there but broken, because an older policy must not run unasked.
    """
    of_lerobot = path / "checkpoints" / "last" / PRETRAINED_DIR  # in the output directory of lerobot-train
    for directory in (path, path / PRETRAINED_DIR, path / "last" / PRETRAINED_DIR, of_lerobot):
        if (directory / CONFIG_FILE).exists():
            return directory.resolve()
    if (path / "last").exists():
        raise CheckpointError(
            f"{path / 'last'}: has no {PRETRAINED_DIR}/{CONFIG_FILE}; name another checkpoint to load"
        )
    problems: list[str] = []
    if newest := newest_checkpoint(path, on_bad=problems.append):
        return (newest / PRETRAINED_DIR).resolve()
    nothing = f"{path}: no {CONFIG_FILE}, {PRETRAINED_DIR}/ or checkpoint_NNNNNN/ here; name one of these"
    raise CheckpointError(problems[0] if problems else nothing)
