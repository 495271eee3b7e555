"""The episodes of a LeRobot dataset as recordings: rosbag_dataset caches, synchronises and splits them as it does bags.

A recording of an episode has a joint message, a command and a picture of each camera at each of its frames, at 1 / fps:
the state is what joints were measured at, the action what was commanded, so that all action modes can be made of it.

Knows: which settings a dataset answers, and how its rows become a recording.
Must not know: files (reading.py), the cache, the trainer's schema but for the names of its keys.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rosbag_dataset import (
    DATASET_ACTION,
    UR_JOINTS,
    Bag,
    BagError,
    BagSettings,
    Recording,
    SettingError,
    held_commands,
    image_sha256,
    resize_image,
)

from .frames import AbsentVideo, SourceError
from .reading import IMAGE_PREFIX, STATE, LeRobotDatasetSource

# Settings of how bags are read, which a dataset has no use for.
UNUSED = ("camera_topic", "max_offset_ms", "joint_resample", "time_source", "ros_distro", "episode_marker_topic")


def adopt(cfg: Any) -> list[str]:
    """Put what the dataset in data.lerobot_dataset says over those settings that it answers.

    Args:
        cfg: train.py's Config; its sections `data` and `model` are changed.

    Returns:
        Lines for people: what the dataset has, and which of the settings that were given are not used.

    Raises:
        SettingError: it cannot be read; a setting contradicts it.
    """
    data, model = cfg.data, cfg.model
    key = f"data.lerobot_dataset: {data.lerobot_dataset}"
    try:
        source = LeRobotDatasetSource(Path(data.lerobot_dataset))
    except SourceError as error:
        raise SettingError(f"data.lerobot_dataset: {error}") from None
    if data.episodes != "bag":
        raise SettingError(f"data.episodes: found {data.episodes}, expected bag: episodes are those of {key}")
    states, actions = _names(source)
    units = source.units or ["rad" if name.endswith(UR_JOINTS) else "" for name in states]
    answers = {
        "bag_dir": data.lerobot_dataset,
        "joint_topic": STATE,
        "camera_topics": {camera: IMAGE_PREFIX + camera for camera in source.cameras},
        "joint_names": states,
        "state_topics": None,
        "observed_only": [name for name in states if name not in actions],
        "state_units": dict(zip(states, units, strict=True)),
        "action_source": DATASET_ACTION,
        "command_topics": None,
        "command_max_age_ms": None,
        "fps": source.fps,
    }
    given = _not_default(data)
    ignored = [name for name in answers if name in given and getattr(data, name) != answers[name]]
    ignored = [f"data.{name}" for name in (*ignored, *UNUSED) if name in given and name != "bag_dir"]
    for name, value in answers.items():
        setattr(data, name, value)
    model.state_dim, model.action_dim = len(states), len(actions)
    meaning = {
        "absolute": "positions, as its metadata say", "delta": "changes per frame, as its metadata say",
        None: "taken for positions, as LeRobot's are; it does not say",
    }  # fmt: skip
    lines = [
        f"{key}: {len(source.episode_indices())} episodes at {source.fps:g} Hz, cameras {', '.join(source.cameras)}, "
        f"{len(states)} states, {len(actions)} of them acted on; actions are {meaning[source.action_mode]}"
    ]
    if ignored:
        lines.append(f"note: of bags alone, and not used: {', '.join(dict.fromkeys(ignored))}")
    return lines + [f"note: {note}" for note in source.notes]


def _names(source: LeRobotDatasetSource) -> tuple[list[str], list[str]]:
    """The states' names, and those of them that the actions are on.

    Raises:
        SettingError: actions are on something else.
    """
    sizes = {key: source.sizes[key] for key in ("state", "action")}
    states = source.joint_names or [f"state_{i}" for i in range(sizes["state"])]
    same = sizes["state"] == sizes["action"] and (source.action_names is None or source.joint_names is None)
    actions = states if same else source.action_names
    if actions is None or not set(actions) <= set(states) or len({*actions}) < len(actions):
        raise SettingError(
            f"data.lerobot_dataset: {source.root}: its actions are {', '.join(actions or ['not named'])}, expected "
            f"names that its states have, too: {', '.join(states)}; rename them in meta/info.json if they are the same"
        )
    return states, actions


def _not_default(section: Any) -> set[str]:
    """The settings of a section that are not the default."""
    changed = set()
    for spec in dataclasses.fields(section):
        factory = spec.default_factory
        default = spec.default if factory is dataclasses.MISSING else factory()
        if getattr(section, spec.name) != default:
            changed.add(spec.name)
    return changed


@dataclass(frozen=True)
class LeRobotEpisode(Bag):
    """An episode of a dataset, as find_bags() would have it."""

    index: int = 0
    first_frame: int = 0  # of the dataset: episodes that are parts of one recording do not overlap in time

    def content_hash(self) -> str:
        """SHA-256 in hex, see LeRobotDatasetSource.content_hash(). Raises BagError."""
        with _bag_errors(self.name):
            return _open(self.path).content_hash(self.index)


def find_episodes(root: Path) -> list[Bag]:
    """All episodes of the dataset in `root`. Raises BagError when it is none."""
    _open.cache_clear()
    with _bag_errors("data.lerobot_dataset"):
        source = _open(root)
        found: list[Bag] = []
        first = 0
        for index in source.episode_indices():
            length = source.length(index)
            images = dict.fromkeys((IMAGE_PREFIX + camera for camera in source.cameras), length)
            found.append(
                LeRobotEpisode(
                    source.episode_name(index),
                    root,
                    (),
                    images,
                    "",
                    reader=read_episode,
                    part_of=source.recorded(index),
                    index=index,
                    first_frame=first,
                )  # fmt: skip
            )
            first += length
    if not found:
        raise BagError(f"data.lerobot_dataset: {root}: has no episode")
    return found


def read_episode(
    episode: LeRobotEpisode,
    settings: BagSettings,
    sink: Callable[[str, np.ndarray], None] | None,
    on_message: Callable[[int, int], None] | None = None,
    scratch: Path | None = None,
    on_open: Callable[[dict[str, int]], None] | None = None,
    on_picture: Callable[..., None] | None = None,
) -> Recording:
    """As rosbag_dataset.read_bag(), of an episode of a dataset. `settings` are those that adopt() has put right.

    `on_picture` is not called: no picture of a dataset is read in place.
    """
    with _bag_errors(episode.name):
        source = _open(episode.path)
        rows = source.episode(episode.index)
        count = len(rows.state_rad)
        tick_ns = 1e9 / settings.fps  # rounded as synchronise() rounds: then its frames are these
        time_ns = round(episode.first_frame * tick_ns) + np.rint(np.arange(count) * tick_ns).astype(np.int64)
        states, acted = _names(source)
        state, target = rows.state_rad.astype(np.float64), rows.action.astype(np.float64)
        if source.action_mode == "delta":
            target = target + state[:, [states.index(name) for name in acted]]
        cameras = list(settings.camera_topics)
        if on_open:
            on_open(dict.fromkeys(cameras, count))
        first_image: dict[str, str] = {}
        shapes = {camera: settings.image_resize or source.cameras[camera] for camera in cameras}
        for frame in source.frames(episode.index):
            for camera in cameras:
                image = resize_image(frame.images[camera], settings.image_resize)
                if camera not in first_image:
                    first_image[camera] = image_sha256(image.tobytes())
                if sink is not None:
                    sink(camera, image)
                if on_message:
                    on_message(1, image.nbytes)
    return Recording(
        time_ns,
        state,
        dict.fromkeys(cameras, time_ns),
        shapes,
        {camera: source.cameras[camera] for camera in cameras},
        first_image,
        commands={
            name: held_commands(time_ns.tolist(), target[:, column].tolist()) for column, name in enumerate(acted)
        },
    )


@functools.lru_cache(maxsize=1)
def _open(root: Path) -> LeRobotDatasetSource:
    """The dataset that was opened last; find_episodes() opens it anew."""
    return LeRobotDatasetSource(root)


@contextlib.contextmanager
def _bag_errors(where: str) -> Generator[None]:
    """What the reader says as an error of rosbag_dataset, which knows what to do about a bad recording."""
    try:
        yield
    except AbsentVideo as error:
        raise BagError(f"{where}: {error}; data.on_bad_bag: skip leaves it out of a training") from None
    except SourceError as error:
        raise BagError(f"{where}: {error}") from None
