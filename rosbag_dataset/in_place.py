"""Pictures read where they lie, in a bag's storage files: an index of their messages instead of a copy of their pixels.

Knows: how a picture's message is found again and told from another one, which recordings can be read at random and what
that costs, how few files are open.
Must not know: what else a cache entry holds, episodes, samples.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import statistics
import struct
import time
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from .bags import Bag
from .errors import BagError, SetupError
from .images import COMPRESSED_TYPE, IMAGE_TYPE, read_image
from .settings import BagSettings
from .storage import SlowAtRandom, connect, open_storage, ros2_type, storage_errors
from .topics import parse_message
from .video import VIDEO_TYPES

# data.frames: auto: what the pictures of one frame may take of a core, in ms. The two processes that load samples by
# default then give 400 frames a second; an H100 trains on 170 to 210 with the default network (benchmarks/README.md).
MAX_CPU_MS = 5.0
PROBED_BAGS, PROBED_PICTURES = 3, 3  # that is measured on so many bags, on so many pictures per camera of each
MAX_OPEN_FILES = 256  # of one reader; a process may usually have 1024

_WEIGHTS = (2 * np.arange(1024, dtype=np.uint64) + 1) * np.uint64(0x9E3779B97F4A7C15)  # odd: no changed bit is lost


class NotInPlace(SetupError):
    """A recording of which no picture can be read without reading others: its name, and why."""


class Place(NamedTuple):
    """Where a picture's message lies, and what tells it from another one. An index holds them as PLACE, one by one."""

    file: int  # of Source.files
    position: int  # where its bytes begin in an .mcap; its rowid in a .db3
    length: int  # of the message, in bytes
    checksum: int  # checksum() of its bytes
    compressed: int  # 1: a CompressedImage, 0: an Image


PLACE = struct.Struct("<qqqQq")


@dataclass(frozen=True)
class Source:
    """What a recording's pictures are read from, beside their places."""

    bag: str  # its name, for errors
    files: tuple[Path, ...]
    topics: dict[str, str]  # camera -> topic, for errors
    ros_distro: str
    key: str  # of the entry that a copy of its pictures would be: cache.cache_key()


def source_of(bag: Bag, settings: BagSettings, key: str) -> Source:
    """The files of a bag, as PictureReader.read() wants them."""
    return Source(bag.name, bag.files, settings.camera_topics, settings.ros_distro, key)


def places_file(camera: str) -> str:
    """The name of the file with a camera's places inside a cache entry."""
    return f"{camera}.places"


