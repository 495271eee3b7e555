"""LeRobot's files in our terms: config.json as our ACTConfig, and the statistics wherever that version keeps them.

Everything that this code cannot do exactly as LeRobot would is refused: a policy that runs almost right is worse
than one that does not run. lerobot_writing.py is the counterpart and defines the names.
Must not know: the network itself, checkpoints, manifests. It reads single files of one pretrained_model/.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from act_model import ACTION, IMAGE_PREFIX, STATE, ACTConfig

from .errors import CheckpointError
from .files import read_json, read_tensors
from .layout import POSTPROCESSOR_FILE, PREPROCESSOR_FILE, WEIGHTS_FILE
from .lerobot_writing import NETWORK_FIELDS, POLICY_FIELDS, buffer_names
from .normalisation import EPS, NORMALIZATION_MODES, Stats, checked_stats, stats_shapes


def parse_config(path: Path) -> tuple[ACTConfig, dict[str, tuple[int, int]], dict[str, Any]]:
    """Read a LeRobot config.json; fields that do not concern us are passed over.

    Returns:
        The network's shape; (H, W) in pixels by camera, in the network's order; a value for each of POLICY_FIELDS.

    Raises:
        CheckpointError: unreadable, not of an ACT policy, or of one that this code cannot run.
    """
    config = read_json(path)

    def require(what: str, found: Any, expected: Any) -> None:
        if found != expected:
            raise CheckpointError(f"{path}: {what} is {found!r}; expected {expected!r}; this policy cannot be run here")

    try:
        require("type", config["type"], "act")
        require("n_obs_steps", config["n_obs_steps"], 1)
        modes = {kind: config["normalization_mapping"].get(kind) for kind in NORMALIZATION_MODES}
        require("normalization_mapping", modes, NORMALIZATION_MODES)
        inputs, outputs = dict(config["input_features"]), config["output_features"]
        require("output_features", list(outputs), [ACTION])
        state = inputs.pop(STATE)
        image_shapes = {}
        for key, feature in inputs.items():
            require(f"type of input {key}", feature["type"], "VISUAL")
            require(f"prefix of input {key}", key[: len(IMAGE_PREFIX)], IMAGE_PREFIX)
            channels, height, width = feature["shape"]
            require(f"number of channels of {key}", channels, 3)
            image_shapes[key.removeprefix(IMAGE_PREFIX)] = (height, width)
        network_fields = {name: config[name] for name in NETWORK_FIELDS}
        # LeRobot declares this one an int.
        network_fields["replace_final_stride_with_dilation"] = bool(config["replace_final_stride_with_dilation"])
        act_config = ACTConfig(
            state_dim=state["shape"][0],
            action_dim=outputs[ACTION]["shape"][0],
            cameras=tuple(image_shapes),
            **network_fields,
        )
        return act_config, image_shapes, {name: config[name] for name in POLICY_FIELDS}
    except KeyError as error:
        raise CheckpointError(f"{path}: no {error}; expected LeRobot's config of an ACT policy") from error
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: {error}; this policy cannot be run here") from error


def find_stats(directory: Path, config: ACTConfig, buffers: Mapping[str, Tensor]) -> Stats:
    """The statistics of a pretrained_model/: 0.3.2's buffers, 0.4+'s processors, or both if they agree exactly.

    Args:
        directory: the pretrained_model/.
        config: its network, which says what features there are.
        buffers: all tensors of its weights file that are not the model's.

    Raises:
        CheckpointError: a feature has no statistics, two sources contradict each other, or a processor does something
            that this code cannot do.
    """
    sources = stats_of_buffers(directory / WEIGHTS_FILE, config, buffers) + stats_of_processors(directory, config)
    if not sources:
        raise CheckpointError(
            f"{directory}: no normalisation, neither buffers in {WEIGHTS_FILE} nor {PREPROCESSOR_FILE}; its actions "
            "would be wrong without any error; use a complete checkpoint"
        )
    (first, stats), *others = sources
    for source, other in others:
        for key, pair in other.items():
            if not all(np.array_equal(pair[name], stats[key][name]) for name in pair):
                raise CheckpointError(
                    f"{source}: statistics of {key} contradict those in {first}; one of the two is of another run; "
                    "use a checkpoint whose files belong together"
                )
    return stats


# Each of the next two gives what one format holds, as a list of (source, statistics): first those of every feature,
# which normalise, then those of the action alone, which un-normalise. A format that is there at all must have both;
# [] means that it is not there.


def stats_of_buffers(path: Path, config: ACTConfig, buffers: Mapping[str, Tensor]) -> list[tuple[str, Stats]]:
    """From 0.3.2's buffers, which lie among the weights in the file `path`; arguments and errors as in find_stats."""
    if not buffers:
        return []
    known = {f"{b}.{name}" for names in buffer_names(config) for b in names.values() for name in ("mean", "std")}
    if unknown := sorted(set(buffers) - known):
        raise CheckpointError(f"{path}: unexpected {', '.join(unknown[:4])}; expected an ACT policy's tensors only")
    sources = []
    for names in buffer_names(config):
        found = {
            key: {n: buffers[f"{buffer}.{n}"].numpy() for n in ("mean", "std") if f"{buffer}.{n}" in buffers}
            for key, buffer in names.items()
        }
        shapes = {key: shape for key, shape in stats_shapes(config).items() if key in names}
        source = f"{path} (buffers)"
        sources.append((source, checked_stats(found, shapes, source)))
    return sources


