"""ROS 2 bags to ACT training samples: read, decode once, synchronise, cut into segments, serve chunks.

    python -m rosbag_dataset DIR                    # look at a folder of bags: topics, rates, gaps; nothing is written
    python -m rosbag_dataset DIR --verify           # the same, and decode every image and hash every byte
    python -m rosbag_dataset DIR --config my.yaml   # with the topics and joints of your config

The way of the data:

    bag --read_bag()--> joint messages, images --(decode, resize)--> cache entry on disk      once per bag
    cache entry --synchronise()--> ticks at data.fps, states, image indices, segments          at every start
    episodes --ChunkDataset--> state (J,), images (H, W, 3) uint8, action (chunk, J), padding   at every step

The cache holds what is expensive and independent of the training settings: decoded, resized pixels in file
order, their times, and the joint path. Synchronisation is cheap and runs at every start, so that changing
`data.fps`, `max_offset_ms`, `wrap_angles` or `action_mode` never re-reads a bag.

This file knows bags, time and pixels; it knows no model, no checkpoint and no process group, and needs neither
ROS nor torch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np
import yaml
from rosbags.interfaces import MessageDefinition, MessageDefinitionFormat
from rosbags.rosbag2 import Reader, storage_mcap
from rosbags.typesys import Stores, get_typestore
from rosbags.typesys.store import Typestore
from tqdm import tqdm

if sys.version_info >= (3, 14):  # the zstd that rosbags itself depends on
    from compression import zstd
else:
    from backports import zstd

CACHE_VERSION = 1  # raise it when decoded pixels or times change, so that old entries are not used
JOINT_TYPE = "sensor_msgs/msg/JointState"
IMAGE_TYPE = "sensor_msgs/msg/Image"
COMPRESSED_TYPE = "sensor_msgs/msg/CompressedImage"

# Depth (16UC1 in mm, 32FC1 in m) becomes one grey level per centimetre: 0 = no reading, 255 = 2.55 m or farther.
DEPTH_M_PER_LEVEL = 0.01
RESIZE_INTERPOLATION = "cv2.INTER_AREA when shrinking, cv2.INTER_LINEAR when enlarging"

UR_JOINTS = (
    "shoulder_pan_joint", "shoulder_lift_joint", "elbow_joint", "wrist_1_joint", "wrist_2_joint", "wrist_3_joint",
)  # fmt: skip
MOVED_RAD = 1e-3  # a joint whose whole range in an episode is below this "never moved" (encoder noise is ~1e-5)
STILL_RAD_PER_S = 3e-3  # a frame in which every joint is slower than this is "still"
# libyaml, ten times as fast, where PyYAML was built with it: metadata.yaml files were most of a warm start.
FAST_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAX_EPISODE_S = 24 * 3600.0  # longer recordings are broken time stamps
# Floors for standard deviations. A joint that never moves has a deviation near zero, and dividing by it would turn
# a 0.001 rad disturbance on the robot into an input of hundreds of sigmas.
POSITION_STD_FLOOR_RAD = 1e-2
DELTA_STD_FLOOR_RAD = 1e-4


class BagError(Exception):
    """A bag, or a folder of bags, that cannot be used: one line saying where, what, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # names inside a damaged bag may hold line breaks


class SetupError(BagError):
    """Not one bag's fault (a full disk, a wrong setting), so that data.on_bad_bag: skip does not pass over it."""


@dataclass(frozen=True)
class BagSettings:
    """What to read from a bag and how. No defaults here: they live in train.py's schema (and config.yaml).

    Attributes:
        bag_dir: folder that is searched recursively for bags.
        cache_dir: folder for decoded frames.
        joint_topic: topic of sensor_msgs/msg/JointState.
        camera_topics: camera name -> topic of Image or CompressedImage; order is the model's camera order.
        joint_names: J joint names, in the order of state and action.
        fps: rate of the training frames in Hz.
        max_offset_ms: a frame needs a sample of every topic within this many milliseconds.
        joint_resample: "linear" or "nearest".
        time_source: "receive" (the bag's time stamps) or "header" (header.stamp).
        ros_distro: whose message definitions decode the bag, for example "humble".
        joint_sign: J factors of +1 or -1, used when apply_joint_sign.
        apply_joint_sign: multiply joint positions by joint_sign.
        wrap_angles: wrap revolute joints to (-pi, pi].
        image_resize: (H, W) of the stored frames, or None to keep the camera's size.
        action_mode: "delta" (q[t+1] - q[t]) or "absolute" (q[t+1]).
        on_bad_bag: "error" or "skip".
    """

    bag_dir: Path
    cache_dir: Path
    joint_topic: str
    camera_topics: dict[str, str]
    joint_names: tuple[str, ...]
    fps: float
    max_offset_ms: float
    joint_resample: str
    time_source: str
    ros_distro: str
    joint_sign: tuple[float, ...]
    apply_joint_sign: bool
    wrap_angles: bool
    image_resize: tuple[int, int] | None
    action_mode: str
    on_bad_bag: str

    @property
    def revolute(self) -> np.ndarray:
        """(J,) bool: which joints are angles. JointState carries no joint types, so the UR arm's own joint names
        (with any prefix) count as revolute, and any other joint (a gripper's finger) is never wrapped."""
        return np.array([name.endswith(UR_JOINTS) for name in self.joint_names])


# -- finding bags -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bag:
    """One recording, one episode. `claimed` is None for a bare storage file, which has no metadata.yaml."""

    name: str  # path relative to bag_dir: the episode's name everywhere
    path: Path
    files: tuple[Path, ...]
    claimed: dict[str, int] | None  # topic -> message count according to metadata.yaml
    compression: str  # "", "file" or "message"
    problem: str = ""  # why this cannot be a usable bag, found before opening it

    def identity(self, full: bool = False) -> str:
        """Hash of the recording's bytes: sizes, metadata.yaml, and the first and last MiB (or all) of each file."""
        digest = hashlib.sha256()
        metadata = self.path / "metadata.yaml"
        if self.claimed is not None:
            digest.update(metadata.read_bytes())
        for file in self.files:
            size = file.stat().st_size
            digest.update(str(size).encode())
            with file.open("rb") as stream:
                if full:
                    while block := stream.read(1 << 20):
                        digest.update(block)
                else:
                    digest.update(stream.read(1 << 20))
                    stream.seek(max(0, size - (1 << 20)))
                    digest.update(stream.read(1 << 20))
        return digest.hexdigest()


def find_bags(bag_dir: Path) -> list[Bag]:
    """All bags below `bag_dir`, sorted by name: folders with a metadata.yaml, and bare .db3 / .mcap files.

    Hidden names are passed over (unfinished downloads start with a dot). ROS 1 `.bag` files are returned with their
    `problem` set, so that they are reported and not silently ignored.

    Raises:
        BagError: the folder does not exist or holds no bag.
    """
    if not bag_dir.is_dir():
        found = "a file" if bag_dir.exists() else "nothing"
        raise BagError(
            f"data.bag_dir: {bag_dir}: expected a folder of ROS 2 bags, found {found} there; "
            "set data.bag_dir in the config or with --override data.bag_dir=PATH"
        )
    bags: list[Bag] = []
    seen: set[Path] = set()
    for folder, folders, files in os.walk(bag_dir, followlinks=True):
        path = Path(folder)
        real = path.resolve()
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        if "metadata.yaml" in files:
            folders.clear()
            bags.append(_bag_folder(path, _episode_name(path, bag_dir)))
            continue
        for file in sorted(f for f in files if not f.startswith(".")):
            if file.endswith((".db3", ".mcap")):
                name = _episode_name(path / file, bag_dir)
                bags.append(Bag(name, path / file, (path / file,), None, ""))
            elif file.endswith(".bag"):
                problem = "is a ROS 1 bag file; convert it first: rosbags-convert --src FILE.bag --dst FOLDER"
                bags.append(Bag(_episode_name(path / file, bag_dir), path / file, (path / file,), None, "", problem))
    if not bags:
        raise BagError(
            f"data.bag_dir: {bag_dir}: found no ROS 2 bag in it or below; expected folders with metadata.yaml and "
            ".db3 or .mcap files; check the path, or record sample bags with: python -m sim.record --out DIR"
        )
    return sorted(bags, key=lambda bag: bag.name)


def _episode_name(path: Path, bag_dir: Path) -> str:
    relative = path.relative_to(bag_dir)
    return relative.as_posix() if relative.parts else bag_dir.resolve().name


