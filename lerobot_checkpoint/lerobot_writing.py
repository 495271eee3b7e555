"""A policy as LeRobot's files: the content of everything in pretrained_model/.

This room knows LeRobot's file formats: the fields of config.json, the processors of 0.4+, the names of the weights
and of 0.3.2's normalisation buffers. lerobot_reading.py is its counterpart and goes by the same names.
Must not know: where these files go, the training state, other checkpoints. Never imports lerobot: the tests compare
these files with what the real 0.3.2 and 0.4.4 write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from act_model import ACT, ACTION, STATE, ACTConfig, describe_mismatch

from .errors import CheckpointError
from .files import Content, json_content, tensors_content
from .layout import (
    CONFIG_FILE,
    NORMALIZER_FILE,
    POSTPROCESSOR_FILE,
    PREPROCESSOR_FILE,
    TRAIN_CONFIG_FILE,
    UNNORMALIZER_FILE,
    WEIGHTS_FILE,
)
from .normalisation import EPS, NORMALIZATION_MODES, Stats, image_key, stats_shapes

# Fields of config.json that do not describe the network: how its actions are used, and how it was trained. LeRobot
# wants them; the caller says their values (`policy_fields`).
POLICY_FIELDS = (
    "n_action_steps", "temporal_ensemble_coeff", "kl_weight",
    "optimizer_lr", "optimizer_weight_decay", "optimizer_lr_backbone",
)  # fmt: skip
# Fields of our ACTConfig that config.json has under the same names. The other three follow from its features.
NETWORK_FIELDS = tuple(
    name for name in ACTConfig.__dataclass_fields__ if name not in ("state_dim", "action_dim", "cameras")
)


def pretrained_files(
    model_state: Mapping[str, Tensor],
    config: ACTConfig,
    image_shapes: Mapping[str, tuple[int, int]],
    stats: Stats,
    policy_fields: Mapping[str, Any],
    train_config: Mapping[str, Any],
) -> dict[str, Content]:
    """The contents of pretrained_model/ by file name.

    Args:
        model_state: the bare ACT's state dict, on any device, in any memory format; stored as float32.
        config: the network's shape.
        image_shapes: camera -> (H, W) in pixels of its images when they reach the model.
        stats: mean and std of every feature, already checked (see checked_stats).
        policy_fields: a value for each of POLICY_FIELDS.
        train_config: the content of train_config.json, plain JSON values.

    Raises:
        CheckpointError: these do not fit each other, or LeRobot would refuse them.
    """
    with torch.device("meta"):  # shapes only, no memory
        expected = ACT(config).state_dict()
    if mismatch := describe_mismatch(expected, model_state):
        raise CheckpointError(
            f"{WEIGHTS_FILE}: model_state does not fit act_config: {mismatch}; pass the bare ACT's state"
        )
    if set(image_shapes) != set(config.cameras):
        raise CheckpointError(
            f"{CONFIG_FILE}: image_shapes has {sorted(image_shapes)}; expected {sorted(config.cameras)}"
        )
    if set(policy_fields) != set(POLICY_FIELDS):
        raise CheckpointError(
            f"{CONFIG_FILE}: policy_fields has {sorted(policy_fields)}; expected {sorted(POLICY_FIELDS)}"
        )
    most = 1 if policy_fields["temporal_ensemble_coeff"] is not None else config.chunk_size
    if not 1 <= policy_fields["n_action_steps"] <= most:
        raise CheckpointError(
            f"{CONFIG_FILE}: n_action_steps is {policy_fields['n_action_steps']}; expected 1 to {most} "
            "(chunk_size, but 1 with a temporal ensemble, which needs a prediction at every step)"
        )

    flat_stats = {f"{key}.{name}": torch.tensor(v) for key, pair in stats.items() for name, v in pair.items()}
    weights = {f"model.{key}": t.detach().to("cpu", torch.float32).contiguous() for key, t in model_state.items()}
    for buffers in buffer_names(config):
        for key, buffer in buffers.items():
            weights |= {f"{buffer}.{name}": torch.tensor(value) for name, value in stats[key].items()}
    preprocessor, postprocessor = processors(config, image_shapes)
    action_stats = {key: t for key, t in flat_stats.items() if key.startswith(f"{ACTION}.")}
    return {
        CONFIG_FILE: json_content(lerobot_config(config, image_shapes, dict(policy_fields)), CONFIG_FILE),
        WEIGHTS_FILE: tensors_content(weights, dict(format="pt")),
        PREPROCESSOR_FILE: json_content(preprocessor, PREPROCESSOR_FILE),
        NORMALIZER_FILE: tensors_content(flat_stats),
        POSTPROCESSOR_FILE: json_content(postprocessor, POSTPROCESSOR_FILE),
        UNNORMALIZER_FILE: tensors_content(action_stats),
        TRAIN_CONFIG_FILE: json_content(train_config, TRAIN_CONFIG_FILE),
    }


def lerobot_config(config: ACTConfig, image_shapes: Mapping[str, tuple[int, int]], policy_fields: dict) -> dict:
    """The content of config.json: exactly the fields of 0.3.2's ACTConfig, which refuses any that it does not know.

    Later versions fill in the fields that they have added.
    """
    network_fields = {name: getattr(config, name) for name in NETWORK_FIELDS}
    return dict(
        type="act",
        n_obs_steps=1,
        normalization_mapping=NORMALIZATION_MODES,
        input_features=input_features(config, image_shapes),
        output_features=output_features(config),
        # Here and in the preprocessor: the two must agree, and every machine has a CPU.
        device="cpu",
        use_amp=False,
        push_to_hub=False,
        repo_id=None,
        private=None,
        tags=None,
        license=None,
        **network_fields,
        # With a name here, LeRobot downloads ImageNet weights even to load a checkpoint, and fails offline.
        pretrained_backbone_weights=None,
        **policy_fields,
    )


def input_features(config: ACTConfig, image_shapes: Mapping[str, tuple[int, int]]) -> dict[str, dict]:
    """The policy's inputs as LeRobot describes them: {feature: {"type", "shape"}}.

    Their order matters: LeRobot feeds the cameras to the network in the order in which they stand here.
    """
    features = {STATE: dict(type="STATE", shape=[config.state_dim])}
    for camera in config.cameras:
        features[image_key(camera)] = dict(type="VISUAL", shape=[3, *image_shapes[camera]])
    return features


def output_features(config: ACTConfig) -> dict[str, dict]:
    """The policy's output, the action, as LeRobot describes it: {feature: {"type", "shape"}}."""
    return {ACTION: dict(type="ACTION", shape=[config.action_dim])}


