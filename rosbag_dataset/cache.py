"""Decoded recordings on disk: each bag's pixels, times and joints in an entry of their own, whole or absent.

An entry is the folder `cache_dir/KEY`; KEY stands for the bag's bytes and every setting that changes pixels or times.
There are two kinds: with the pixels, and with an index of them (in_place.py), which has a key of its own. What else is
in them is the same.

    CAMERA.rgb           stored images one after the other, (H, W, 3) uint8 each, in file order
    CAMERA.places        or of each, in that order, where it lies in the bag: in_place.PLACE
    CAMERA.time_ns.npy   their times, int64 ns
    joint_time_ns.npy    int64 ns
    joint_rad.npy        (M, J) float64; NaN where a message does not have the joint
    state.NAME.time_ns.npy, state.NAME.value.npy    of each of data.state_topics: int64 ns, float64
    command.NAME.*.npy   of each state that was commanded, the arrays of commands.Commands
    marker_time_ns.npy, marker.npy    (K,) int64: times and values of the episode markers, with data.episodes: marker
    meta.json            sizes of the images, a hash of each camera's first, which further states are held, which were
                         commanded; how many messages and packets of video were of no use, how many black, white, torn
                         and frozen pictures there are, if any; how late messages were after their header stamps (older
                         entries do not say); of an index, that it is one; written last
    CAMERA.moments.json  mean and deviation of its pixels, once statistics.py has computed them; of those that a part of
                         the recording shows in CAMERA.HASH.moments.json

Beside the entries lie lock files: KEY.lock while an entry is built, and in-use.lock; what bags.py remembers of bags;
and episodes that warm.py keeps. meta.json's time of change is when the entry was last used. `python -m rosbag_dataset
cache` (pruning.py) shows entries, and removes some.

Knows: names and layout of these files, several processes that build at once, disks that fill up.
Must not know: fps, segments, actions: what changes without decoding a bag again is not in an entry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .bags import Bag
from .commands import Commands
from .errors import DISK_FULL, NO_LOCKS, SetupError
from .images import DEPTH_M_PER_LEVEL, RESIZE_INTERPOLATION
from .in_place import PLACE, NotInPlace, PlaceIndex, places_file
from .reading import Recording, Samples, image_sha256, read_bag
from .settings import BagSettings

CACHE_VERSION = 1  # raise it when decoded pixels or times change, so that old entries are not used
INDEX_VERSION = 1  # raise it when the places of pictures change, for the same reason
COMMAND_PARTS = tuple(field.name for field in dataclasses.fields(Commands))
IN_USE = "in-use.lock"  # held shared by each process that builds or reads entries, alone by one that removes some
KNOWN = "bags.json"  # what bags.KnownBags remembers
_in_use: dict[Path, Any] = {}  # cache folder -> that file, open until the process ends


class EntryError(Exception):
    """A cache entry that is not there, or not whole: what is missing or cut short."""


def cache_key(bag: Bag, content_hash: str, settings: BagSettings) -> str:
    """The name of a bag's cache entry: 24 hex digits.

    They stand for the bag's bytes (`content_hash`, from Bag.content_hash()), its name, and every setting that changes
    stored pixels or times.
    """
    parts = {
        "version": CACHE_VERSION,
        "name": bag.name,
        "identity": content_hash,  # the name under which it was always hashed: another one would orphan every entry
        "joint_topic": settings.joint_topic,
        "camera_topics": settings.camera_topics,
        "joint_names": settings.joint_names,
        "time_source": settings.time_source,
        "ros_distro": settings.ros_distro,
        "image_resize": settings.image_resize,
        "interpolation": RESIZE_INTERPOLATION,
        "depth_m_per_level": DEPTH_M_PER_LEVEL,
    }
    if settings.state_topics:  # without any, entries from before they were there are the same
        parts["state_topics"] = {name: field.text for name, field in settings.state_topics.items()}
    if settings.commanded.any():
        parts["action_source"] = settings.action_source
        parts["command_topics"] = {name: field.text for name, field in settings.command_topics.items()}
        parts["observed_only"] = settings.observed_only  # of these no command is stored
    if settings.episodes == "marker":  # the only way to cut that wants another topic
        parts["episode_marker_topic"] = settings.episode_marker_topic
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def index_key(key: str) -> str:
    """The name of the entry that has an index in place of the pixels that the one called `key` has."""
    return hashlib.sha256(f"index {INDEX_VERSION} of {key}".encode()).hexdigest()[:24]


def entry_keys(key: str, frames: str) -> tuple[str, ...]:
    """The names of the entries that may be read of a bag with `key`, by data.frames; the first that is there is."""
    return {"cache": (key,), "bags": (index_key(key),), "auto": (key, index_key(key))}[frames]


def find_entry(key: str, settings: BagSettings) -> Path | None:
    """The entry that is to be read of a bag with `key`, by data.frames; None if it has none that is finished."""
    entries = [settings.cache_dir / name for name in entry_keys(key, settings.frames)]
    return next((entry for entry in entries if (entry / "meta.json").exists()), None)


def pixels_file(camera: str) -> str:
    """The name of a camera's stored images inside an entry."""
    return f"{camera}.rgb"


