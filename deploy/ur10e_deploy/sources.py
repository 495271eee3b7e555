"""Recorded episodes for the offline evaluation, whatever they are stored in.

    source = LeRobotDatasetSource(root)                         # lerobot_dataset/: LeRobot v3.0, without lerobot
    source = BagSource(bag_dir, values, cache_dir)              # ROS 2 bags, decoded exactly as in training
    for index in source.episode_indices():
        episode = source.episode(index)                         # states, actions, times: small
        for frame in source.frames(index): ...                  # pixels, one frame at a time: constant memory

Both are an EpisodeSource. Whatever is wrong with a recording is a SourceError: one line that says where, what was
found, what was expected and what to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from lerobot_dataset.frames import AbsentVideo, EpisodeData, Frame, SourceError, frame_range
from rosbag_dataset import (
    Bag,
    BagError,
    Episode,
    cache_key,
    clean_cache,
    cut,
    cut_settings,
    find_bags,
    find_entry,
    open_entry,
    open_pixels,
    settings_from,
    sidecar_path,
    source_of,
)

__all__ = ["AbsentVideo", "BagSource", "EpisodeData", "EpisodeSource", "Frame", "SourceError", "frame_range"]


class EpisodeSource(Protocol):
    """What the evaluation needs of a recording.

    Attributes:
        fps: frames per second.
        joint_names: names of the state's S joints and other states in order, or None when the source does not say.
        cameras: camera -> (height, width) of its images as delivered.
        action_mode: "delta" or "absolute" when the source knows it (bags: their settings), else None.
        resized: the images already have the policy's size (bags are resized as in training).
        notes: lines that a person should read, none of them fatal (a declared codec that is not the file's). Files
            are opened when they are needed, so that reading may add to them: print them when done.
        identity: what was evaluated, for the summary: path, kind, version, episodes, frames (None where it takes
            decoding to know), sha256 (the same exactly when the content is, by sizes and the ends of large files).
    """

    fps: float
    joint_names: list[str] | None
    cameras: dict[str, tuple[int, int]]
    action_mode: str | None
    resized: bool
    notes: list[str]
    identity: dict[str, Any]

    def episode_indices(self) -> list[int]:
        """Numbers of all episodes, ascending."""

    def episode_name(self, index: int) -> str:
        """Name of an episode, without reading it. Raises SourceError when there is no such episode."""

    def episode(self, index: int) -> EpisodeData:
        """States, actions and times of an episode; checks that its images are there, without decoding them.

        Raises:
            SourceError: there is no such episode, or it is damaged.
        """

    def frames(self, index: int, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        """Frames start <= i < stop (None: to the end) in order, decoded one by one in constant memory.

        Raises:
            SourceError: at once when the episode or the range does not exist; while iterating when an image is damaged.
        """


class BagSource:
    """ROS 2 bags as an EpisodeSource: the episodes that training makes of them, numbered over all bags by name.

    A bag is decoded when it is first asked for, so that evaluating the held-out few does not cost decoding all. What is
    found goes into `cache_dir`, which may be the training's (then nothing is decoded twice): an index of its pictures,
    or these where they cannot be read in the bag. But where training cut bags into episodes (data.episodes), which ones
    there are is known only when all bags are decoded. A bag that cannot be used counts as one episode, and is an error
    when it is asked for, whatever `on_bad_bag` was in training.

    Args:
        bag_dir: searched recursively for bags.
        values: the merged `data` and `conventions` of the checkpoint's train_config.json: topics, joints, fps, resize,
            sign, wrapping, action mode, what an episode is. Its bag_dir, cache_dir and frames are ignored.
        cache_dir: folder for decoded frames, or where they are.
        angle_reference_rad: the contract's, around which angles are wrapped; None is 0 for each joint.
        progress: show a progress bar while decoding, when stderr is a terminal.

    Raises:
        SourceError: no bags there, or `values` lack a setting.
    """

    def __init__(
        self,
        bag_dir: Path,
        values: Mapping[str, Any],
        cache_dir: Path,
        angle_reference_rad: Sequence[float] | None = None,
        progress: bool = True,
    ) -> None:
        self._dir = Path(bag_dir)
        self._angle_reference_rad = None if angle_reference_rad is None else np.array(angle_reference_rad)
        with self._bag_errors("the checkpoint's settings"):
            # What frames there are of a bag can be judged; to learn from, they may have been too few.
            # Each is looked at once: no copy of its pixels is worth making.
            asked_for = {"bag_dir": self._dir, "cache_dir": Path(cache_dir), "min_used_share": 0.0, "frames": "auto"}
            self._settings = settings_from({**values, **asked_for})
        try:
            self._bags: list[Bag] = find_bags(self._dir)
        except BagError:
            found = "none" if self._dir.is_dir() else "a file" if self._dir.exists() else "nothing"
            raise SourceError(
                f"{self._dir}: expected a folder of ROS 2 bags (metadata.yaml, .db3 or .mcap files in it or below), "
                f"found {found}; check the path"
            ) from None
        self._progress = progress and sys.stderr.isatty()
        self._loaded: dict[int, list[Episode]] = {}  # number of a bag -> its episodes
        self.fps = self._settings.fps
        self.joint_names: list[str] | None = list(self._settings.state_names)
        self.action_mode: str | None = self._settings.action_mode
        self.resized = True  # or the camera's own size, which the policy was then trained on
        self.notes: list[str] = []

    @cached_property
    def cameras(self) -> dict[str, tuple[int, int]]:
        """Each camera's (H, W) as delivered.

        Without image_resize in the settings this is known only from a decoded bag: any that was asked for already,
        else the first one, which is decoded now.
        """
        if self._settings.image_resize:
            return dict.fromkeys(self._settings.camera_topics, self._settings.image_resize)
        episode = next((e for episodes in self._loaded.values() for e in episodes), None) or self._load(0)
        return dict(episode.image_shape)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What was evaluated, and with which settings it was read. `sha256` is over the bags' names and content."""
        cutting = cut_settings(dataclasses.asdict(self._settings))
        digest = hashlib.sha256()
        for bag in self._bags:
            try:
                digest.update(f"{bag.name}\0{bag.content_hash()}\0".encode())
                if cutting["episodes"] == "file" and sidecar_path(bag).exists():
                    digest.update(sidecar_path(bag).read_bytes())
            except OSError as error:
                raise SourceError(f"{self._dir}: {bag.name}: {error.strerror or error}") from None
        conventions = ("fps", "action_mode", "apply_joint_sign", "joint_sign", "wrap_angles", "image_resize")
        return {
            "path": str(self._dir),
            "kind": "rosbag2",
            "version": None,
            "episodes": len(self._episodes),
            "frames": None,
            "sha256": digest.hexdigest(),
            "read_with": {name: getattr(self._settings, name) for name in conventions}
            | {name: value for name, value in cutting.items() if value not in ("bag", None)},
        }

    def episode_indices(self) -> list[int]:
        """The numbers 0, 1, ... of all episodes, in the order of the bags' names and of time."""
        return list(range(len(self._episodes)))

    def episode_name(self, index: int) -> str:
        """What training called it. Raises SourceError when there is no such episode."""
        return self._place(index)[0]

    def episode(self, index: int) -> EpisodeData:
        """States, actions and times, on the time grid that training uses; decodes the bag if the cache lacks it.

        Raises:
            SourceError: there is no such bag, or it cannot be used.
        """
        episode = self._load(index)
        count = len(episode.time_ns)
        action = episode.action
        action[episode.action_stop == np.arange(count)] = np.nan
        segment = np.repeat(np.arange(len(episode.segments)), np.diff(episode.segments, axis=1)[:, 0])
        timestamp_s = (episode.time_ns - episode.time_ns[0]) / 1e9
        return EpisodeData(index, episode.name, timestamp_s, episode.state, action, segment)

    def frames(self, index: int, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        """Frames start <= i < stop (None: to the end) in order, copied out of the cache or read in the bag.

        Raises:
            SourceError: there is no such bag or range, or the bag cannot be used; while iterating when it has changed.
        """
        data = self.episode(index)
        episode = self._load(index)
        wanted = frame_range(episode.name, len(episode.time_ns), start, stop)
        # Memory maps: what has been read is page cache, which the system takes back when it needs it.
        pixels = {camera: open_pixels(episode, camera) for camera in episode.image_shape}

        def images(i: int) -> dict[str, np.ndarray]:
            with self._bag_errors(str(self._dir)):
                return {camera: np.array(stored[episode.image_index[camera][i]]) for camera, stored in pixels.items()}

        return (Frame(i, float(data.timestamp_s[i]), data.state_rad[i], images(i)) for i in wanted)

    @cached_property
    def _episodes(self) -> list[tuple[str, int, int]]:
        """(name, number of its bag, which of the bag's episodes it is) of every episode."""
        found: list[tuple[str, int, int]] = []
        for number, bag in enumerate(self._bags):
            names = [bag.name]
            if self._settings.episodes != "bag":
                with contextlib.suppress(SourceError):  # said when it is asked for
                    names = [episode.name for episode in self._load_bag(number)]
            found += [(name, number, part) for part, name in enumerate(names)]
        return found

    def _place(self, index: int) -> tuple[str, int, int]:
        if not 0 <= index < len(self._episodes):
            raise SourceError(
                f"{self._dir}: no episode {index}; the folder has {len(self._episodes)} episodes in {len(self._bags)} "
                "bags, from 0 on"
            )
        return self._episodes[index]

    def _load(self, index: int) -> Episode:
        _, bag, part = self._place(index)
        return self._load_bag(bag)[part]

    def _load_bag(self, number: int) -> list[Episode]:
        """Decode a bag unless the cache has it, synchronise and cut it as the trainer does (see load_episodes)."""
        if number in self._loaded:
            return self._loaded[number]
        bag, settings = self._bags[number], self._settings
        with self._bag_errors(str(self._dir)):
            key = cache_key(bag, bag.content_hash(), settings)
            new = find_entry(key, settings) is None
            if new:
                clean_cache(settings.cache_dir)
            total = sum((bag.claimed or {}).get(topic, 0) for topic in settings.camera_topics.values())
            with tqdm(
                total=total or None, desc=f"decoding {bag.name}", unit="image", leave=False,
                disable=not (self._progress and new),
            ) as bar:  # fmt: skip
                entry, recording = open_entry(bag, key, settings, True, lambda images, size: bar.update(images))
            episodes, left_out = cut(bag, recording, settings, self._angle_reference_rad)
        if not episodes:
            raise SourceError(f"{self._dir}: {bag.name}: no episode in it: {left_out[0]['why']}")
        first = next((e for others in self._loaded.values() for e in others), episodes[0])
        if episodes[0].image_shape != first.image_shape:
            raise SourceError(
                f"{self._dir}: images of {bag.name} are {episodes[0].image_shape}, those of {first.bag} are "
                f"{first.image_shape} (HxW), and the checkpoint's settings do not resize them; evaluate them apart"
            )
        for episode in episodes:
            episode.entry, episode.source = entry, None if entry.name == key else source_of(bag, settings, key)
        self._loaded[number] = episodes
        return episodes

    @contextlib.contextmanager
    def _bag_errors(self, where: str) -> Generator[None]:
        try:
            yield
        except BagError as error:
            raise SourceError(f"{where}: {error}") from error
        except OSError as error:
            raise SourceError(f"{where}: {error.filename or ''}: {error.strerror or error}") from error
