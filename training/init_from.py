"""training.init_from: a new run that begins with another policy's weights, on other or more bags.

The policy is one that lerobot_checkpoint loads, ours or LeRobot's. It is compared with the run before a bag is decoded:
what does not fit is refused by name, or (training.init_partial) left out and listed. Optimizer and step are new. `cfg`
is train.py's Config, which is not imported: imports run from train.py to here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from act_model import ACT, ACTION, IMAGE_PREFIX, STATE, ACTConfig
from lerobot_checkpoint import (
    WEIGHTS_FILE,
    CheckpointError,
    LoadedPolicy,
    Stats,
    file_sha256,
    load_policy,
    load_training_state,
    stats_shapes,
)
from rosbag_dataset import NEXT_STATE, BagSettings, Episode, wrap_to_pi

from .errors import ConfigError
from .identity import differences
from .initial_weights import backbone_weights, load_backbone

# Weights that mean something only with these states, or these actions, in this order.
OF_STATES = ("encoder_robot_state_input_proj.", "vae_encoder_robot_state_input_proj.")
OF_ACTIONS = ("vae_encoder_action_input_proj.", "action_head.")
POSITIONS = "vae_encoder_pos_enc"  # sines that follow from the chunk's length: no weights
STARTED_FROM = "started_from"  # in the contract and the training state of a run that began with training.init_from


@dataclass
class Origin:
    """What a run begins with; found on rank 0 by find_origin(), and shared with the others.

    Attributes:
        notes: what there is to say of it.
        backbone: torchvision's state dict for the image backbone, or None.
        weights: another policy's, those that are taken, by their names in ACT.
        stats: its statistics, those that are kept; of other features the new data's count.
        angle_reference_rad: (S,) around what angles of kept statistics are wrapped; None: as the new data say.
        their_reference_rad: (S,) around what the policy's angles were wrapped; None where its states are others.
        image_shapes: camera -> (H, W) of the policy's images.
        trained_on: the policy's training episodes, name -> hash of what was recorded, None where it is not known.
        recorded: {STARTED_FROM: ...} for the checkpoints; {} where a run did not begin with a policy.
    """

    notes: list[str] = field(default_factory=list)
    backbone: dict[str, torch.Tensor] | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    stats: Stats = field(default_factory=dict)
    angle_reference_rad: list[float] | None = None
    their_reference_rad: list[float] | None = None
    image_shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    trained_on: dict[str, str | None] = field(default_factory=dict)
    recorded: dict[str, Any] = field(default_factory=dict)

    def load_into(self, model: ACT, pretrained_backbone: bool | str) -> None:
        """Put the weights into a model, once. Raises ConfigError when a backbone's do not fit, naming their source."""
        if self.backbone is not None:
            load_backbone(model, self.backbone, pretrained_backbone)
        if self.weights:
            model.load_state_dict({**model.state_dict(), **self.weights})
        self.backbone, self.weights = None, {}  # they are not needed any more

    def on_data(
        self, measured: Stats, floored: Sequence[str], train: Sequence[Episode], held_out: Sequence[Episode],
        bags: BagSettings,
    ) -> tuple[Stats, list[str]]:  # fmt: skip
        """-> (the statistics that normalise, what there is to say now that the data are known).

        `measured` and `floored` are what compute_stats() gives for the training episodes `train`, whose angles are
        around the run's own reference; `bags` are the settings that they were read with.
        """
        # "action[3]: ..." of a feature whose statistics are kept is not about what normalises.
        notes = [*self.notes, *(line for line in floored if line.partition("[")[0] not in self.stats)]
        seen = [e.name for e in held_out if self.trained_on.get(e.name, "") in (None, e.content_hash)]
        if seen:
            listed = ", ".join(seen[:5]) + (", ..." if len(seen) > 5 else "")
            notes.append(f"training.init_from: that policy was trained on what is held out here ({listed}): its error "
                         "there is not that on new recordings")  # fmt: skip
        shapes = train[0].image_shape
        notes += [
            f"training.init_from: images of {camera} are {shapes[camera]}, that policy's were {shape} (height, width)"
            for camera, shape in self.image_shapes.items()
            if shapes.get(camera, shape) != shape
        ]
        if self.their_reference_rad is not None and bags.wrap_angles:
            around, turned = np.array(self.their_reference_rad), np.zeros(len(bags.state_names))
            for ours in (episode.state for episode in train):
                turned += (np.abs(wrap_to_pi(ours, around) - ours) > np.pi).sum(axis=0)
            turned /= sum(len(episode.time_ns) for episode in train)
            notes += [
                f"training.init_from: {bags.state_names[j]} is a whole turn from where that policy saw it in "
                f"{turned[j]:.1%} of the frames: angles are wrapped around the middle of the new data "
                "(training.init_stats=keep keeps the turns, too)"
                for j in np.flatnonzero(bags.revolute & (turned > 0))
            ]
        return {key: self.stats.get(key, pair) for key, pair in measured.items()}, notes