def make_entry(
    bag: Bag,
    key: str,
    settings: BagSettings,
    in_place: bool,
    on_message: Callable[[int, int], None] | None = None,
) -> tuple[Path, str]:
    """Build the entry of a bag that is to be read: an index if `in_place`, and if its pictures can be read so.

    Args and errors are build_entry()'s, and one more.

    Returns:
        (the entry; why it has pixels although it was to have none, or "").

    Raises:
        SetupError: data.frames is "bags", and the pictures cannot be read in place.
    """
    why = ""
    if in_place:
        try:
            build_entry(bag, index_key(key), settings, on_message, in_place=True)
            return settings.cache_dir / index_key(key), ""
        except NotInPlace as error:
            why = str(error)
            if settings.frames == "bags":
                expected = "expected auto (which puts such recordings into the cache) or cache"
                raise SetupError(f"{why}: found data.frames: bags, {expected}") from None
    build_entry(bag, key, settings, on_message)
    return settings.cache_dir / key, why


def open_entry(
    bag: Bag,
    key: str,
    settings: BagSettings,
    in_place: bool,
    on_message: Callable[[int, int], None] | None = None,
) -> tuple[Path, Recording]:
    """The entry of a bag that is to be read, and what is in it: made if there is none, made again if it is damaged.

    Args and errors are make_entry()'s; what is made again is of the kind that it was.
    """
    cameras = list(settings.camera_topics)
    if (entry := find_entry(key, settings)) is not None:
        try:
            return entry, load_entry(entry, cameras)
        except EntryError:
            in_place = entry.name != key
    entry, _ = make_entry(bag, key, settings, in_place, on_message)
    return entry, load_entry(entry, cameras)


def build_entry(
    bag: Bag,
    key: str,
    settings: BagSettings,
    on_message: Callable[[int, int], None] | None = None,
    in_place: bool = False,
) -> None:
    """Decode one bag into `cache_dir/key`, atomically; safe when other processes build the same entry.

    Whoever comes second waits for the lock and finds the entry done. An entry that is damaged is made again.

    Args:
        bag: from find_bags().
        key: from cache_key(), or index_key().
        settings: where the cache is, and what to read.
        on_message: called as on_message(images, bytes) for progress.
        in_place: write an index and no pixels. Each picture is decoded all the same, once: what is damaged, black,
            torn or frozen is found now, and not by a training in its fifth hour.

    Raises:
        NotInPlace: there can be no index.
        BagError: a bad recording, or a disk that is full (nothing half-written stays behind).
    """
    cache_dir, entry = settings.cache_dir, settings.cache_dir / key
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        use(cache_dir)
        with locked(cache_dir, key, bag.name):
            fault = _fault(entry, settings)
            if fault is None:
                return
            if entry.exists():
                print(f"frame cache: {fault}; decoding {bag.name} again", file=sys.stderr, flush=True)
            building = cache_dir / f".{key}.{os.getpid()}"
            # A killed process may have had this id, as is usual in containers.
            shutil.rmtree(building, ignore_errors=True)
            try:
                building.mkdir()
                _write_entry(bag, building, settings, on_message, PlaceIndex(bag, settings) if in_place else None)
                if _fault(entry, settings) is not None:  # else, without locks, another process was first
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


