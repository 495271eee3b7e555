"""What makes a run the run that it is: what it is compared by when it resumes, and what a robot has to know of it.

`settings` is always the whole configuration as nested dicts, {section: {key: value}}, as train_config.json holds it.
This room knows which settings shape the samples and the learning; it knows no default, no file and no loop.
Names in the dicts below are stored in checkpoints: they stay.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from act_model import ACTConfig
from lerobot_checkpoint import CheckpointError
from rosbag_dataset import (
    NEXT_STATE,
    RESIZE_INTERPOLATION,
    BagSettings,
    Episode,
    angle_references,
    cut_settings,
    divide,
    open_pixels,
    refer_angles,
    split_episodes,
)

from .errors import TrainingError
from .ranks import World

VERSION = "0.1.0"
SOURCE = ("train.py", "act_model.py", "training", "rosbag_dataset", "lerobot_checkpoint")  # what trains
# Of these folders: commands for people, through which nothing trains.
BESIDE = {
    "__main__.py", "exporting.py", "findings.py", "grid.py", "html_report.py", "inspection.py", "lerobot_v3.py",
    "listing.py", "looking.py", "pruning.py",
}  # fmt: skip
Settings = Mapping[str, Mapping[str, Any]]

# Raise it when the same settings and bags give other samples, or give them in another order: a run that began before
# must not go on as if nothing had happened. 1: af889aa and older, which trained on frames in gaps of the joints too.
# Up to 2 epochs were permuted by torch.randperm, and such runs go on so (feed.ORDERS); 3: by a Feistel network.
RANDPERM_ORDER = 2
SAMPLE_ORDER = 3

MAX_STARTS = 100  # starts of episodes that a checkpoint names: 6 kB of its contract

# What a fingerprint means that was made before it had these keys: one bag is one episode.
BEFORE_CUTTING = {"data.episodes": "bag", "data.trim_still_s": None, "training.hold_out": "bag"}

# What rounding_conditions mean that were recorded before they had these keys.
BEFORE_PARTS = {"CUDA graph": False, "training.ddp_compression": "none", "training.accumulate_steps": 1}


def source_version(root: Path = Path(__file__).parent.parent) -> dict[str, str]:
    """The trainer's version and a hash of its files and their names: an injected copy has no git history to ask.

    The same at home and on a cluster, which does not get what BESIDE names.
    """
    digest = hashlib.sha256()
    for name in SOURCE:
        path = root / name
        files = sorted(path.glob("*.py")) if path.is_dir() else [path]
        for file in [file for file in files if file.name not in BESIDE]:
            digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return {"version": VERSION, "source_sha256": digest.hexdigest()}


# -- resuming -----------------------------------------------------------------------------------------------------


def split(
    episodes: Sequence[Episode], training: Any, was: Mapping[str, Any] | None
) -> tuple[list[Episode], list[Episode]]:
    """-> (training, held-out episodes): as in the run with the fingerprint `was` that goes on, else chosen anew.

    `training` is that section of the configuration.
    """
    if was is None:
        return split_episodes(episodes, training.val_fraction, training.seed, training.hold_out)
    return divide(episodes, was["held-out episodes"])


def angle_reference(
    train: Sequence[Episode],
    held_out: Sequence[Episode],
    bags: BagSettings,
    was: Mapping[str, Any] | None,
    kept: list[float] | None,
) -> list[float]:
    """S angles in rad around which joints are wrapped, 0 for states that are not; all episodes are then referred to it.

    As in the run with the fingerprint `was` that goes on (older ones, which have none, wrapped around 0), else those
    that are `kept` with the statistics of a policy that it begins with, else from the training episodes.
    """
    if was is not None:
        reference_rad = was.get("angle_reference_rad", [0.0] * len(bags.state_names))
    elif kept is not None:
        reference_rad = kept
    else:
        wrapped = bags.revolute & bags.wrap_angles
        angles = zip(angle_references(train), wrapped, strict=True)
        reference_rad = [float(angle) if wrap else 0.0 for angle, wrap in angles]
    reference = np.array(reference_rad)  # one for all episodes, as they are sent to a loader's worker
    for episode in (*train, *held_out):
        refer_angles(episode, reference, bags)
    return reference_rad


def sample_order(was: Mapping[str, Any] | None) -> int:
    """The version of the order in which samples come: of a run with the fingerprint `was` that goes on, its own."""
    if was is None:
        return SAMPLE_ORDER
    return RANDPERM_ORDER if was.get("sample order", 1) <= RANDPERM_ORDER else SAMPLE_ORDER


def fingerprint(
    was: Mapping[str, Any] | None,
    settings: Settings,
    act: ACTConfig,
    cameras: Mapping[str, str],
    angle_reference_rad: Sequence[float],
    train: Sequence[Episode],
    held_out: Sequence[Episode],
) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same run: the network, and the samples in their order.

    `was` is the fingerprint of the run that goes on, or None: its samples keep their order.
    Which episodes there are, and where each begins and ends, is in their names and hashes; the settings that cut
    recordings are there to name the cause.
    """
    keys = ("fps", "max_offset_ms", "joint_resample", "time_source", "image_stats", "joint_names", "joint_topic")
    return {
        **{f"model.{name}": value for name, value in dataclasses.asdict(act).items()},
        **{f"data.{name}": settings["data"][name] for name in keys},
        # None where nothing is asked for, as in checkpoints from before these keys, which do not have them.
        "data.state_topics": list((settings["data"]["state_topics"] or {}).items()) or None,  # in their order
        "data.observed_only": settings["data"]["observed_only"] or None,
        **_commands(settings["data"]),
        **{f"data.{name}": value for name, value in cut_settings(settings["data"]).items()},
        **{f"conventions.{name}": value for name, value in settings["conventions"].items()},
        "cameras": dict(cameras),
        "training.val_fraction": settings["training"]["val_fraction"],
        "training.hold_out": settings["training"]["hold_out"],
        "sample order": sample_order(was),
        "angle_reference_rad": list(angle_reference_rad),
        "training.seed": settings["training"]["seed"],
        "training episodes": {e.name: e.content_hash for e in train},
        "held-out episodes": {e.name: e.content_hash for e in held_out},
    }