def processors(config: ACTConfig, image_shapes: Mapping[str, tuple[int, int]]) -> tuple[dict, dict]:
    """The contents of policy_preprocessor.json and policy_postprocessor.json.

    They list the steps in which 0.4+ normalises what goes into the network and un-normalises what comes out.
    """

    def step(name: str, config: dict, state_file: str | None = None) -> dict:
        return dict(registry_name=name, config=config, **(dict(state_file=state_file) if state_file else {}))

    actions = output_features(config)
    everything = input_features(config, image_shapes) | actions
    pre = [
        step("rename_observations_processor", dict(rename_map={})),
        step("to_batch_processor", {}),
        step("device_processor", dict(device="cpu", float_dtype=None)),
        step("normalizer_processor", dict(eps=EPS, features=everything, norm_map=NORMALIZATION_MODES), NORMALIZER_FILE),
    ]
    post = [
        step(
            "unnormalizer_processor", dict(eps=EPS, features=actions, norm_map=NORMALIZATION_MODES), UNNORMALIZER_FILE
        ),
        step("device_processor", dict(device="cpu", float_dtype=None)),
    ]
    return dict(name="policy_preprocessor", steps=pre), dict(name="policy_postprocessor", steps=post)


def buffer_names(config: ACTConfig) -> tuple[dict[str, str], dict[str, str]]:
    """What 0.3.2 calls the statistics that it keeps among the weights, by feature; ".mean" and ".std" follow.

    First the buffers that normalise, of every feature; then the one that un-normalises, of the action.
    """
    flat = {key: f"buffer_{key.replace('.', '_')}" for key in stats_shapes(config)}
    normalize = {
        key: f"{'normalize_targets' if key == ACTION else 'normalize_inputs'}.{buffer}" for key, buffer in flat.items()
    }
    return normalize, {ACTION: f"unnormalize_outputs.{flat[ACTION]}"}
