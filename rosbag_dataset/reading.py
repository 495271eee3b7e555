"""One pass over a bag: all joint positions, further states and times in memory, images handed on one by one.

Knows: that each message of a wanted topic is read once, and that none may be lost.
Must not know: how files are stored, how a message is taken apart, and where pixels go: the rooms around it do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .bags import Bag
from .commands import Commands, followed, held
from .errors import BagError
from .faults import Faults, PictureWatch
from .fields import TopicField, is_held
from .images import height_by_width, read_image, resize_image
from .settings import BagSettings
from .storage import messages, open_storage, topics_of
from .topics import (
    ARRAY_TYPE,
    TRAJECTORY_TYPE,
    bag_typestore,
    check_fields,
    check_joints,
    check_topics,
    commanded_positions,
    joint_positions,
    marker_value,
    parse_message,
    source_joints,
    stamp_ns,
    time_stamp,
    trajectory_points,
    typestore_for,
    wanted_fields,
    wanted_topics,
)
from .video import VIDEO_TYPES, VideoDecoder

ImageSink = Callable[[str, np.ndarray], None]  # called with (camera, image)


@dataclass
class Samples:
    """The numbers that one field of a topic had, in file order."""

    time_ns: np.ndarray  # (N,) int64
    value: np.ndarray  # (N,) float64
    held: bool  # bool or integer: each counts until the next one comes

    def between(self, begin_ns: int, end_ns: int) -> Samples:
        """Those of begin_ns <= t < end_ns; of held values also the one that holds at begin_ns."""
        inside = (begin_ns <= self.time_ns) & (self.time_ns < end_ns)
        if self.held and (before := self.time_ns < begin_ns).any():
            inside |= before & (self.time_ns == self.time_ns[before].max())
        return Samples(self.time_ns[inside], self.value[inside], self.held)


@dataclass
class Recording:
    """What one pass over a bag yields besides pixels. Times are int64 nanoseconds, in file order.

    The joints have a row for each message that has any of them. What a message does not have is NaN in it: that joint's
    samples are in other rows, for example those of another publisher.
    """

    joint_time_ns: np.ndarray  # (M,)
    joint_rad: np.ndarray  # (M, J) float64, in the order of joint_names
    camera_time_ns: dict[str, np.ndarray]  # camera -> (N,)
    image_shape: dict[str, tuple[int, int]]  # camera -> (H, W) as stored
    source_shape: dict[str, tuple[int, int]]  # camera -> (H, W) as recorded
    first_image: dict[str, str] = field(default_factory=dict)  # camera -> SHA-256 of its first image, see sha256()
    ignored_joint_messages: int = 0  # messages of the joint topic that have none of the joints, and are in no row
    states: dict[str, Samples] = field(default_factory=dict)  # by their names in data.state_topics
    commands: dict[str, Commands] = field(default_factory=dict)  # by the names of the states that were commanded
    # config key of a state or command -> messages of its topic that do not have it; only of those that were ignored
    ignored_messages: dict[str, int] = field(default_factory=dict)
    # Of a camera with video: its messages before the first keyframe, and later ones that gave no picture. They have no
    # time and no picture here. Only cameras that have some; known only if pixels were decoded.
    dropped_packets: dict[str, tuple[int, int]] = field(default_factory=dict)
    picture_faults: dict[str, Faults] = field(default_factory=dict)  # camera -> ...; only cameras that have some
    # topic -> how long after their header stamps its messages were received, the median in ms; only topics with stamps
    stamp_delay_ms: dict[str, float] = field(default_factory=dict)
    marker_time_ns: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (K,) of the episode markers
    marker: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (K,) int64, 0: stop

    def between(self, begin_ns: int, end_ns: int) -> tuple[Recording, dict[str, np.ndarray]]:
        """What was recorded at begin_ns <= t < end_ns, as if it were a recording of its own.

        Returns:
            (that part, camera -> (N,) int64: which images of the whole recording are the part's).
        """
        rows = _within(self.joint_time_ns, begin_ns, end_ns)
        images = {c: np.arange(len(t))[_within(t, begin_ns, end_ns)] for c, t in self.camera_time_ns.items()}
        part = dataclasses.replace(
            self,
            joint_time_ns=self.joint_time_ns[rows],
            joint_rad=self.joint_rad[rows],
            camera_time_ns={camera: self.camera_time_ns[camera][i] for camera, i in images.items()},
            states={name: samples.between(begin_ns, end_ns) for name, samples in self.states.items()},
            # Commands stay: one that was given before holds on. What has no time, or was counted, is the whole's.
            ignored_joint_messages=0,
            ignored_messages={},
            dropped_packets={},
            picture_faults={},
        )
        return part, images

    def sha256(self) -> str:
        """A hash of what was recorded: joints, the time of each message, and each camera's first image.

        The same for a copy under another name, in another storage format, compressed, or with other metadata. No more
        images are needed: a motion that is replayed exactly, by a simulator's clock, begins before other eyes. Further
        states are left out: a state that is added to a config changes no recording's side of the split.
        """
        digest = hashlib.sha256()
        for part in (self.joint_time_ns, self.joint_rad, *self.camera_time_ns.values()):
            digest.update(f"{part.shape} ".encode())
            digest.update(np.ascontiguousarray(part).data.cast("B") if part.size else b"")
        for image in self.first_image.values():
            digest.update(bytes.fromhex(image))
        return digest.hexdigest()


def _within(time_ns: np.ndarray, begin_ns: int, end_ns: int) -> slice | np.ndarray:
    """Where begin_ns <= t < end_ns: a slice of times that are in order, of which no copy is made; else (N,) bool."""
    if (np.diff(time_ns) >= 0).all():
        return slice(*np.searchsorted(time_ns, [begin_ns, end_ns]).tolist())
    return (begin_ns <= time_ns) & (time_ns < end_ns)


def read_bag(
    bag: Bag,
    settings: BagSettings,
    sink: ImageSink | None,
    on_message: Callable[[int, int], None] | None = None,
    scratch: Path | None = None,
    on_open: Callable[[dict[str, int]], None] | None = None,
    on_picture: Callable[[str, int, str, bytes], None] | None = None,
) -> Recording:
    """One pass over a bag: joint positions by name for every message, images decoded and handed to `sink`.

    Args:
        bag: from find_bags().
        settings: topics, joints and conventions.
        sink: called as sink(camera, image) with (H, W, 3) uint8 RGB, already resized, in file order. None checks
            the images' headers and sizes without decoding pixels.
        on_message: called as on_message(images, bytes) for progress.
        scratch: folder to unpack file-compressed storage in.
        on_open: called once with {camera: number of images}, before any pixel.
        on_picture: called as on_picture(camera, receive time in ns, type, bytes) with each message of a camera.

    Raises:
        BagError: anything that is wrong with the recording.
    """
    typestore_for(settings.ros_distro)  # a wrong setting is said before any file is opened
    camera_of = {topic: camera for camera, topic in settings.camera_topics.items()}
    # Numbers as in the arrays that they become: an hour at 500 Hz would be 0.5 GB as Python's objects.
    joint_times, joint_values = array("q"), array("d")
    camera_times = {camera: array("q") for camera in settings.camera_topics}
    shapes: dict[str, tuple[int, int]] = {}
    first_image: dict[str, str] = {}
    stored: dict[str, tuple[int, int]] = {}
    videos: dict[str, VideoDecoder] = {}
    watches: dict[str, PictureWatch] = {}
    delays_ns: dict[str, array[float]] = {}
    ignored = 0
    numbers = {key: _Numbers(topic_field) for key, topic_field in wanted_fields(settings).items()}
    commands = _JointCommands(settings)
    marker_times, markers = array("q"), array("q")
    read = {topic: 0 for _, topic, _ in wanted_topics(settings)}

    def keep(camera: str, time_ns: int, image: np.ndarray | None, shape: tuple[int, int] | None, raw: bytes) -> None:
        """Take over an image, resized, with the shape that it had before; or what is known without decoding it."""
        camera_times[camera].append(time_ns)
        if shape is not None and shapes.setdefault(camera, shape) != shape:
            was, now = height_by_width(shapes[camera]), height_by_width(shape)
            raise BagError(f"{where}: image size changes within the bag, from {was} to {now} (HxW)")
        if camera not in first_image:  # by what is stored of it, or by its message if nothing is
            first_image[camera] = image_sha256(raw if image is None else image.tobytes())
        if image is not None and sink is not None:
            stored[camera] = image.shape[:2]
            watches.setdefault(camera, PictureWatch()).add(time_ns, image)
            sink(camera, image)

    def keep_video(camera: str, pictures: Iterable[tuple[int, np.ndarray]]) -> None:
        for time_ns, picture in pictures:
            keep(camera, time_ns, resize_image(picture, settings.image_resize), picture.shape[:2], b"")

    with contextlib.ExitStack() as stack:
        readers = open_storage(bag, stack, scratch)
        check_topics(bag, readers, settings)
        check_joints(bag, readers, settings)
        typestore = bag_typestore(bag, readers, settings)
        check_fields(bag, readers, settings, typestore)
        counts = {topic: count for topic, (_, count) in topics_of(readers).items()}
        if on_open:
            on_open({camera: counts[topic] for topic, camera in camera_of.items()})
        for topic, msgtype, receive_ns, raw in messages(bag, readers, set(read)):
            read[topic] += 1
            where = f"{bag.name}: {topic}, message {read[topic]}"
            message = parse_message(raw, msgtype, settings.ros_distro, where, typestore)
            if stamp := stamp_ns(message):
                delays_ns.setdefault(topic, array("d")).append(receive_ns - stamp)
            for number in numbers.values():
                if number.source.topic != topic:
                    continue
                value = number.source.read(message, where)
                if value is None:
                    number.ignored += 1
                else:
                    number.add(time_stamp(message, receive_ns, settings.time_source, where), value)
            if topic == settings.action_source:
                time_ns = time_stamp(message, receive_ns, settings.time_source, where)
                commands.add(message, msgtype, time_ns, where)
            if topic == settings.joint_topic:
                row = joint_positions(message, settings.joint_names, where)
                if row is None:
                    ignored += 1
                else:
                    joint_times.append(time_stamp(message, receive_ns, settings.time_source, where))
                    joint_values.frombytes(row.tobytes())
            if settings.episodes == "marker" and topic == settings.episode_marker_topic:
                marker_times.append(time_stamp(message, receive_ns, settings.time_source, where))
                markers.append(marker_value(message, where))
            if topic in camera_of:
                camera = camera_of[topic]
                if on_picture:
                    on_picture(camera, receive_ns, msgtype, raw)
                time_ns = time_stamp(message, receive_ns, settings.time_source, where)
                if msgtype not in VIDEO_TYPES:
                    image, shape = read_image(message, msgtype, settings.image_resize, where, decode=sink is not None)
                    keep(camera, time_ns, image, shape, raw)
                elif sink is None:
                    keep(camera, time_ns, None, None, raw)
                else:
                    keep_video(camera, videos.setdefault(camera, VideoDecoder()).add(message, time_ns, where))
            if on_message:
                on_message(topic in camera_of, len(raw))
    for camera, video in videos.items():
        where = f"{bag.name}: {settings.camera_topics[camera]}"
        keep_video(camera, video.finish(where))
    for topic, count in read.items():
        if count != counts[topic]:  # what was read against what the storage itself promised
            raise BagError(f"{bag.name}: {topic}: read {count} of {counts[topic]} messages; the storage is damaged")
    joint_time_ns = np.array(joint_times, np.int64)
    joint_rad = np.asarray(joint_values).reshape(-1, len(settings.joint_names))
    faults = {camera: watch.faults(joint_time_ns, joint_rad) for camera, watch in watches.items()}
    return Recording(
        joint_time_ns,
        joint_rad,
        {camera: np.array(times, np.int64) for camera, times in camera_times.items()},
        {camera: stored.get(camera, settings.image_resize or shape) for camera, shape in shapes.items()},
        shapes,
        {camera: first_image[camera] for camera in settings.camera_topics},
        ignored,
        {
            name: Samples(np.array(of.times_ns, np.int64), np.array(of.values, np.float64), of.held)
            for name in settings.state_topics
            for of in [numbers[f"data.state_topics.{name}"]]
        },
        commands.series(f"{bag.name}: data.action_source: {settings.action_source}")
        | {
            name: held(of.times_ns, of.values)
            for name in settings.command_topics
            for of in [numbers[f"data.command_topics.{name}"]]
        },
        {key: of.ignored for key, of in numbers.items() if of.ignored}
        | ({"data.action_source": commands.ignored} if commands.ignored else {}),
        {
            c: (v.before_keyframe, v.without_picture)
            for c, v in videos.items()
            if v.before_keyframe or v.without_picture
        },
        {camera: found for camera, found in faults.items() if found},
        {topic: round(float(np.median(delays)) / 1e6, 1) for topic, delays in delays_ns.items()},
        np.array(marker_times, np.int64),
        np.array(markers, np.int64),
    )


@dataclass
class _Numbers:
    """What one field of a topic said, message by message."""

    source: TopicField
    times_ns: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    held: bool = False  # as Samples has it, by the first
    ignored: int = 0  # messages that do not have it

    def add(self, time_ns: int, value: bool | int | float) -> None:
        """Take over what a message says."""
        self.held = is_held(value) if not self.values else self.held
        self.times_ns.append(time_ns)
        self.values.append(value)


class _JointCommands:
    """What data.action_source said, message by message, and the joints' commands of it in the end."""

    def __init__(self, settings: BagSettings) -> None:
        self._names, self._joints = settings.joint_names, source_joints(settings)
        # (time in ns, (P,) ns from there to each point, (P, J) values)
        self._trajectories: list[tuple[int, np.ndarray, np.ndarray]] = []
        self._times_ns, self._values = array("q"), array("d")  # of what is no trajectory: a row of J values each
        self.ignored = 0  # messages with none of the joints, or without points

    def add(self, message: Any, msgtype: str, time_ns: int, where: str) -> None:
        """Take a message that came at `time_ns`. Raises BagError when it is no command."""
        if msgtype == TRAJECTORY_TYPE:
            if (points := trajectory_points(message, self._names, where)) is None:
                self.ignored += 1
            else:
                self._trajectories.append((time_ns, *points))
            return
        positions = commanded_positions if msgtype == ARRAY_TYPE else joint_positions
        if (row := positions(message, self._names, where)) is None:
            self.ignored += 1
        else:
            self._times_ns.append(time_ns)
            self._values.frombytes(row.tobytes())

    def series(self, where: str) -> dict[str, Commands]:
        """Joint -> its commands, of those for which data.action_source is asked. Raises BagError when one has none."""
        found = {}
        times_ns, values = np.array(self._times_ns, np.int64), np.array(self._values).reshape(-1, len(self._names))
        at_once = np.zeros(1, np.int64)
        for j in self._joints:
            said = ~np.isnan(values[:, j])
            planned = [(t, offset, rows[:, j]) for t, offset, rows in self._trajectories if not np.isnan(rows[0, j])]
            if not said.any() and not planned:
                raise BagError(f"{where}: no message says where {self._names[j]} is to go, expected positions of it")
            if planned:
                planned += [(int(t), at_once, v) for t, v in zip(times_ns[said], values[said, j, None], strict=True)]
                found[self._names[j]] = followed(planned)
            else:
                found[self._names[j]] = held(times_ns[said], values[said, j])
        return found


def image_sha256(image: bytes | memoryview) -> str:
    """What Recording.first_image holds of an image."""
    return hashlib.sha256(image).hexdigest()