def _bag_folder(path: Path, name: str) -> Bag:
    """Read metadata.yaml with tolerance: only the claims are taken from it; the storage files are opened directly,
    because a rosbag2 folder read through its metadata yields nothing when a QoS profile or a file name differs."""
    present = sorted(
        p for p in path.iterdir() if not p.name.startswith(".") and p.name.endswith((".db3", ".mcap", ".zstd"))
    )
    try:
        info = yaml.load((path / "metadata.yaml").read_text(), Loader=FAST_YAML)["rosbag2_bagfile_information"]
        listed = [path / Path(p).name for p in info["relative_file_paths"]]
        mode = str(info.get("compression_mode") or "").lower()
        claimed: dict[str, int] = {}
        for entry in info["topics_with_message_count"]:
            topic = entry["topic_metadata"]["name"]
            claimed[topic] = claimed.get(topic, 0) + int(entry["message_count"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, OSError) as exc:
        reason = " ".join(str(exc).split())
        problem = (
            f"metadata.yaml is not a rosbag2 metadata file ({type(exc).__name__}: {reason}); "
            "rewrite it with: ros2 bag reindex"
        )
        return Bag(name, path, tuple(present), {}, "", problem)
    missing = [p.name for p in listed if not p.exists()]
    if missing and len(present) != len(listed):  # the same number of files under other names: renamed, fine
        problem = f"metadata.yaml lists {', '.join(missing)}, which is not there (found {[p.name for p in present]})"
        return Bag(name, path, tuple(present), claimed, "", problem)
    files = tuple(present if missing else listed)
    problem = "" if files else "metadata.yaml lists no storage file"
    return Bag(name, path, files, claimed, mode if mode in ("file", "message") else "", problem)


# -- reading one bag ----------------------------------------------------------------------------------------------


@dataclass
class Recording:
    """What one pass over a bag yields besides pixels. Times are int64 nanoseconds, in file order."""

    joint_time_ns: np.ndarray  # (M,)
    joint_rad: np.ndarray  # (M, J) float64, in the order of joint_names
    camera_time_ns: dict[str, np.ndarray]  # camera -> (N,)
    image_shape: dict[str, tuple[int, int]]  # camera -> (H, W) as stored
    source_shape: dict[str, tuple[int, int]]  # camera -> (H, W) as recorded


class Sqlite3Storage:
    """A .db3 file: two queries by the standard library, streaming, in the order of recording.

    rosbags' own reader refuses a bag when one topic's message definition or QoS has a form that it does not know
    (rosbag2 itself records encoding "unknown"), although neither is needed here, and cannot open a path with #, ? or %.
    """

    def __init__(self, file: Path) -> None:
        self._db = sqlite3.connect(f"file:{quote(str(file.resolve()))}?immutable=1", uri=True)
        rows = self._db.execute(
            "SELECT topics.id, name, type, count(messages.id) FROM topics "
            "LEFT JOIN messages ON topics.id = messages.topic_id GROUP BY topics.id ORDER BY topics.id"
        )
        self.connections = [SimpleNamespace(id=i, topic=t, msgtype=m, msgcount=n) for i, t, m, n in rows]

    def close(self) -> None:
        self._db.close()

    def messages(self, connections: Sequence[Any]) -> Iterator[tuple[Any, int, bytes]]:
        """(connection, receive time in ns, CDR bytes) of each message of `connections`."""
        wanted = {c.id: c for c in connections}
        marks = ", ".join("?" * len(wanted))
        query = f"SELECT topic_id, timestamp, data FROM messages WHERE topic_id IN ({marks}) ORDER BY id"
        for topic_id, time_ns, data in self._db.execute(query, tuple(wanted)):
            if type(time_ns) is not int or type(data) is not bytes:  # sqlite types values, not columns
                raise ValueError("a message's time stamp or data is not of its type")
            yield wanted[topic_id], time_ns, data


def _lenient_definition(schema: Any, parse: Callable[[Any], MessageDefinition] = storage_mcap.get_msgdef) -> Any:
    try:
        return parse(schema)
    except KeyError:  # an encoding that rosbags does not know; definitions are not needed here
        return MessageDefinition(MessageDefinitionFormat.NONE, "")


storage_mcap.get_msgdef = _lenient_definition  # else one topic's unknown definition closes the whole mcap file

Storage = Reader | Sqlite3Storage


def open_storage(bag: Bag, stack: contextlib.ExitStack, scratch: Path | None = None) -> list[Storage]:
    """Open each storage file of a bag directly; the readers close with `stack`.

    `scratch` is where file-compressed storage is unpacked (the system's temporary folder if None).

    Raises:
        BagError: a file cannot be opened.
    """
    if bag.problem:
        raise BagError(f"{bag.name}: {bag.problem}")
    readers: list[Storage] = []
    for file in bag.files:
        wal = file.with_name(file.name + "-wal")
        if wal.exists() and wal.stat().st_size:
            raise BagError(
                f"{bag.name}: {wal.name} holds messages that were never merged into {file.name} (the recorder was "
                f"killed); merge them with: sqlite3 {file.name} 'PRAGMA wal_checkpoint(TRUNCATE)'"
            )
        with _storage_errors(bag, file):
            opened = file
            if file.name.endswith(".zstd"):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=scratch, prefix=".unpack-")))
                opened = folder / file.name.removesuffix(".zstd")
                with file.open("rb") as raw, zstd.open(raw, "rb") as unpacked, opened.open("wb") as out:
                    shutil.copyfileobj(unpacked, out, 1 << 20)
            if opened.suffix == ".db3":
                readers.append(stack.enter_context(contextlib.closing(Sqlite3Storage(opened))))
            else:
                readers.append(stack.enter_context(Reader(opened)))
            if not all(isinstance(text, str) for c in readers[-1].connections for text in (c.topic, c.msgtype)):
                raise ValueError("a topic's name or type is not text")
    return readers


@contextlib.contextmanager
def _storage_errors(bag: Bag, file: Path) -> Iterator[None]:
    """Broken files make rosbags, sqlite, zstd and struct raise a dozen exception types; ours is one line."""
    try:
        yield
    except BagError:
        raise
    except MemoryError as exc:
        raise BagError(f"{bag.name}: {file.name} asks for more memory than there is; it is damaged") from exc
    except OSError as exc:
        if exc.errno in DISK_FULL:
            raise SetupError(
                f"data.cache_dir: the disk is full while unpacking {file.name} of {bag.name}; free some space, or set "
                "data.cache_dir to a larger disk (python -m rosbag_dataset unpacks in TMPDIR)"
            ) from exc
        raise BagError(f"{bag.name}: {file.name}: {exc.strerror or exc}") from exc
    except Exception as exc:  # third-party parsers on broken input; the cause is chained and named
        reason = " ".join(str(exc).split()) or type(exc).__name__
        hint = "mcap recover FILE" if ".mcap" in file.name else "sqlite3 FILE .recover"
        raise BagError(
            f"{bag.name}: {file.name} is damaged or not a finished recording ({reason[:200]}); recover it with: "
            f"{hint}, or leave it out with data.on_bad_bag: skip"
        ) from exc


def _messages(bag: Bag, readers: Sequence[Storage], topics: set[str]) -> Iterator[tuple[str, str, int, bytes]]:
    """(topic, message type, receive time in ns, CDR bytes) of the wanted topics, file by file.

    Order within a file is the library's; nothing downstream depends on it.
    """
    for file, reader in zip(bag.files, readers, strict=True):
        connections = [c for c in reader.connections if c.topic in topics]
        if not connections:
            continue
        # An mcap without a chunk index is refused by messages() unless in time order; we sort, so scan it.
        storage = getattr(reader, "storage", None)
        scan = getattr(storage, "messages_scan", None) if not getattr(storage, "chunks", True) else None
        stream = scan(connections) if scan else reader.messages(connections)
        while True:
            with _storage_errors(bag, file):
                item = next(stream, None)
                if item is not None and bag.compression == "message":
                    item = (item[0], item[1], zstd.decompress(item[2]))
            if item is None:
                break
            yield item[0].topic, ros2_type(item[0].msgtype), item[1], item[2]


def ros2_type(name: str) -> str:
    """`sensor_msgs/Image` -> `sensor_msgs/msg/Image`: converted bags carry the legacy spelling."""
    package, _, rest = name.partition("/")
    return name if "/" in rest or not rest else f"{package}/msg/{rest}"


def topics_of(readers: Sequence[Storage]) -> dict[str, tuple[set[str], int]]:
    """topic -> (its message types, number of messages), summed over the storage files."""
    topics: dict[str, tuple[set[str], int]] = {}
    for reader in readers:
        for connection in reader.connections:
            types, count = topics.get(connection.topic, (set(), 0))
            topics[connection.topic] = (types | {ros2_type(connection.msgtype)}, count + connection.msgcount)
    return topics