def find_origin(
    cfg: Any, act: ACTConfig, bags: BagSettings, resume_from: Path | None, state: Mapping[str, Any] | None
) -> Origin:
    """What the run begins with: random weights, an image backbone's, another policy's, or its own of before.

    Args:
        cfg: the configuration.
        act: its network.
        bags: its settings of the data.
        resume_from: the checkpoint that the run goes on from, whose weights are not read here, or None.
        state: that checkpoint's training state.

    Raises:
        ConfigError: weights that are not there or do not fit; says how to go on.
        CheckpointError: the checkpoint to go on from cannot be read.
    """
    path, keep, partial = cfg.training.init_from, cfg.training.init_stats == "keep", cfg.training.init_partial
    pretrained = cfg.model.vision_backbone, cfg.model.pretrained_backbone
    if resume_from is not None:
        return _of_resumed(resume_from, state or {}, path)
    if path is None:
        return Origin(backbone=backbone_weights(*pretrained))
    try:
        policy = load_policy(path)
    except CheckpointError as error:
        raise ConfigError(f"training.init_from: {error}") from None
    contract = policy.train_config or {}
    if "action_mode" not in contract:  # LeRobot's trainer writes a file of that name, too
        contract = {}
    changed = compare(policy, contract, act, bags)
    if changed.refused and not partial:
        raise ConfigError(
            f"training.init_from: {policy.path} does not fit: {'; '.join(changed.refused)}; set these as they were, "
            "or training.init_partial=true, which loads what fits"
        )
    weights, left_out = _fitting(policy.model.state_dict(), changed.without, act)
    if not weights:
        raise ConfigError(f"training.init_from: {policy.path}: nothing of it fits: {'; '.join(changed.refused)}")
    others = {key for key, differs in ((STATE, changed.states), (ACTION, changed.actions)) if differs}
    kept = [key for key in stats_shapes(act) if keep and key in policy.stats and key not in others]
    reference = contract.get("angle_reference_rad", [0.0] * act.state_dim) if contract and not changed.states else None
    return Origin(
        notes=_notes(policy.path, changed, left_out, kept, [key for key in stats_shapes(act) if key not in kept]),
        # An image backbone that does not fit is begun as in any run.
        backbone=None if any(name.startswith("backbone.") for name in weights) else backbone_weights(*pretrained),
        weights=weights,
        stats={key: policy.stats[key] for key in kept},
        angle_reference_rad=reference if STATE in kept else None,
        their_reference_rad=reference,
        image_shapes=policy.image_shapes,
        trained_on=_trained_on(policy.path, contract),
        recorded={STARTED_FROM: {
            "path": str(policy.path),
            "weights_sha256": file_sha256(policy.path / WEIGHTS_FILE),
            "code": contract.get("code", {}),  # {}: LeRobot's
            "statistics_kept": kept,
            "not_loaded": left_out,
            "differences": [*changed.refused, *changed.said],
        }},
    )  # fmt: skip


def _of_resumed(checkpoint: Path, state: Mapping[str, Any], init_from: str | None) -> Origin:
    """A run that goes on has all from its checkpoint: the policy that it began with need not be there any more."""
    notes = [f"training.init_from is not loaded again: the run goes on from {checkpoint}"] if init_from else []
    if STARTED_FROM not in state:
        return Origin(notes)
    kept = state[STARTED_FROM]["statistics_kept"]
    stats = load_policy(checkpoint).stats if kept else {}
    return Origin(notes, stats={key: stats[key] for key in kept}, recorded={STARTED_FROM: state[STARTED_FROM]})


def _trained_on(pretrained: Path, contract: Mapping[str, Any]) -> dict[str, str | None]:
    names: dict[str, str | None] = dict.fromkeys(contract.get("training_episodes", ()))
    if names:
        with contextlib.suppress(CheckpointError, KeyError):  # only the policy was copied: names have to do
            names |= load_training_state(pretrained.parent)["fingerprint"]["training episodes"]
    return names


# -- comparing ----------------------------------------------------------------------------------------------------


@dataclass
class Changed:
    """In what a run differs from the policy that it is to begin with.

    Attributes:
        states, actions: whether these mean something else.
        without: how the names of weights begin that mean nothing to the run, even if they have the right shape.
        refused: what makes another policy of the same weights, one text each.
        said: what does not, and one should know of.
    """

    states: bool
    actions: bool
    without: tuple[str, ...]
    refused: list[str]
    said: list[str]