def _commands(data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of commands, None where none is asked for."""
    used = data["action_source"] != NEXT_STATE or data["command_topics"]
    return {
        "data.action_source": data["action_source"] if data["action_source"] != NEXT_STATE else None,
        "data.command_topics": data["command_topics"] or None,
        "data.command_max_age_ms": data["command_max_age_ms"] if used else None,
    }


def learning_settings(settings: Settings) -> dict[str, Any]:
    """What a resumed run may change, and says: how it learns from here on."""
    training = settings["training"]
    keys = ["lr", "lr_backbone", "weight_decay", "kl_weight", "grad_clip_norm", "scheduler", "ema_decay"]
    if training["scheduler"] != "none":
        keys += ["warmup_steps", "min_lr", "steps"]
    augmentation = settings["augmentation"] if settings["augmentation"]["enabled"] else {"enabled": False}
    return {f"training.{name}": training[name] for name in keys} | {"augmentation": augmentation}


def rounding_conditions(settings: Settings, world: World, precision: torch.dtype) -> dict[str, Any]:
    """What decides how results are rounded, and so whether a resumed run equals an unbroken one to the last bit."""
    return {
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else world.device.type,
        "instruction set": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "precision": str(precision).removeprefix("torch."),
        "compiled": settings["training"]["compile"] == "true",
        "CUDA graph": settings["training"]["compile"] == "graph",
        "training.ddp_compression": settings["training"]["ddp_compression"] if world.size > 1 else "none",
        "memory format": "channels last",
        "ranks": world.size,
        "training.batch_size": settings["training"]["batch_size"],
        "training.accumulate_steps": settings["training"]["accumulate_steps"],
    }


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One text per key whose value is not the same in both."""
    was, now = json.loads(json.dumps(was)), json.loads(json.dumps(now))  # tuples are lists after a file
    texts = []
    for name in now:
        old, new = was.get(name), now[name]
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
            texts.append(f"{name} ({', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''})")
        else:
            texts.append(f"{name} (was {old}, is {new})")
    return texts


def check_unchanged(was: dict[str, Any], now: dict[str, Any], episodes: Sequence[Episode], checkpoint: Path) -> None:
    """A run may only resume from a checkpoint with its own fingerprint.

    One from before fingerprints had a sample order may go on where today's samples are the same: where no frame lies in
    a gap of the joints.

    Raises:
        CheckpointError: what differs, by name.
    """
    if "sample order" not in was:
        dropped = {e.name: e.sync_report["dropped_in_joint_gaps"] for e in episodes}
        if named := [name for name, frames in dropped.items() if frames]:
            raise CheckpointError(
                f"{checkpoint}: cannot resume, an older version made it, which also trained on the "
                f"{sum(dropped.values())} frames in gaps of the joints of {', '.join(named[:5])}; start a new run in "
                "another training.output_dir, or finish this one with the older version"
            )
        since = ("sample order", "angle_reference_rad", "training.val_fraction")
        was = was | {name: now[name] for name in since}
    if changed := differences(BEFORE_CUTTING | was, now):
        new_run = "a new run in another training.output_dir"
        if any(text.startswith(("training episodes", "held-out episodes")) for text in changed):
            new_run += f", on these recordings with these weights: training.init_from={checkpoint}"
        raise CheckpointError(
            f"{checkpoint}: cannot resume, the run has changed: {'; '.join(changed)}; set it back, or start {new_run}"
        )


def check_same_on_all_ranks(mine: dict[str, Any], world: World) -> None:
    """Check that all nodes, which read bags of their own, have the same. Raises TrainingError, naming what differs."""
    for rank, theirs in enumerate(world.gather(mine)):
        if different := "; ".join(differences(theirs, mine)):
            raise TrainingError(
                f"ranks {rank} and {world.rank} have different data: {different}; give every node the same bags"
            )


# -- the robot ----------------------------------------------------------------------------------------------------


def robot_contract(
    settings: Settings,
    bags: BagSettings,
    angle_reference_rad: Sequence[float],
    train: Sequence[Episode],
    held_out: Sequence[Episode],
) -> dict[str, Any]:
    """train_config.json: what a robot must know to feed this policy and to act on its output, and all settings.

    `bags` are those settings that decoded the bags, `angle_reference_rad` is around what each of the S states is
    wrapped, if it is an angle. Lists are in the order of the states.
    """
    data, conventions = settings["data"], settings["conventions"]
    lags = [e.sync_report["commands"].get("joints_lag_s") for e in train]
    signs = conventions["joint_sign"] if conventions["apply_joint_sign"] else [1.0] * len(bags.joint_names)
    return {
        "action_mode": conventions["action_mode"],
        "joint_names": data["joint_names"],
        "state_names": list(bags.state_names),
        "action_names": [bags.state_names[i] for i in bags.acted],
        "state_topics": {name: field.text for name, field in bags.state_topics.items()},
        "units": list(bags.units),
        # What actions are of: of commands, a chunk's deltas add up from the state in which it was predicted.
        "action_source": bags.action_source,
        "command_topics": {name: field.text for name, field in bags.command_topics.items()},
        "joints_lag_commands_s": statistics.median(known) if (known := [s for s in lags if s is not None]) else None,
        "revolute": bags.revolute.tolist(),
        "joint_sign": [*signs, *[1.0] * len(bags.state_topics)],
        "wrap_angles": conventions["wrap_angles"],
        "angle_reference_rad": list(angle_reference_rad),
        "fps": data["fps"],
        "rest_at_start_s": statistics.median(e.sync_report["rest_at_start_s"] for e in train),
        "image_age_s": {
            camera: {
                "median": statistics.median(e.sync_report["image_age_s"][camera]["median"] for e in train),
                "most": max(e.sync_report["image_age_s"][camera]["most"] for e in train),
            }
            for camera in train[0].image_shape
        },
        "image_resize": conventions["image_resize"],
        "image_resize_interpolation": RESIZE_INTERPOLATION,
        "cameras": dict(bags.camera_topics),
        "image_shapes": {camera: list(shape) for camera, shape in train[0].image_shape.items()},
        "joint_topic": data["joint_topic"],
        "joint_resample": data["joint_resample"],
        "time_source": data["time_source"],
        "pretrained_backbone": settings["model"]["pretrained_backbone"],
        "training_episodes": [e.name for e in train],
        "held_out_episodes": [e.name for e in held_out],
        **starts(train),
        "code": source_version(),
        "config": settings,
    }


def starts(train: Sequence[Episode]) -> dict[str, Any]:
    """How training episodes begin, by which a robot's start is judged: states as the policy sees them, pictures.

    Of many episodes MAX_STARTS, evenly chosen. `start_brightness` is the mean grey level, 0 to 255, of the darkest and
    of the brightest first picture; `recorded_shapes` are the sizes that the cameras' pictures had, (H, W).
    """
    some = train[:: -(-len(train) // MAX_STARTS)]
    levels = {c: [float(open_pixels(e, c)[e.image_index[c][0]].mean()) for e in some] for c in train[0].image_shape}
    return {
        "start_states": [[round(float(value), 4) for value in e.states(0).astype(np.float32)] for e in some],
        "start_brightness": {camera: [round(min(of), 1), round(max(of), 1)] for camera, of in levels.items()},
        "recorded_shapes": {c: sorted({tuple(e.source_shape[c]) for e in train}) for c in train[0].source_shape},
    }


def facts(contract: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """What a tracker says of a run beside its settings: by which code, on which recordings."""
    recordings = [fingerprint["training episodes"], fingerprint["held-out episodes"]]
    return {
        "code.version": contract["code"]["version"],
        "code.source_sha256": contract["code"]["source_sha256"],
        "bags.sha256": hashlib.sha256(json.dumps(recordings, sort_keys=True).encode()).hexdigest(),
    }


def policy_fields(settings: Settings) -> dict[str, Any]:
    """What LeRobot's config.json says of a policy beside its network's shape: lerobot_writing.POLICY_FIELDS."""
    model, training = settings["model"], settings["training"]
    return {
        "n_action_steps": model["n_action_steps"],
        "temporal_ensemble_coeff": model["temporal_ensemble_coeff"],
        "kl_weight": training["kl_weight"],
        "optimizer_lr": training["lr"],
        "optimizer_weight_decay": training["weight_decay"],
        "optimizer_lr_backbone": training["lr_backbone"],
    }