@functools.lru_cache(maxsize=1)  # it compiles a decoder for each message type that it meets, 10 ms a bag
def typestore_for(ros_distro: str) -> Typestore:
    """Message definitions of a ROS 2 distribution.

    Raises:
        BagError: rosbags does not know that distribution.
    """
    known = {s.value.removeprefix("ros2_"): s for s in Stores if s.value.startswith("ros2_")}
    if ros_distro not in known:
        raise SetupError(f"data.ros_distro: found {ros_distro!r}, expected one of {', '.join(sorted(known))}")
    return get_typestore(known[ros_distro])


def check_topics(bag: Bag, readers: Sequence[Storage], settings: BagSettings) -> None:
    """The wanted topics are there, have the right types, hold messages, and as many as metadata.yaml claims.

    Raises:
        BagError: naming the topic, what was found, and the topics that are there.
    """
    topics = topics_of(readers)
    there = "; ".join(f"{t} ({'/'.join(sorted(types))}, {n})" for t, (types, n) in sorted(topics.items())) or "none"
    wanted = [("data.joint_topic", settings.joint_topic, {JOINT_TYPE})]
    wanted += [(f"data.camera_topics.{c}", t, {IMAGE_TYPE, COMPRESSED_TYPE}) for c, t in settings.camera_topics.items()]
    for key, topic, allowed in wanted:
        expected = " or ".join(sorted(allowed))
        if topic not in topics:
            raise BagError(f"{bag.name}: {key}: no topic {topic}; set it to one of the topics in this bag: {there}")
        types, count = topics[topic]
        if not types <= allowed:
            found = "/".join(sorted(types))
            raise BagError(f"{bag.name}: {key}: topic {topic} has type {found}, expected {expected}; in it: {there}")
        if not count:
            raise BagError(f"{bag.name}: {key}: topic {topic} is declared but holds no message; topics: {there}")
        claimed = count if bag.claimed is None else bag.claimed.get(topic, 0)
        if claimed != count:
            raise BagError(
                f"{bag.name}: metadata.yaml claims {claimed} messages on {topic}, the storage holds {count}; a file is "
                "missing or the recording broke off; copy it again, or accept what is there with: ros2 bag reindex"
            )


ImageSink = Callable[[str, np.ndarray], None]


def read_bag(
    bag: Bag,
    settings: BagSettings,
    sink: ImageSink | None,
    on_message: Callable[[int, int], None] | None = None,
    scratch: Path | None = None,
    on_open: Callable[[dict[str, int]], None] | None = None,
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

    Raises:
        BagError: anything that is wrong with the recording.
    """
    typestore = typestore_for(settings.ros_distro)
    camera_of = {topic: camera for camera, topic in settings.camera_topics.items()}
    joint_times: list[int] = []
    joint_rows: list[np.ndarray] = []
    camera_times: dict[str, list[int]] = {camera: [] for camera in settings.camera_topics}
    shapes: dict[str, tuple[int, int]] = {}
    stored: dict[str, tuple[int, int]] = {}
    columns: dict[tuple[str, ...], list[int]] = {}  # joint names of a message -> where our joints are in it
    read = dict.fromkeys([settings.joint_topic, *camera_of], 0)

    with contextlib.ExitStack() as stack:
        readers = open_storage(bag, stack, scratch)
        check_topics(bag, readers, settings)
        counts = {topic: count for topic, (_, count) in topics_of(readers).items()}
        if on_open:
            on_open({camera: counts[topic] for topic, camera in camera_of.items()})
        for topic, msgtype, receive_ns, raw in _messages(bag, readers, set(read)):
            read[topic] += 1
            where = f"{bag.name}: {topic}, message {read[topic]}"
            try:
                message = typestore.deserialize_cdr(raw, msgtype)
            except Exception as exc:  # rosbags raises several types on short or foreign payloads
                reason = " ".join(str(exc).split())[:120]
                raise BagError(
                    f"{where}: not a valid {msgtype} of ROS 2 {settings.ros_distro} ({type(exc).__name__}: {reason}); "
                    "set data.ros_distro to the one that recorded it, or leave it out with data.on_bad_bag: skip"
                ) from exc
            time_ns = _stamp(message, receive_ns, settings.time_source, where)
            if topic == settings.joint_topic:
                joint_times.append(time_ns)
                joint_rows.append(_joint_positions(message, settings.joint_names, columns, where))
            else:
                camera = camera_of[topic]
                camera_times[camera].append(time_ns)
                image, shape = _image(message, msgtype, settings.image_resize, where, decode=sink is not None)
                if shape is not None and shapes.setdefault(camera, shape) != shape:
                    was, now = shapes[camera], shape
                    raise BagError(f"{where}: image size changes within the bag, from {_hw(was)} to {_hw(now)} (HxW)")
                if image is not None and sink is not None:
                    stored[camera] = image.shape[:2]
                    sink(camera, image)
            if on_message:
                on_message(topic != settings.joint_topic, len(raw))
    for topic, count in read.items():
        if count != counts[topic]:  # what was read against what the storage itself promised
            raise BagError(f"{bag.name}: {topic}: read {count} of {counts[topic]} messages; the storage is damaged")
    return Recording(
        np.array(joint_times, np.int64),
        np.stack(joint_rows),
        {camera: np.array(times, np.int64) for camera, times in camera_times.items()},
        {camera: stored.get(camera, settings.image_resize or shape) for camera, shape in shapes.items()},
        shapes,
    )


def _stamp(message: Any, receive_ns: int, time_source: str, where: str) -> int:
    if time_source == "header":
        stamp = message.header.stamp
        time_ns = stamp.sec * 1_000_000_000 + stamp.nanosec
        if time_ns <= 0:
            raise BagError(f"{where}: header.stamp is {time_ns} ns (never set); use data.time_source: receive")
    else:
        time_ns = receive_ns
    if not 0 <= time_ns < 1 << 62:
        raise BagError(f"{where}: time stamp {time_ns} ns is out of range; the recording is damaged")
    return time_ns


def _joint_positions(
    message: Any, joint_names: tuple[str, ...], columns: dict[tuple[str, ...], list[int]], where: str
) -> np.ndarray:
    """(J,) float64 positions by name: drivers publish joints in an order of their own, and it may change."""
    names = tuple(message.name)
    if names not in columns:
        missing = [n for n in joint_names if n not in names]
        if missing:
            raise BagError(
                f"{where}: joint {', '.join(missing)} is missing; set data.joint_names to names that the message has: "
                f"{', '.join(names) or 'none at all (its name field is empty)'}"
            )
        columns[names] = [names.index(n) for n in joint_names]
    if len(message.position) != len(names):
        raise BagError(f"{where}: {len(names)} joint names but {len(message.position)} positions")
    row = np.asarray(message.position, np.float64)[columns[names]]
    if not np.isfinite(row).all():
        bad = [n for n, v in zip(joint_names, row, strict=True) if not np.isfinite(v)]
        raise BagError(f"{where}: position of {', '.join(bad)} is {row[~np.isfinite(row)][0]}, expected a finite angle")
    return row


# -- images -------------------------------------------------------------------------------------------------------

# encoding -> (dtype, channels, what turns it into 8-bit RGB)
_RAW_ENCODINGS: dict[str, tuple[str, int, Callable[[np.ndarray], np.ndarray]]] = {
    "rgb8": ("u1", 3, lambda a: a),
    "bgr8": ("u1", 3, lambda a: cv2.cvtColor(a, cv2.COLOR_BGR2RGB)),
    "rgba8": ("u1", 4, lambda a: cv2.cvtColor(a, cv2.COLOR_RGBA2RGB)),
    "bgra8": ("u1", 4, lambda a: cv2.cvtColor(a, cv2.COLOR_BGRA2RGB)),
    "mono8": ("u1", 1, lambda a: cv2.cvtColor(a, cv2.COLOR_GRAY2RGB)),
    "mono16": ("u2", 1, lambda a: cv2.cvtColor((a >> 8).astype(np.uint8), cv2.COLOR_GRAY2RGB)),
    "16UC1": ("u2", 1, lambda a: depth_to_rgb(a * np.float32(1e-3))),
    "32FC1": ("f4", 1, lambda a: depth_to_rgb(a)),
}
for _bayer in ("RGGB", "BGGR", "GBRG", "GRBG"):
    _code = getattr(cv2, f"COLOR_Bayer{_bayer}2RGB")
    _RAW_ENCODINGS[f"bayer_{_bayer.lower()}8"] = ("u1", 1, lambda a, c=_code: cv2.cvtColor(a, c))
    _RAW_ENCODINGS[f"bayer_{_bayer.lower()}16"] = (
        "u2", 1, lambda a, c=_code: cv2.cvtColor((a >> 8).astype(np.uint8), c),
    )  # fmt: skip


def depth_to_rgb(depth_m: np.ndarray) -> np.ndarray:
    """(H, W) float depth in metres to (H, W, 3) uint8 grey: DEPTH_M_PER_LEVEL metres per level; nan, inf and
    negative values (no reading) are 0, and everything from 2.55 m on is 255."""
    levels = np.nan_to_num(depth_m / DEPTH_M_PER_LEVEL, nan=0.0, posinf=0.0, neginf=0.0)
    return cv2.cvtColor(np.clip(np.rint(levels), 0, 255).astype(np.uint8), cv2.COLOR_GRAY2RGB)


def resize_image(image: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """(H, W, 3) uint8 to `size` = (H, W), as RESIZE_INTERPOLATION says; unchanged when `size` is None."""
    if size is None or image.shape[:2] == size:
        return image
    shrinks = size[0] <= image.shape[0] and size[1] <= image.shape[1]
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def decode_image(message: Any, msgtype: str, where: str = "image") -> np.ndarray:
    """A sensor_msgs Image or CompressedImage as (H, W, 3) uint8 RGB.

    Raises:
        BagError: unknown encoding, wrong sizes, a short payload, a compressed image that does not decode.
    """
    image, _ = _image(message, msgtype, None, where, decode=True)
    assert image is not None
    return image


def _image(
    message: Any, msgtype: str, resize: tuple[int, int] | None, where: str, decode: bool
) -> tuple[np.ndarray | None, tuple[int, int] | None]:
    """-> (resized RGB or None, recorded (H, W) or None if it takes decoding to know)."""
    if msgtype == COMPRESSED_TYPE:
        if not decode:
            return None, None
        image = _decompress(message, where)
        return resize_image(image, resize), image.shape[:2]
    if message.encoding not in _RAW_ENCODINGS:
        raise BagError(f"{where}: image encoding {message.encoding!r} is not one of {', '.join(_RAW_ENCODINGS)}")
    code, channels, to_rgb = _RAW_ENCODINGS[message.encoding]
    dtype = np.dtype(code).newbyteorder(">" if message.is_bigendian else "<")
    height, width, step, data = message.height, message.width, message.step, message.data
    row = width * channels * dtype.itemsize
    if not height or not width or step < row:
        raise BagError(
            f"{where}: {message.encoding} image of {height}x{width} (HxW) with a step of {step} bytes, "
            f"expected at least {row}"
        )
    needed = step * (height - 1) + row  # the last row needs no padding
    if data.size < needed:
        raise BagError(
            f"{where}: image payload is {data.size} bytes, its header says {height}x{width} {message.encoding} "
            f"with step {step}: at least {needed}"
        )
    if not decode:
        return None, (height, width)
    strides = (step, channels * dtype.itemsize, dtype.itemsize)
    pixels = np.ndarray((height, width, channels), dtype, data, strides=strides)
    if not dtype.isnative:
        pixels = pixels.astype(dtype.newbyteorder("="))
    pixels = np.ascontiguousarray(pixels if channels > 1 else pixels[..., 0])
    if message.encoding in ("rgb8", "bgr8"):  # plain colour: resize first, there are fewer pixels to swap
        return to_rgb(resize_image(pixels, resize)), (height, width)
    return resize_image(to_rgb(pixels), resize), (height, width)


def _decompress(message: Any, where: str) -> np.ndarray:
    """JPEG or PNG payload to (H, W, 3) uint8 RGB. EXIF rotation is ignored: a robot's camera does not turn."""
    kind = message.format
    if "compressedDepth" in kind:
        raise BagError(f"{where}: format {kind!r} (compressed depth) is not supported; record the raw depth topic")
    data = np.asarray(message.data, np.uint8)
    if data[:2].tobytes() == b"\xff\xd8" and b"\xff\xd9" not in data[-64:].tobytes():
        raise BagError(f"{where}: the JPEG breaks off after {data.size} bytes (no end marker)")
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    except cv2.error:  # an absurd size in a damaged header
        pixels = None
    if pixels is None:
        raise BagError(f"{where}: {data.size} bytes with format {kind!r} do not decode as JPEG or PNG")
    if pixels.dtype == np.uint16 and pixels.ndim == 2 and kind.startswith(("16UC1", "mono16")):
        return _RAW_ENCODINGS["16UC1" if kind.startswith("16UC1") else "mono16"][2](pixels)
    if pixels.dtype != np.uint8:
        raise BagError(f"{where}: {pixels.dtype} pixels with format {kind!r}; expected 8-bit colour, 16UC1 or mono16")
    if pixels.ndim == 2:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    return cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB if pixels.shape[2] == 4 else cv2.COLOR_BGR2RGB)