def checksum(data: bytes | memoryview) -> int:
    """32 bits that tell these bytes from others; any bit that changes shows.

    Sums of weighted 64-bit words, and zlib's CRC of those: a fifth of what the CRC of all bytes takes.
    """
    words = np.frombuffer(data, np.uint64, len(data) // 8)
    blocks = words[: len(words) // len(_WEIGHTS) * len(_WEIGHTS)].reshape(-1, len(_WEIGHTS))
    rest = memoryview(data)[blocks.nbytes :]
    return zlib.crc32(rest, zlib.crc32(np.dot(blocks, _WEIGHTS).tobytes()))


# -- which messages there are -------------------------------------------------------------------------------------


def find_messages(bag: Bag, settings: BagSettings) -> dict[str, list[tuple[int, int, int, int]]]:
    """The messages of each camera in the order of read_bag(): (receive time in ns, file, position, length) of each.

    Only their headers are read.

    Raises:
        NotInPlace: no picture can be read without others.
        BagError: a damaged file.
    """
    if bag.reader is not None:
        raise NotInPlace(f"{bag.name}: it is no bag")
    if bag.compression == "message":
        raise NotInPlace(f"{bag.name}: each of its messages is compressed")
    if packed := [file.name for file in bag.files if file.name.endswith(".zstd")]:
        raise NotInPlace(f"{bag.name}: {packed[0]} is compressed as a whole")
    camera_of = {topic: camera for camera, topic in settings.camera_topics.items()}
    found: dict[str, list[tuple[int, int, int, int]]] = {camera: [] for camera in settings.camera_topics}
    with contextlib.ExitStack() as stack:
        for number, (file, reader) in enumerate(zip(bag.files, open_storage(bag, stack), strict=True)):
            connections: list[Any] = [c for c in reader.connections if c.topic in camera_of]
            for connection in connections:
                if ros2_type(connection.msgtype) in VIDEO_TYPES:
                    raise NotInPlace(
                        f"{bag.name}: {connection.topic} is video, of which a picture needs those before it"
                    )
            with storage_errors(bag, file):
                try:
                    for connection, time_ns, position, length in reader.places(connections):
                        found[camera_of[connection.topic]].append((time_ns, number, position, length))
                except SlowAtRandom as why:
                    raise NotInPlace(f"{bag.name}: {file.name} {why}") from None
    return found


class PlaceIndex:
    """Made during one pass over a bag: where its pictures lie, compared with what that pass reads of them."""

    def __init__(self, bag: Bag, settings: BagSettings) -> None:
        """Find the messages. Raises NotInPlace and BagError as find_messages()."""
        self._bag = bag
        self._found = find_messages(bag, settings)
        self._read: dict[str, list[tuple[int, int, int, int]]] = {camera: [] for camera in self._found}

    def add(self, camera: str, receive_ns: int, msgtype: str, raw: bytes) -> None:
        """Take note of the next message with a picture, as read_bag() reads it."""
        self._read[camera].append((receive_ns, len(raw), checksum(raw), msgtype == COMPRESSED_TYPE))

    def places(self) -> dict[str, bytes]:
        """Camera -> its places, as files hold them.

        Raises:
            NotInPlace: the pass read other messages than were found (an mcap whose index leaves some out).
        """
        for camera, found in self._found.items():
            if [(time_ns, length) for time_ns, _, _, length in found] != [read[:2] for read in self._read[camera]]:
                raise NotInPlace(f"{self._bag.name}: its files hold other messages of {camera} than their index says")
        return {
            camera: b"".join(
                PLACE.pack(file, position, length, digest, compressed)
                for (_, file, position, length), (_, _, digest, compressed) in zip(
                    found, self._read[camera], strict=True
                )
            )
            for camera, found in self._found.items()
        }


# -- reading pictures ---------------------------------------------------------------------------------------------


class PictureReader:
    """Reads single pictures; for one process, and one thread, at a time.

    Files are opened when they are first wanted, and of more than MAX_OPEN_FILES the one that was not used for longest
    is closed. They are read and not mapped, because maps take page tables. A copy in another process, a loader's worker
    for example, opens files of its own. To make one takes threads from OpenCV: a pool of its threads would not survive
    a fork, and one picture at a time keeps none busy.
    """

    def __init__(self) -> None:
        if cv2.getNumThreads() != 1:
            cv2.setNumThreads(1)
        self._open: OrderedDict[Path, int | sqlite3.Connection] = OrderedDict()
        self._process = os.getpid()
        self._of_parent: Any = None
        self._buffer = np.empty(0, np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()

    def __del__(self) -> None:
        if os.getpid() == self._process:
            while self._open:
                self._close_oldest()

    def read(self, index: Path, source: Source, camera: str, image: int, out: np.ndarray) -> None:
        """Decode picture number `image` of a camera into `out`, (H, W, 3) uint8, just as read_bag() does.

        Args:
            index: the file with the camera's places.
            source: the recording's files.
            camera: whose picture.
            image: its number in the order of the file.
            out: as large as pictures are to be.

        Raises:
            BagError: the message is not there, or another one: the file has changed since the index was made.
        """
        name = f"picture {image + 1} of {source.topics[camera]}"
        try:
            place = Place(*PLACE.unpack(os.pread(self._opened(index), PLACE.size, image * PLACE.size)))
            file = source.files[place.file]
        except (OSError, struct.error, IndexError) as error:
            raise BagError(
                f"{source.bag}: {index}: {name} is not in the index ({_reason(error)}); remove {index.parent}, it is "
                "made again, and continue with --resume"
            ) from error
        try:
            data = self.message(file, place)
        except (OSError, sqlite3.Error, MemoryError, ValueError, OverflowError) as error:
            raise BagError(_changed(source, file, f"{name} cannot be read ({_reason(error)})")) from error
        if len(data) != place.length or checksum(data) != place.checksum:
            raise BagError(_changed(source, file, f"{name} is not where it was, or another one"))
        out[:] = _decode(data, place, source, f"{source.bag}: {source.topics[camera]}, message {image + 1}", out.shape)

    def message(self, file: Path, place: Place) -> bytes | memoryview:
        """A message's bytes, until the next one is read; fewer if they are not there.

        Raises:
            OSError, sqlite3.Error: the file cannot be read.
        """
        opened = self._opened(file)
        if isinstance(opened, sqlite3.Connection):
            row = opened.execute("SELECT data FROM messages WHERE rowid = ?", (place.position,)).fetchone()
            return memoryview(row[0]) if row is not None and isinstance(row[0], bytes) else b""  # without a copy
        if len(self._buffer) < place.length:
            self._buffer = np.empty(place.length, np.uint8)
        room = self._buffer.data[: place.length]
        return room[: os.preadv(opened, [room], place.position)]

    def _opened(self, path: Path) -> int | Any:
        if os.getpid() != self._process:  # forked: sqlite must neither use nor close what another process has opened
            self._of_parent, self._open, self._process = self._open, OrderedDict(), os.getpid()
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        if len(self._open) >= MAX_OPEN_FILES:
            self._close_oldest()
        if path.suffix == ".db3":
            self._open[path] = database = connect(path)
            database.execute("PRAGMA cache_size = 16")  # pages: no page is read twice
        else:
            self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]

    def _close_oldest(self) -> None:
        _, opened = self._open.popitem(last=False)
        os.close(opened) if isinstance(opened, int) else opened.close()


def _decode(
    data: bytes | memoryview, place: Place, source: Source, where: str, size: Sequence[int] | None
) -> np.ndarray:
    """A message's picture, (H, W, 3) uint8, in `size` (None: as recorded)."""
    msgtype = COMPRESSED_TYPE if place.compressed else IMAGE_TYPE
    message = parse_message(data, msgtype, source.ros_distro, where)
    picture, _ = read_image(message, msgtype, None if size is None else (size[0], size[1]), where, decode=True)
    assert picture is not None
    return picture


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _changed(source: Source, file: Path, what: str) -> str:
    return (
        f"{source.bag}: {file}: {what}: the file is not what it was when this program began; put it back as it was and "
        "continue with --resume, or copy pictures first the next time, with data.frames: cache"
    )


class PicturesInPlace:
    """All pictures of a camera, as samples.open_pixels() gives them: like an array (N, H, W, 3) uint8, read when asked.

    `[number]`, `[slice]` and `[(N,) numbers]` read those, and raise BagError as PictureReader.read().
    """

    def __init__(self, index: Path, source: Source, camera: str, shape: tuple[int, ...]) -> None:
        self._reader, self._of = PictureReader(), (index, source, camera)
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """What all of them take in memory."""
        return int(np.prod(self.shape))

    def __getitem__(self, which: Any) -> np.ndarray:
        numbers = np.asarray(range(len(self))[which] if not isinstance(which, np.ndarray) else which)
        if numbers.dtype == bool:
            numbers = np.flatnonzero(numbers)
        pictures = np.empty((numbers.size, *self.shape[1:]), np.uint8)
        for picture, number in zip(pictures, numbers.ravel(), strict=True):
            self._reader.read(*self._of, range(len(self))[number], picture)
        return pictures.reshape(*numbers.shape, *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)


# -- data.frames: auto --------------------------------------------------------------------------------------------


def choose(bags: Sequence[Bag], settings: BagSettings) -> tuple[bool, str]:
    """Whether to read the pictures of bags that were never read before in place, where they can be.

    Returns:
        (that; with data.frames: auto a line that says why, if there are such bags, else "").
    """
    if settings.frames != "auto" or not bags:
        return settings.frames != "cache", ""
    probes: list[_Probe] = []
    why = ""
    for number in sorted({*np.linspace(0, len(bags) - 1, PROBED_BAGS).astype(int).tolist()}):
        try:
            probes.append(_probe(bags[number], settings))
        except NotInPlace as error:
            why = why or str(error)
        except BagError:  # said when it is read
            continue
    topics = settings.camera_topics.values()
    counts = [sum(bag.claimed.get(topic, 0) for topic in topics) for bag in bags if bag.claimed is not None]
    counts = counts or [probe.pictures for probe in probes]
    sizes = [probe.picture_bytes for probe in probes] or [3 * math.prod(settings.image_resize or (0,))]
    size = statistics.mean(counts or [0]) * len(bags) * statistics.mean(sizes)
    pixels = f"{size / 1e9:.2f} GB of pixels" if size else "pixels"
    if not probes:
        return True, f"frames: {pixels} into the cache: {why} (data.frames: auto)" if why else ""
    cpu_ms = statistics.median(probe.cpu_ms for probe in probes)
    takes = f"{cpu_ms:.2f} ms of a core to read and decode, of at most {MAX_CPU_MS:g}; data.frames: auto"
    if cpu_ms > MAX_CPU_MS:
        return False, f"frames: {pixels} into the cache (in the bags, a frame takes {takes})"
    return True, f"frames: read in the bags, {pixels} are not copied (a frame takes {takes})"


class _Probe(NamedTuple):
    cpu_ms: float  # to read and decode the pictures of a frame, one of each camera
    pictures: int  # in the bag
    picture_bytes: float  # of a stored one, on average over the cameras


def _probe(bag: Bag, settings: BagSettings) -> _Probe:
    """Read a few pictures of a bag. Raises NotInPlace and BagError as find_messages(), or of a picture."""
    found, source = find_messages(bag, settings), source_of(bag, settings, "")
    reader, cpu_ms, sizes = PictureReader(), 0.0, []
    with contextlib.ExitStack() as stack:
        types = {c.topic: ros2_type(c.msgtype) for reader_ in open_storage(bag, stack) for c in reader_.connections}
    for camera, messages in found.items():
        if not messages:
            raise BagError(f"{bag.name}: no picture of {camera}")
        chosen = [messages[i] for i in np.linspace(0, len(messages) - 1, PROBED_PICTURES).astype(int)]
        took_ms = []
        for _, number, position, length in [chosen[0], *chosen]:  # what is made at the first one's cost, is made once
            begin_s = time.thread_time()
            place = Place(number, position, length, 0, types[settings.camera_topics[camera]] == COMPRESSED_TYPE)
            with storage_errors(bag, bag.files[number]):
                data = reader.message(bag.files[number], place)
            checksum(data)
            picture = _decode(data, place, source, f"{bag.name}: {camera}", settings.image_resize)
            took_ms.append(1e3 * (time.thread_time() - begin_s))
        cpu_ms += statistics.median(took_ms[1:])
        sizes.append(picture.nbytes)
    return _Probe(cpu_ms, sum(len(messages) for messages in found.values()), statistics.mean(sizes))