def compare(policy: LoadedPolicy, contract: Mapping[str, Any], act: ACTConfig, bags: BagSettings) -> Changed:
    """Compare a policy, and the contract in its checkpoint ({} of LeRobot's), with a run's network and settings."""
    was, now = asdict(policy.act_config), asdict(act)
    names, acted = list(bags.state_names), [bags.state_names[i] for i in bags.acted]
    said: list[str] = []
    if contract:
        were = contract.get("state_names", contract["joint_names"])
        were_acted = contract.get("action_names", were)
        signs = [*(bags.joint_sign if bags.apply_joint_sign else [1.0] * len(bags.joint_names)),
                 *[1.0] * len(bags.state_topics)]  # fmt: skip
        meant = {"joint signs": signs, "conventions.wrap_angles": bags.wrap_angles}
        meant_was = {"joint signs": contract["joint_sign"], "conventions.wrap_angles": contract["wrap_angles"]}
        states = by_name("states", were, names) or differences(meant_was, meant)
        modes = [{"conventions.action_mode": mode} for mode in (contract["action_mode"], bags.action_mode)]
        actions = [*([] if states else by_name("actions", were_acted, acted)), *differences(*modes)]
        other_actions = bool(actions) or were_acted != acted
        source = {"data.fps": contract["fps"], "data.action_source": contract.get("action_source", NEXT_STATE)}
        said += differences(source, {"data.fps": bags.fps, "data.action_source": bags.action_source})
    else:
        states, actions = (
            differences({f"model.{kind}_dim": was[f"{kind}_dim"]}, {f"model.{kind}_dim": now[f"{kind}_dim"]})
            for kind in ("state", "action")
        )
        other_actions = bool(actions)
        said.append(f"it does not say what its states and actions are: taken for {', '.join(names)}, and for actions "
                    f"that are {bags.action_mode}")  # fmt: skip
    # Cameras differ by what they show alone, not by their order. Dropout is a matter of training.
    cameras = by_name("cameras", sorted(was["cameras"]), sorted(now["cameras"]))
    shape = [name for name in was if name not in ("state_dim", "action_dim", "cameras", "dropout")]
    network = differences({f"model.{n}": was[n] for n in shape}, {f"model.{n}": now[n] for n in shape})
    without = (OF_STATES if states else ()) + (OF_ACTIONS if other_actions else ())
    if was["vision_backbone"] != now["vision_backbone"]:
        without += ("backbone.",)  # as a whole: some of its weights have the same shape
    return Changed(bool(states), other_actions, without, [*states, *actions, *cameras, *network], said)


def by_name(what: str, was: Sequence[str], now: Sequence[str]) -> list[str]:
    """How two lists of names differ, in at most two texts."""
    gone, new = [n for n in was if n not in now], [n for n in now if n not in was]
    texts = [f"{what}: {', '.join(names)} {where}" for names, where in
             ((gone, "only in that policy"), (new, "only in this run")) if names]  # fmt: skip
    if not texts and list(was) != list(now):
        texts.append(f"{what}: {', '.join(was)} in that policy, {', '.join(now)} in this run")
    return texts


def _fitting(
    theirs: Mapping[str, torch.Tensor], without: tuple[str, ...], act: ACTConfig
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """-> (the policy's weights that the run's network takes, names of all others in it, which stay as initialised)."""
    with torch.device("meta"):  # shapes only
        ours = ACT(act).state_dict()
    fits = {name: theirs[name] for name in ours if name in theirs and theirs[name].shape == ours[name].shape}
    taken = {name: tensor for name, tensor in fits.items() if not name.startswith(without)}
    return taken, [name for name in ours if name not in taken and name != POSITIONS]


def _notes(path: Path, changed: Changed, left_out: Sequence[str], kept: Sequence[str], new: Sequence[str]) -> list[str]:
    layers = ", ".join(dict.fromkeys(_layer(name) for name in left_out))
    notes = [f"weights from {path}" + (f", without {layers}, which begin as in any run" if layers else "")]
    whose = ((kept, "that policy's"), (new, "the new data's"))
    statistics = [f"of {', '.join(map(_short, keys))} {owner}" for keys, owner in whose if keys]
    notes.append(f"statistics {', '.join(statistics)} (training.init_stats)")
    if differs := [*changed.refused, *changed.said]:
        notes.append(f"that policy differs: {'; '.join(differs)}")
    return [f"training.init_from: {note}" for note in notes]


def _layer(name: str) -> str:
    """What a weight belongs to: encoder.layers.2.linear1.bias to encoder.layers.2, action_head.bias to action_head."""
    block = re.match(r"backbone|.*layers\.\d+", name)
    return block[0] if block else name.rpartition(".")[0]


def _short(key: str) -> str:
    return key.removeprefix(IMAGE_PREFIX).removeprefix("observation.")