def use(cache_dir: Path) -> None:
    """From now until this process ends nobody prunes this cache; waits for one that does at the moment.

    Pixels are mapped when they are first wanted, by whichever worker wants them: an entry that is gone by then would
    end a training. Where nothing can be locked or written, there is no such promise, and pruning refuses.
    """
    folder = cache_dir.resolve()
    if folder in _in_use:
        return
    with contextlib.suppress(OSError):
        file = (folder / IN_USE).open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prunes {cache_dir}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_SH)
        _in_use[folder] = file


@contextlib.contextmanager
def locked(cache_dir: Path, key: str, bag_name: str) -> Generator[None]:
    """While inside, no other process builds this entry; waits for one that does.

    On a file system without locks it goes on and says so. Several processes may then decode the same bag, each into a
    folder of its own; the entry of the first that is done counts.
    """
    with (cache_dir / f"{key}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is caching {bag_name}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"warning: data.cache_dir: {cache_dir}: {error.strerror}; {bag_name} may be decoded more than once",
                  file=sys.stderr, flush=True)  # fmt: skip
        yield


def clean_cache(cache_dir: Path) -> None:
    """Remove half-made entries of processes that were killed: those whose lock nobody holds any more.

    Without locks nobody can tell, and they stay.
    """
    for leftover in cache_dir.glob(".*.*"):
        with (cache_dir / f"{leftover.name.split('.')[1]}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (*NO_LOCKS, errno.EAGAIN, errno.EACCES):  # the last two: somebody holds it
                    continue
                raise
            shutil.rmtree(leftover, ignore_errors=True)


def _reserve(file: int, size: int) -> None:
    """A disk that is too small says so at once, not after an hour. Where space cannot be reserved, it is not."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            if error.errno in (*DISK_FULL, errno.EIO):
                raise


def _write_entry(
    bag: Bag,
    building: Path,
    settings: BagSettings,
    on_message: Callable[[int, int], None] | None,
    index: PlaceIndex | None,
) -> None:
    expected: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}

        def sink(camera: str, image: np.ndarray) -> None:
            if index is not None:
                return
            if camera not in files:
                files[camera] = stack.enter_context((building / pixels_file(camera)).open("wb"))
                _reserve(files[camera].fileno(), expected[camera] * image.nbytes)
            files[camera].write(np.ascontiguousarray(image).data.cast("B"))

        on_picture = None if index is None else index.add
        read = bag.reader or read_bag
        recording = read(
            bag, settings, sink, on_message, scratch=building, on_open=expected.update, on_picture=on_picture
        )
        for file in files.values():  # a video may have fewer pictures than messages, for which there is room
            file.truncate()
    for camera, places in (index.places() if index is not None else {}).items():
        save(building / places_file(camera), places)
    save(building / "joint_time_ns.npy", recording.joint_time_ns)
    save(building / "joint_rad.npy", recording.joint_rad)
    if len(recording.marker):
        save(building / "marker_time_ns.npy", recording.marker_time_ns)
        save(building / "marker.npy", recording.marker)
    for camera, times in recording.camera_time_ns.items():
        save(building / f"{camera}.time_ns.npy", times)
    for name, samples in recording.states.items():
        save(building / f"state.{name}.time_ns.npy", samples.time_ns)
        save(building / f"state.{name}.value.npy", samples.value)
    for name, commands in recording.commands.items():
        for part in COMMAND_PARTS:
            save(building / f"command.{name}.{part}.npy", getattr(commands, part))
    meta = {
        "bag": bag.name, "image_shape": recording.image_shape, "source_shape": recording.source_shape,
        "first_image": recording.first_image,
    }  # fmt: skip
    if recording.ignored_joint_messages:
        meta["ignored_joint_messages"] = recording.ignored_joint_messages
    if recording.states:
        meta["held_states"] = {name: samples.held for name, samples in recording.states.items()}
    if recording.dropped_packets:
        meta["dropped_packets"] = recording.dropped_packets
    if recording.commands:
        meta["commands"] = list(recording.commands)
    if recording.picture_faults:
        meta["picture_faults"] = recording.picture_faults
    meta["stamp_delay_ms"] = recording.stamp_delay_ms
    if recording.ignored_messages:
        meta["ignored_messages"] = recording.ignored_messages
    if index is not None:
        meta["in_place"] = True
    save(building / "meta.json", json.dumps(meta).encode())
    for file in building.iterdir():  # all written before the first is flushed: the others then hardly wait
        flush(file)


def save(path: Path, content: np.ndarray | bytes) -> None:
    """Write an array in numpy's format, or bytes, with an OSError that says why it failed.

    np.save to a file says neither why nor errno when the disk is full.
    """
    with path.open("wb") as file:
        if not isinstance(content, np.ndarray):
            file.write(content)
            return
        array, header = np.ascontiguousarray(content), io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
        file.write(header.getvalue())
        file.write(array.reshape(-1).view(np.uint8).data)


def flush(path: Path) -> None:
    """Force a written file to the disk (fsync): otherwise, after a power failure, it may be all zeros: black frames."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def whole(path: Path) -> Generator[Path]:
    """A path to write to; at the end what was written is on the disk as `path`, or, after an error, gone."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _fault(entry: Path, settings: BagSettings) -> EntryError | None:
    """What is wrong with an entry, or None."""
    try:
        load_entry(entry, list(settings.camera_topics))
    except EntryError as error:
        return error
    return None


def load_entry(entry: Path, cameras: Sequence[str]) -> Recording:
    """Read a cache entry's times, joints and further states (pixels stay where they are: samples.open_pixels).

    From then on the cache counts as in use until this process ends, and the entry as used now.

    Raises:
        EntryError: it is missing or not whole. Pixels are not read: only their files' sizes are compared.
    """
    use(entry.parent)
    try:
        meta = json.loads((entry / "meta.json").read_text())
        recording = Recording(
            np.load(entry / "joint_time_ns.npy"),
            np.load(entry / "joint_rad.npy"),
            {camera: np.load(entry / f"{camera}.time_ns.npy") for camera in cameras},
            {camera: tuple(meta["image_shape"][camera]) for camera in cameras},
            {camera: tuple(meta["source_shape"][camera]) for camera in cameras},
            ignored_joint_messages=meta.get("ignored_joint_messages", 0),
            states={
                name: Samples(
                    np.load(entry / f"state.{name}.time_ns.npy"), np.load(entry / f"state.{name}.value.npy"), held
                )
                for name, held in meta.get("held_states", {}).items()
            },
            commands={
                name: Commands(*(np.load(entry / f"command.{name}.{part}.npy") for part in COMMAND_PARTS))
                for name in meta.get("commands", ())
            },
            ignored_messages=meta.get("ignored_messages", {}),
            dropped_packets={camera: tuple(counts) for camera, counts in meta.get("dropped_packets", {}).items()},
            picture_faults={
                camera: {kind: tuple(found) for kind, found in kinds.items()}
                for camera, kinds in meta.get("picture_faults", {}).items()
            },
            stamp_delay_ms=meta.get("stamp_delay_ms", {}),
        )
        if (entry / "marker.npy").exists():
            recording.marker_time_ns = np.load(entry / "marker_time_ns.npy")
            recording.marker = np.load(entry / "marker.npy")
        for camera, (height, width) in recording.image_shape.items():
            file, size_of_one = entry / pixels_file(camera), height * width * 3
            if meta.get("in_place"):
                file, size_of_one = entry / places_file(camera), PLACE.size
            expected = len(recording.camera_time_ns[camera]) * size_of_one
            if (size := file.stat().st_size) < expected:
                raise EntryError(f"{file}: {size} bytes, expected {expected}")
            if "first_image" in meta:
                recording.first_image[camera] = meta["first_image"][camera]
            else:  # an entry from before it was kept there
                with file.open("rb") as pixels:
                    recording.first_image[camera] = image_sha256(pixels.read(height * width * 3))
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise EntryError(f"{entry}: {' '.join(str(error).split()) or type(error).__name__}") from error
    with contextlib.suppress(OSError):  # a cache that is read only
        os.utime(entry / "meta.json")
    return recording