def _hw(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


# -- the cache on disk --------------------------------------------------------------------------------------------


def cache_key(bag: Bag, identity: str, settings: BagSettings) -> str:
    """Names a cache entry: the bag's bytes and name, and every setting that changes stored pixels or times."""
    parts = {
        "version": CACHE_VERSION,
        "name": bag.name,
        "identity": identity,
        "joint_topic": settings.joint_topic,
        "camera_topics": settings.camera_topics,
        "joint_names": settings.joint_names,
        "time_source": settings.time_source,
        "ros_distro": settings.ros_distro,
        "image_resize": settings.image_resize,
        "interpolation": RESIZE_INTERPOLATION,
        "depth_m_per_level": DEPTH_M_PER_LEVEL,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _pixels_file(camera: str) -> str:
    return f"{camera}.rgb"


def build_entry(
    bag: Bag, key: str, settings: BagSettings, on_message: Callable[[int, int], None] | None = None
) -> None:
    """Decode one bag into `cache_dir/key`, atomically; safe when other processes build the same entry.

    Whoever comes second waits for the lock and finds the entry done. An entry that is damaged is made again.

    Raises:
        BagError: a bad recording, or a disk that is full (nothing half-written stays behind).
    """
    cache_dir, entry = settings.cache_dir, settings.cache_dir / key
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with (cache_dir / f"{key}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that is caching {bag.name}", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                load_entry(entry, list(settings.camera_topics))
                return
            except EntryError as fault:
                if entry.exists():
                    print(f"frame cache: {fault}; decoding {bag.name} again", file=sys.stderr, flush=True)
            building = cache_dir / f".{key}.{os.getpid()}"
            # A killed process may have had this id, as is usual in containers.
            shutil.rmtree(building, ignore_errors=True)
            try:
                building.mkdir()
                _write_entry(bag, building, settings, on_message)
                shutil.rmtree(entry, ignore_errors=True)
                os.rename(building, entry)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except OSError as exc:
        if exc.errno in DISK_FULL:
            raise SetupError(
                f"data.cache_dir: {cache_dir}: the disk is full while caching {bag.name}; free some space, set "
                "data.cache_dir to a larger disk, or store smaller frames with conventions.image_resize"
            ) from exc
        raise SetupError(
            f"data.cache_dir: {cache_dir}: cannot write the frame cache there ({exc.strerror or exc})"
        ) from exc


def clean_cache(cache_dir: Path) -> None:
    """Remove half-made entries of processes that were killed: those whose lock nobody holds any more."""
    for leftover in cache_dir.glob(".*.*"):
        with (
            (cache_dir / f"{leftover.name.split('.')[1]}.lock").open("w") as lock,
            contextlib.suppress(BlockingIOError),
        ):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)


def _write_entry(
    bag: Bag, building: Path, settings: BagSettings, on_message: Callable[[int, int], None] | None
) -> None:
    expected: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}

        def sink(camera: str, image: np.ndarray) -> None:
            if camera not in files:
                files[camera] = stack.enter_context((building / _pixels_file(camera)).open("wb"))
                if hasattr(os, "posix_fallocate"):  # a disk that is too small says so at once, not after an hour
                    os.posix_fallocate(files[camera].fileno(), 0, expected[camera] * image.nbytes)
            files[camera].write(memoryview(np.ascontiguousarray(image)).cast("B"))

        recording = read_bag(bag, settings, sink, on_message, scratch=building, on_open=expected.update)
    _save(building / "joint_time_ns.npy", recording.joint_time_ns)
    _save(building / "joint_rad.npy", recording.joint_rad)
    for camera, times in recording.camera_time_ns.items():
        _save(building / f"{camera}.time_ns.npy", times)
    meta = {"bag": bag.name, "image_shape": recording.image_shape, "source_shape": recording.source_shape}
    _save(building / "meta.json", json.dumps(meta).encode())
    for file in building.iterdir():  # all written before the first is flushed: the others then hardly wait
        _flush(file)


def _save(path: Path, content: np.ndarray | bytes) -> None:
    """np.save to a file says neither why nor errno when the disk is full."""
    if isinstance(content, np.ndarray):
        buffer = io.BytesIO()
        np.save(buffer, content)
        content = buffer.getvalue()
    path.write_bytes(content)


def _flush(path: Path) -> None:
    """To the disk for good: after a power failure a file that was only written may be zeros, black frames."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


class EntryError(Exception):
    """A cache entry that is not there, or not whole: what is missing or cut short."""


def load_entry(entry: Path, cameras: Sequence[str]) -> Recording:
    """Read a cache entry's times and joints (pixels stay on disk).

    Raises:
        EntryError: it is not whole. Of pixels the size alone is looked at.
    """
    try:
        meta = json.loads((entry / "meta.json").read_text())
        recording = Recording(
            np.load(entry / "joint_time_ns.npy"),
            np.load(entry / "joint_rad.npy"),
            {camera: np.load(entry / f"{camera}.time_ns.npy") for camera in cameras},
            {camera: tuple(meta["image_shape"][camera]) for camera in cameras},
            {camera: tuple(meta["source_shape"][camera]) for camera in cameras},
        )
        for camera, (height, width) in recording.image_shape.items():
            file, expected = entry / _pixels_file(camera), len(recording.camera_time_ns[camera]) * height * width * 3
            if (size := file.stat().st_size) < expected:
                raise EntryError(f"{file}: {size} bytes, expected {expected}")
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise EntryError(f"{entry}: {' '.join(str(error).split()) or type(error).__name__}") from error
    return recording


# -- synchronisation ----------------------------------------------------------------------------------------------


@dataclass
class Episode:
    """One recording on a regular time grid. T kept frames, J joints.

    Kept frames are contiguous inside a segment; segments are where frames had to be dropped in between, and neither
    an action nor a chunk crosses them. Frame t's action leads to frame t+1, so that a segment's last frame has none.
    """

    name: str
    time_ns: np.ndarray  # (T,) int64 tick times
    state: np.ndarray  # (T, J) float32, rad for revolute joints
    action: np.ndarray  # (T, J) float32; zeros where frame t has no action
    segments: np.ndarray  # (S, 2) int64: [start, stop) of each segment in 0..T
    image_index: dict[str, np.ndarray]  # camera -> (T,) int64, which stored image a frame shows
    report: dict[str, Any]
    entry: Path | None = None  # cache entry that holds the pixels
    image_shape: dict[str, tuple[int, int]] = field(default_factory=dict)  # camera -> (H, W) as stored
    source_shape: dict[str, tuple[int, int]] = field(default_factory=dict)  # camera -> (H, W) as recorded
    stored_images: dict[str, int] = field(default_factory=dict)  # camera -> number of images in the entry
    content: str = ""  # hash of the bag's bytes; two bags with the same one are copies

    @property
    def action_stop(self) -> np.ndarray:
        """(T,) int64: for each frame the index behind the last action of its segment; == t where t has none."""
        stop = np.empty(len(self.time_ns), np.int64)
        for first, last in self.segments:
            stop[first:last] = last - 1
        return stop


def wrap_to_pi(angle_rad: np.ndarray) -> np.ndarray:
    """Angles to (-pi, pi]."""
    wrapped = np.pi - np.mod(np.pi - angle_rad, 2 * np.pi)
    return np.where(wrapped <= -np.pi, np.pi, wrapped)  # mod rounds up to 2 pi for an angle just above pi


def nearest_index(times_ns: np.ndarray, ticks_ns: np.ndarray) -> np.ndarray:
    """For each tick the index of the nearest of the sorted `times_ns` (N >= 1); the earlier one on a tie."""
    right = np.clip(np.searchsorted(times_ns, ticks_ns), 0, len(times_ns) - 1)
    left = np.maximum(right - 1, 0)
    return np.where(ticks_ns - times_ns[left] <= np.abs(times_ns[right] - ticks_ns), left, right)


def synchronise(name: str, recording: Recording, settings: BagSettings) -> Episode:
    """Put a recording on a grid of `fps`, drop frames that lack a sample, and cut it into segments.

    The grid covers the time in which every topic was being recorded and starts on an image of the first camera.
    Images are taken by nearest neighbour; joints are interpolated linearly (or nearest), after putting them in time
    order. Joint conventions (sign, wrapping) are applied here.

    Raises:
        BagError: topics that do not overlap in time, broken time stamps, no joint that moves, no frame left.
    """
    tick_ns = 1e9 / settings.fps
    order = np.argsort(recording.joint_time_ns, kind="stable")
    joint_ns, joint_rad = recording.joint_time_ns[order], recording.joint_rad[order]
    last_of_equal = np.append(joint_ns[1:] != joint_ns[:-1], True)
    joint_ns, joint_rad = joint_ns[last_of_equal], joint_rad[last_of_equal]
    camera_order = {c: np.argsort(t, kind="stable") for c, t in recording.camera_time_ns.items()}
    camera_ns = {c: t[camera_order[c]] for c, t in recording.camera_time_ns.items()}

    streams = {settings.joint_topic: joint_ns} | {settings.camera_topics[c]: t for c, t in camera_ns.items()}
    begin, end = max(t[0] for t in streams.values()), min(t[-1] for t in streams.values())
    if end < begin:
        spans = "; ".join(f"{topic} {t[0] / 1e9:.3f} to {t[-1] / 1e9:.3f} s" for topic, t in streams.items())
        raise BagError(f"{name}: the topics do not overlap in time: {spans}; see data.time_source")
    if (end - begin) / 1e9 > MAX_EPISODE_S:
        raise BagError(
            f"{name}: spans {(end - begin) / 1e9:.0f} s, more than a day; its time stamps are broken, "
            "see data.time_source"
        )
    first_camera = next(iter(camera_ns.values()))
    begin = first_camera[np.searchsorted(first_camera, begin)]  # exists: the camera's last image is at or after `end`
    count = int(max(0, end - begin) / tick_ns + 1e-6) + 1  # stamps are rounded to ns: keep a tick that ends on `end`
    ticks = begin + np.rint(np.arange(count) * tick_ns).astype(np.int64)

    index = {c: nearest_index(t, ticks) for c, t in camera_ns.items()}
    offset_ms = {settings.joint_topic: np.abs(joint_ns[nearest_index(joint_ns, ticks)] - ticks) / 1e6}
    for camera, i in index.items():
        offset_ms[settings.camera_topics[camera]] = np.abs(camera_ns[camera][i] - ticks) / 1e6
    kept = np.all([o <= settings.max_offset_ms for o in offset_ms.values()], axis=0)
    if not kept.any():
        worst = ", ".join(f"{t} {np.median(o):.1f} ms" for t, o in offset_ms.items())
        raise BagError(
            f"{name}: no frame has every topic within data.max_offset_ms {settings.max_offset_ms:g}; "
            f"median offsets: {worst}"
        )
    moved = np.ptp(joint_rad, axis=0) >= MOVED_RAD
    if not moved.any():
        raise BagError(
            f"{name}: no joint moves by more than {MOVED_RAD:g} rad in the whole recording; "
            f"is {settings.joint_topic} the live robot?"
        )

    state, continuous = _resample_joints(joint_ns, joint_rad, ticks[kept], settings)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], kept.view(np.int8), [0]))))
    positions = np.cumsum(kept)  # kept frames up to and including each tick
    segments = np.array([(positions[a] - 1, positions[b - 1]) for a, b in edges.reshape(-1, 2)], np.int64)
    action = _actions(state, continuous, segments, settings)
    image_index = {c: camera_order[c][i[kept]] for c, i in index.items()}

    speed = np.abs(np.diff(joint_rad, axis=0)).max(axis=1) / (np.diff(joint_ns) / 1e9) if len(joint_ns) > 1 else [0.0]
    step_s = np.diff(joint_ns) / 1e9 if len(joint_ns) > 1 else [1.0]
    report = {
        "episode": name,
        "duration_s": round(max(0, end - begin) / 1e9, 3),
        "image_size": {c: list(shape) for c, shape in recording.image_shape.items()},
        "frames": int(kept.sum()),
        "dropped": int((~kept).sum()),
        "segments": len(segments),
        "frames_without_action": len(segments),
        "repeated_images": {
            c: int(sum((np.diff(i[a:b]) == 0).sum() for a, b in segments)) for c, i in image_index.items()
        },
        "unused_images": {c: int(len(camera_ns[c]) - len(np.unique(i))) for c, i in image_index.items()},
        "topics": {
            topic: {
                "messages": len(times),
                "rate_hz": round((len(times) - 1) * 1e9 / max(1, int(times[-1] - times[0])), 2),
                "offset_ms_median": round(float(np.median(offset_ms[topic])), 2),
                "offset_ms_worst": round(float(offset_ms[topic].max()), 2),
                "starts_s": round((times[0] - begin) / 1e9, 3),
                "ends_s": round((times[-1] - end) / 1e9, 3),
            }
            for topic, times in streams.items()
        },
        "joints_never_moved": [n for n, m in zip(settings.joint_names, moved, strict=True) if not m],
        "still_share": round(float(np.average(np.asarray(speed) < STILL_RAD_PER_S, weights=step_s)), 3),
    }
    return Episode(
        name, ticks[kept], state.astype(np.float32), action.astype(np.float32), segments, image_index, report,
        image_shape=recording.image_shape, source_shape=recording.source_shape,
        stored_images={c: len(t) for c, t in camera_ns.items()},
    )  # fmt: skip


def _resample_joints(
    joint_ns: np.ndarray, joint_rad: np.ndarray, ticks_ns: np.ndarray, settings: BagSettings
) -> tuple[np.ndarray, np.ndarray]:
    """(T, J) float64 joint positions at the ticks, with the project's sign applied: -> (wrapped when `wrap_angles`,
    unwrapped along the recording's own samples, which also know the turns made inside a gap)."""
    revolute = settings.revolute

    def at_ticks(path: np.ndarray) -> np.ndarray:
        if settings.joint_resample == "linear":
            elapsed, wanted = (joint_ns - joint_ns[0]).astype(np.float64), (ticks_ns - joint_ns[0]).astype(np.float64)
            state = np.stack([np.interp(wanted, elapsed, column) for column in path.T], axis=1)
        else:
            state = path[nearest_index(joint_ns, ticks_ns)]
        return state * np.asarray(settings.joint_sign, np.float64) if settings.apply_joint_sign else state

    path = joint_rad.copy()
    path[:, revolute] = np.unwrap(path[:, revolute], axis=0)
    continuous = at_ticks(path)  # interpolated on the continuous path, so that no value lies between +pi and -pi
    if not settings.wrap_angles:
        return at_ticks(joint_rad), continuous
    state = continuous.copy()
    state[:, revolute] = wrap_to_pi(state[:, revolute])
    return state, continuous


def _actions(state: np.ndarray, continuous: np.ndarray, segments: np.ndarray, settings: BagSettings) -> np.ndarray:
    """(T, J) float64: q[t+1] - q[t], or q[t+1] unwrapped along the episode; zeros at each segment's last frame."""
    action = np.zeros_like(state)
    revolute = settings.revolute
    target = continuous + (state[0] - continuous[0])  # whole turns: the first frame is where its state says
    for start, stop in segments:
        if settings.action_mode == "absolute":
            action[start : stop - 1] = target[start + 1 : stop]
        else:
            delta = np.diff(state[start:stop], axis=0)
            if settings.wrap_angles:
                delta[:, revolute] = wrap_to_pi(delta[:, revolute])
            action[start : stop - 1] = delta
    return action


# -- a folder of bags ---------------------------------------------------------------------------------------------


def load_episodes(
    settings: BagSettings, workers: int = 0, progress: bool = True
) -> tuple[list[Episode], list[dict[str, str]]]:
    """All episodes below `bag_dir`, from the cache where it has them, else decoded first (in parallel over bags).

    Args:
        settings: where and how.
        workers: processes that decode bags; 0 means what keeps the cores busy, at most one per bag.
        progress: show a progress bar while decoding.

    Returns:
        (episodes sorted by name, skipped bags as {"bag", "why"}; empty unless on_bad_bag is "skip").

    Raises:
        BagError: no bags, or a bad one with on_bad_bag "error".
    """
    bags = find_bags(settings.bag_dir)
    skipped: list[dict[str, str]] = []
    stop_early = settings.on_bad_bag != "skip"

    def bad(bag: Bag, error: BagError) -> None:
        if stop_early or isinstance(error, SetupError):
            raise error
        print(f"skipped bag {error}", file=sys.stderr, flush=True)
        skipped.append({"bag": bag.name, "why": str(error)})

    contents, keys = {}, {}
    failed: dict[str, BagError] = {}
    for bag in bags:
        try:
            with _storage_errors(bag, bag.path):
                contents[bag.name] = bag.identity()
            keys[bag.name] = cache_key(bag, contents[bag.name], settings)
        except BagError as error:
            failed[bag.name] = error
    todo = [
        bag for bag in bags if bag.name in keys and not (settings.cache_dir / keys[bag.name] / "meta.json").exists()
    ]
    if not (failed and stop_early):
        failed |= {b.name: e for b, e in _build_entries(todo, keys, settings, workers, progress, stop_early)}
    if failed and stop_early:  # bags before this one may have been left undone
        raise next(iter(failed.values()))

    episodes: list[Episode] = []
    cameras = list(settings.camera_topics)
    for bag in bags:
        try:
            if bag.name in failed:
                raise failed[bag.name]
            entry = settings.cache_dir / keys[bag.name]
            try:
                recording = load_entry(entry, cameras)
            except EntryError:
                build_entry(bag, keys[bag.name], settings)
                recording = load_entry(entry, cameras)
            episode = synchronise(bag.name, recording, settings)
            if episodes:
                _check_same_size(bag.name, episode.image_shape, episodes[0].name, episodes[0].image_shape)
        except BagError as error:
            bad(bag, error)
            continue
        episode.entry, episode.content = entry, contents[bag.name]
        twin = next((e.name for e in episodes if e.content == episode.content), "")
        episode.report["same_bytes_as"] = twin
        episodes.append(episode)
    if not episodes:
        raise BagError(
            f"data.bag_dir: {settings.bag_dir}: all {len(bags)} bags were skipped; the first: {skipped[0]['why']}"
        )
    return episodes, skipped


Shapes = dict[str, tuple[int, int]]  # camera -> (H, W)


def _check_same_size(name: str, shapes: Shapes, first_name: str, first_shapes: Shapes) -> None:
    for camera in shapes:
        if camera in first_shapes and shapes[camera] != first_shapes[camera]:
            raise BagError(
                f"{name}: images of {camera} are {_hw(shapes[camera])}, those of {first_name} are "
                f"{_hw(first_shapes[camera])} (HxW); set conventions.image_resize: [H, W] to bring all to one size"
            )


STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_counters: Any = None  # (images, bytes) shared with the decoding processes


@contextlib.contextmanager
def hold_signals() -> Iterator[Callable[[], None]]:
    """Hold back SIGINT and SIGTERM; -> a function that lets those that have come be answered, at a place fit for it.

    A handler that raises in the middle of concurrent.futures leaves locks taken that its threads then wait for, for
    ever; in the middle of a fork it raises in the child. A signal mask is not enough: the main thread answers also
    what another thread has received. (Outside the main thread there is nothing to hold: handlers do not run there.)
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def hold() -> None:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                previous[number] = signal.signal(number, lambda number, frame: received.append(number))

    def release() -> None:
        while previous:
            signal.signal(*previous.popitem())
        while received:
            signal.raise_signal(received.pop(0))

    def answer() -> None:
        if received:
            release()
            hold()

    hold()
    try:
        yield answer
    finally:
        release()


def _start_worker(counters: Any) -> None:
    global _counters
    _counters = counters
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; it terminates us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A pool's process waits for work for ever when the process that would give it is killed."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _count(images: int, size: int) -> None:
    if _counters is not None:
        with _counters.get_lock():
            _counters[0] += images
            _counters[1] += size


def _build_one(bag: Bag, key: str, settings: BagSettings) -> BagError | None:
    try:
        build_entry(bag, key, settings, _count)
    except BagError as error:
        return type(error)(str(error))  # without its cause, which may not survive the trip between processes
    return None


def _decoding_processes() -> int:
    """One per core that this process may use, and a few more: each waits for the disk when it flushes an entry."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + max(1, cores // 4)


def _build_entries(
    todo: Sequence[Bag], keys: dict[str, str], settings: BagSettings, workers: int, progress: bool, stop_early: bool
) -> list[tuple[Bag, BagError]]:
    """Decode the bags that are not cached yet; -> those that failed (only the first, when `stop_early`)."""
    if not todo:
        return []
    clean_cache(settings.cache_dir)
    typestore_for(settings.ros_distro)  # the processes inherit it
    workers = min(workers or _decoding_processes(), len(todo))
    total = sum((bag.claimed or {}).get(topic, 0) for bag in todo for topic in settings.camera_topics.values())
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None  # spawn would import torch again
    context = multiprocessing.get_context(method)
    counters = context.Array("q", [0, 0])
    failed: list[tuple[Bag, BagError]] = []
    bar = tqdm(
        total=total or None, desc=f"decoding {len(todo)} bags", unit="frame", disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    )  # fmt: skip
    opencv_threads = cv2.getNumThreads()
    # One bag per core is the parallelism. Set before forking: OpenCV's thread pool does not survive a fork, and a
    # child that touches it (even to switch it off) waits for threads that are not there.
    cv2.setNumThreads(1)
    with hold_signals() as answer, bar, ProcessPoolExecutor(workers, context, _start_worker, (counters,)) as pool:
        pending: set[Future] = set()
        allowed = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # for the children, until they are ready
        try:
            bag_of: dict[Future, Bag] = {pool.submit(_build_one, b, keys[b.name], settings): b for b in todo}
            pending = set(bag_of)
            signal.pthread_sigmask(signal.SIG_SETMASK, allowed)
            while pending and not (failed and stop_early):
                done, pending = wait(pending, timeout=0.25, return_when=FIRST_COMPLETED)
                answer()
                images, size = counters.get_obj()  # without the lock: a process that was killed may have had it
                bar.n = images
                rate = bar.format_dict["rate"] or (images / max(1e-9, bar.format_dict["elapsed"]))
                bar.set_postfix_str(f"{rate * size / 1e6 / max(1, images):.0f} MB/s, {size / 1e6:.0f} MB")
                for future in done:
                    error = future.result()
                    if error is not None:
                        failed.append((bag_of[future], error))
        except BrokenProcessPool:
            raise BagError(
                "data.bag_dir: a process that decodes bags was killed, most likely for want of memory; "
                "free some and start again (the bags that were finished stay cached)"
            ) from None
        finally:
            if pending:
                # Asked to stop, or a bag is bad: do not wait for those half decoded, whose entries are discarded.
                # The pool fails the futures that are left. Up to Python 3.11 its thread dies with a traceback on one
                # that was cancelled: nothing here may cancel them, so that a stop stays one line.
                for process in list(pool._processes.values()):
                    process.terminate()
            signal.pthread_sigmask(signal.SIG_SETMASK, allowed)
            cv2.setNumThreads(opencv_threads)
    return failed


def split_episodes(episodes: Sequence[Episode], val_fraction: float, seed: int) -> tuple[list[Episode], list[Episode]]:
    """Hold out whole episodes: -> (training, validation), each in order.

    At least one is held out when there are five or more and `val_fraction` > 0; copies of the same recording stay on
    the same side, so that none leaks into validation. The choice depends on the names and the seed alone.
    """
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(episode.content or episode.name, []).append(episode)
    wanted = round(len(groups) * val_fraction)
    if val_fraction > 0 and len(groups) >= 5:
        wanted = max(1, wanted)
    wanted = min(wanted, len(groups) - 1)  # training needs one
    shuffled = np.random.default_rng(seed).permutation(len(groups))
    held_out = {e.name for i in shuffled[: max(0, wanted)] for e in list(groups.values())[i]}
    return [e for e in episodes if e.name not in held_out], [e for e in episodes if e.name in held_out]


# -- statistics ---------------------------------------------------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Moments = tuple[int, np.ndarray, np.ndarray]  # count, mean, sum of squared deviations


def _merge(a: Moments | None, b: Moments) -> Moments:
    """Combine two sets' moments (Chan, Golub & LeVeque 1979, eq. 2.1), so that statistics stream over episodes."""
    if a is None:
        return b
    n = a[0] + b[0]
    shift = b[1] - a[1]
    return n, a[1] + shift * (b[0] / n), a[2] + b[2] + shift**2 * (a[0] * b[0] / n)


def _moments(rows: np.ndarray) -> Moments:
    rows = rows.astype(np.float64)
    mean = rows.mean(axis=0)
    return len(rows), mean, ((rows - mean) ** 2).sum(axis=0)


def compute_stats(
    episodes: Sequence[Episode], image_stats: str, action_mode: str
) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Mean and standard deviation of the training episodes, for normalisation.

    State: every kept frame. Action: every frame that has one. Images: ImageNet's, or per channel over every stored
    frame of each camera, in [0, 1] ("dataset"; computed once per cache entry and kept beside it).

    Returns:
        (stats {feature: {"mean", "std"}} float32 with shapes (J,) or (3, 1, 1),
         one line per joint whose deviation was raised to its floor).

    Raises:
        BagError: no episode has two consecutive frames, so that there is no action to learn.
    """
    state = action = None
    images: dict[str, Moments | None] = dict.fromkeys(episodes[0].image_shape)
    for episode in episodes:
        state = _merge(state, _moments(episode.state))
        has_action = np.arange(len(episode.time_ns)) < episode.action_stop
        if has_action.any():
            action = _merge(action, _moments(episode.action[has_action]))
        if image_stats == "dataset":
            for camera in images:
                images[camera] = _merge(images[camera], _image_moments(episode, camera))
    if action is None:
        raise BagError(
            "no episode has two consecutive frames, so that there is no action to learn; see data.max_offset_ms"
        )
    floored: list[str] = []

    def finish(key: str, moments: Moments, floor: float) -> dict[str, np.ndarray]:
        std = np.sqrt(moments[2] / moments[0])
        for j in np.flatnonzero(std < floor):
            floored.append(f"{key}[{j}]: standard deviation {std[j]:.2g} raised to its floor {floor:g} rad")
        return {"mean": moments[1].astype(np.float32), "std": np.maximum(std, floor).astype(np.float32)}

    action_floor = DELTA_STD_FLOOR_RAD if action_mode == "delta" else POSITION_STD_FLOOR_RAD
    stats = {
        "observation.state": finish("observation.state", state, POSITION_STD_FLOOR_RAD),
        "action": finish("action", action, action_floor),
    }
    for camera, moments in images.items():
        if moments is None:
            mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
        else:
            mean, std = moments[1], np.maximum(np.sqrt(moments[2] / moments[0]), 1 / 255)
        stats[f"observation.images.{camera}"] = {
            "mean": mean.astype(np.float32).reshape(3, 1, 1),
            "std": std.astype(np.float32).reshape(3, 1, 1),
        }
    return stats, floored


def _image_moments(episode: Episode, camera: str) -> Moments:
    """Per-channel moments in [0, 1] over an episode's stored images; kept in the cache entry after the first time."""
    assert episode.entry is not None
    file = episode.entry / f"{camera}.moments.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # not there yet, or damaged: computed again
        count, mean, squares = json.loads(file.read_text())
        return count, np.array(mean), np.array(squares)
    moments: Moments | None = None
    for image in open_pixels(episode, camera):
        moments = _merge(moments, _moments(image.reshape(-1, 3) / np.float32(255)))
    assert moments is not None
    partial = file.with_suffix(f".{os.getpid()}")
    try:
        _save(partial, json.dumps([moments[0], moments[1].tolist(), moments[2].tolist()]).encode())
        _flush(partial)
        os.replace(partial, file)
    except OSError:  # a full disk: they are computed again next time
        partial.unlink(missing_ok=True)
    return moments


def open_pixels(episode: Episode, camera: str) -> np.ndarray:
    """(N, H, W, 3) uint8 memory map of an episode's stored images, in file order (see Episode.image_index)."""
    assert episode.entry is not None
    shape = (episode.stored_images[camera], *episode.image_shape[camera], 3)
    return np.memmap(episode.entry / _pixels_file(camera), np.uint8, "r", shape=shape)


# -- samples ------------------------------------------------------------------------------------------------------


class ChunkDataset:
    """Samples for ACT: one per frame that has an action. A torch map-style dataset that returns whole batches.

    `__getitems__(indices)` gives, for a batch of B:
        observation.state            (B, J) float32, raw (rad)
        observation.images.<camera>  (B, H, W, 3) uint8: copied out of the memory map, nothing else
        action                       (B, chunk, J) float32, raw; zeros where padded
        action_is_pad                (B, chunk) bool: past the segment's end
        index                        (B,) int64 sample indices, to say which sample made trouble

    With `images` False, for frames that live on the device, instead of the images
        image_index.<camera>         (B,) int64 among all stored images of the episodes, one episode after the other
    """

    def __init__(self, episodes: Sequence[Episode], chunk_size: int, images: bool = True) -> None:
        self.episodes = list(episodes)
        self.images = images
        self.chunk_size = chunk_size
        stops = [episode.action_stop for episode in self.episodes]
        frames = [np.flatnonzero(np.arange(len(stop)) < stop) for stop in stops]
        self._episode_of = np.repeat(np.arange(len(frames)), [len(f) for f in frames])
        self._frame_of = np.concatenate(frames) if frames else np.zeros(0, np.int64)
        self._stop_of = np.concatenate([s[f] for s, f in zip(stops, frames, strict=True)]) if frames else self._frame_of
        cameras = self.episodes[0].image_shape if self.episodes else ()
        self._first_image = {c: np.cumsum([0, *(e.stored_images[c] for e in self.episodes)]) for c in cameras}
        self._pixels: dict[tuple[int, str], np.ndarray] = {}
        self._allow_open_files()

    def _allow_open_files(self) -> None:
        """A memory map holds a file descriptor; a thousand episodes pass the usual soft limit of 1024."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = 512 + sum(len(e.image_shape) for e in self.episodes)
        if soft != resource.RLIM_INFINITY and soft < needed:
            limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": {}}  # a worker maps the files itself; pixels are never pickled

    def __len__(self) -> int:
        return len(self._frame_of)

    def locate(self, index: int) -> tuple[str, int]:
        """-> (episode name, frame in it) of a sample."""
        return self.episodes[self._episode_of[index]].name, int(self._frame_of[index])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        batch_size, joints = len(indices), self.episodes[0].state.shape[1]
        batch = {
            "observation.state": np.empty((batch_size, joints), np.float32),
            "action": np.zeros((batch_size, self.chunk_size, joints), np.float32),
            "action_is_pad": np.ones((batch_size, self.chunk_size), bool),
            "index": np.asarray(indices, np.int64),
        }
        for camera, shape in self.episodes[0].image_shape.items():
            if self.images:
                batch[f"observation.images.{camera}"] = np.empty((batch_size, *shape, 3), np.uint8)
            else:
                batch[f"image_index.{camera}"] = np.empty(batch_size, np.int64)
        for b, i in enumerate(indices):
            e, t = int(self._episode_of[i]), int(self._frame_of[i])
            episode = self.episodes[e]
            count = min(self.chunk_size, int(self._stop_of[i]) - t)
            batch["observation.state"][b] = episode.state[t]
            batch["action"][b, :count] = episode.action[t : t + count]
            batch["action_is_pad"][b, :count] = False
            for camera in episode.image_shape:
                image = episode.image_index[camera][t]
                if self.images:
                    if (e, camera) not in self._pixels:
                        self._pixels[e, camera] = open_pixels(episode, camera)
                    batch[f"observation.images.{camera}"][b] = self._pixels[e, camera][image]
                else:
                    batch[f"image_index.{camera}"][b] = self._first_image[camera][e] + image
        return batch


# -- the sync report ----------------------------------------------------------------------------------------------


def report_table(reports: Sequence[dict[str, Any]], limit: int = 40) -> str:
    """The sync report as text: one row an episode (the first `limit`), then what a person should know of all."""
    rows = [
        (
            "episode",
            "s",
            "frames",
            "dropped",
            "segm.",
            "repeated",
            "unused",
            "camera Hz",
            "joint Hz",
            "worst ms",
            "still",
        )
    ]
    for report in reports[:limit]:
        joint, *cameras = report["topics"].values()
        rows.append((
            report["episode"], f"{report['duration_s']:.1f}", str(report["frames"]), str(report["dropped"]),
            str(report["segments"]), str(sum(report["repeated_images"].values())),
            str(sum(report["unused_images"].values())), "/".join(f"{c['rate_hz']:.1f}" for c in cameras),
            f"{joint['rate_hz']:.1f}", "/".join(f"{t['offset_ms_worst']:.0f}" for t in (joint, *cameras)),
            f"{report['still_share']:.0%}",
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    if len(reports) > limit:
        lines.append(f"... and {len(reports) - limit} more episodes")
    frames, dropped = sum(r["frames"] for r in reports), sum(r["dropped"] for r in reports)
    segments = sum(r["segments"] for r in reports)
    lines.append(f"{len(reports)} episodes, {frames} frames kept, {dropped} dropped, {segments} segments")
    for report in reports:
        if report["joints_never_moved"]:
            lines.append(f"note: {report['episode']}: never moved: {', '.join(report['joints_never_moved'])}")
        if report.get("same_bytes_as"):
            lines.append(
                f"note: {report['episode']} has the same bytes as {report['same_bytes_as']}: both are kept on the same "
                "side of the training/validation split; delete one"
            )
    return "\n".join(lines)


# -- python -m rosbag_dataset -------------------------------------------------------------------------------------


def inspect_bag(bag: Bag, settings: BagSettings, verify: bool) -> dict[str, Any]:
    """Read one bag's topics, times and joints without writing anything; `verify` also decodes every image.

    Raises:
        BagError: as read_bag() and synchronise().
    """
    with contextlib.ExitStack() as stack:
        topics = topics_of(open_storage(bag, stack))
    for topic, (types, count) in sorted(topics.items()):
        print(f"    {topic}  {'/'.join(sorted(types))}  {count}")
    recording = read_bag(bag, settings, (lambda camera, image: None) if verify else None)
    return synchronise(bag.name, recording, settings).report


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m rosbag_dataset`. Exit code 0 when every bag can be trained on, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m rosbag_dataset", description="Look at a folder of ROS 2 bags.")
    parser.add_argument("bag_dir", type=Path, help="folder that is searched for bags")
    parser.add_argument("--config", type=Path, help="a training config whose data and conventions sections to use")
    parser.add_argument("--verify", action="store_true", help="decode every image and hash every byte")
    parser.add_argument("--json", type=Path, help="write the report there as well")
    args = parser.parse_args(argv)
    try:
        settings = _inspection_settings(args.bag_dir, args.config)
        bags = find_bags(args.bag_dir)
    except BagError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    reports, problems, names = [], [], {}
    for bag in tqdm(bags, desc="reading bags", unit="bag", disable=not sys.stderr.isatty()):
        print(f"{bag.name}")
        try:
            report = inspect_bag(bag, settings, args.verify)
            if reports:
                _check_same_size(bag.name, report["image_size"], reports[0]["episode"], reports[0]["image_size"])
            with _storage_errors(bag, bag.path):
                report["same_bytes_as"] = names.setdefault(bag.identity(full=args.verify), bag.name)
            report["same_bytes_as"] = "" if report["same_bytes_as"] == bag.name else report["same_bytes_as"]
            reports.append(report)
        except BagError as error:
            problems.append({"bag": bag.name, "why": str(error)})
            print(f"    error: {error}")
    if reports:
        print("\n" + report_table(reports))
    for problem in problems:
        print(f"error: {problem['why']}", file=sys.stderr)
    if args.json:
        try:
            args.json.write_text(json.dumps({"episodes": reports, "bad": problems}, indent=2))
        except OSError as exc:
            print(f"error: --json: {args.json}: {exc.strerror}", file=sys.stderr)
            return 1
    return 1 if problems else 0


def _inspection_settings(bag_dir: Path, config: Path | None) -> BagSettings:
    """The data and conventions sections of config.yaml beside this file, overlaid with those of `config`."""
    merged: dict[str, Any] = {}
    for path in (Path(__file__).with_name("config.yaml"), config):
        if path is None:
            continue
        try:
            content = yaml.safe_load(path.read_text()) or {}
            for section in ("data", "conventions"):
                merged |= content.get(section) or {}
        except (OSError, yaml.YAMLError, AttributeError, TypeError) as exc:
            raise BagError(f"{path}: cannot be read as a config ({' '.join(str(exc).split())})") from None
    return settings_from(merged | {"bag_dir": bag_dir, "cache_dir": Path()})


def settings_from(values: dict[str, Any]) -> BagSettings:
    """BagSettings from the merged `data` and `conventions` keys of a config.

    `camera_topics` wins over `camera_topic`, which is one camera called "color".

    Raises:
        BagError: a key is missing, or holds something of another type.
    """
    values = dict(values)
    names = [f.name for f in dataclasses.fields(BagSettings)]
    missing = [n for n in names if n not in values and n != "camera_topics"]
    if not (values.get("camera_topics") or values.get("camera_topic")):
        missing.append("camera_topic")
    if missing:
        raise BagError(f"the config lacks {', '.join(missing)} in its data or conventions section")
    try:
        values["camera_topics"] = dict(values.get("camera_topics") or {"color": values["camera_topic"]})
        values["joint_names"] = tuple(values["joint_names"] or ())
        values["joint_sign"] = tuple(float(s) for s in values["joint_sign"] or ())
        values["image_resize"] = tuple(values["image_resize"]) if values["image_resize"] else None
        values["fps"], values["max_offset_ms"] = float(values["fps"]), float(values["max_offset_ms"])
    except (TypeError, ValueError) as exc:
        raise BagError(f"the config's data or conventions section: {exc}") from None
    return BagSettings(**{n: values[n] for n in names})


if __name__ == "__main__":
    sys.exit(main())