def stats_of_processors(directory: Path, config: ACTConfig) -> list[tuple[str, Stats]]:
    """From 0.4+'s processor files in `directory`. A step that changes data in a way unknown here is refused."""
    if not (directory / PREPROCESSOR_FILE).exists() and not (directory / POSTPROCESSOR_FILE).exists():
        return []
    shapes = stats_shapes(config)
    sources = []
    for file, wanted, needed in (
        (PREPROCESSOR_FILE, "normalizer_processor", shapes),
        (POSTPROCESSOR_FILE, "unnormalizer_processor", {ACTION: shapes[ACTION]}),
    ):
        path = directory / file
        found: dict[str, dict[str, Any]] = {}
        try:
            for step in read_json(path)["steps"]:
                name, settings = step.get("registry_name"), step.get("config", {})
                if name == wanted:
                    found = stats_of_step(path, step)
                elif name not in ("to_batch_processor", "device_processor") and (
                    name != "rename_observations_processor" or settings.get("rename_map")
                ):
                    raise CheckpointError(f"{path}: step {name} {settings} is unknown here; load it with LeRobot")
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a processor of LeRobot 0.4+ ({error!r})") from error
        sources.append((str(path), checked_stats(found, needed, str(path))))
    return sources


def stats_of_step(path: Path, step: dict) -> dict[str, dict[str, Any]]:
    """The statistics of one (un-)normalising step of the processor file `path`, unchecked: {feature: {"mean", ...}}.

    Raises:
        CheckpointError: it normalises in another way than ours, or its tensors cannot be read.
        KeyError, TypeError, AttributeError: it is not a step as 0.4+ writes it.
    """
    settings = step["config"]
    used = dict(eps=settings["eps"], **{kind: settings["norm_map"].get(kind) for kind in NORMALIZATION_MODES})
    if used != dict(eps=EPS, **NORMALIZATION_MODES) or settings.get("normalize_observation_keys"):
        raise CheckpointError(
            f"{path}: normalises with {used}, of {settings.get('normalize_observation_keys') or 'everything'}; "
            f"expected MEAN_STD and eps {EPS} of everything; load it with LeRobot"
        )
    stats: dict[str, dict[str, Any]] = {}
    if "state_file" in step:
        for key, tensor in read_tensors(path.with_name(Path(step["state_file"]).name)).items():
            feature, _, name = key.rpartition(".")
            if feature in settings["features"]:  # others are of columns that ACT never sees
                stats.setdefault(feature, {})[name] = tensor.numpy()
    return stats
