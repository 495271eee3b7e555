"""Storage files (sqlite3, mcap, zstd around either) to messages: topic, type, receive time, bytes.

Knows: file formats, the quirks of the libraries that read them, how each of their failures becomes one line, and how
much memory, disk and time a file may ask for (docs/trust.md): a bag may come from somebody else.
Must not know: which topics are wanted, and what is inside a message (topics.py, images.py).
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shlex
import sqlite3
import struct
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import quote

import lz4.frame  # as zstd, one of rosbags' own requirements
from rosbags.rosbag2 import Reader

from .bags import Bag, lfs_pointer
from .errors import DISK_FULL, BagError, SetupError

if sys.version_info >= (3, 14):  # the zstd that rosbags itself depends on
    from compression import zstd
else:
    from backports import zstd

# What may be in memory unpacked: one message, or one chunk of an mcap. An 8K image at four bytes a pixel just fits
# (images.MAX_PIXELS); recorders write chunks of 1 to 10 MB.
MAX_UNPACKED_BYTES = 128 << 20
# How many times its own size a compressed file may unpack to, beyond MAX_UNPACKED_BYTES. Camera images reach 2 to 5, a
# simulation's flat colours 100; zstd alone could reach 30,000.
MAX_UNPACK_RATIO = 1000
# How long a .db3 may keep sqlite busy, in instructions of its virtual machine (20 to 50 million a second). Counting
# and reading rows of 27 bytes each, smaller than any message, takes one instruction per byte of the file.
SQL_STEPS_PER_BYTE, SQL_STEPS_AT_LEAST = 10, 20_000_000


class LimitError(Exception):
    """A storage file that asks for more than a recording can need; what it asks for, and what is expected."""


class SlowAtRandom(Exception):
    """Messages that nobody can read one at a time; what they are."""


def connect(file: Path) -> sqlite3.Connection:
    """Open a .db3 that nobody writes to."""
    # One thread at a time uses it, but the one that collects garbage may close it.
    return sqlite3.connect(f"file:{quote(str(file.resolve()))}?mode=ro&immutable=1", uri=True, check_same_thread=False)


class Sqlite3Storage:
    """A .db3 file: two queries by the standard library, streaming, in the order of recording.

    rosbags' own reader refuses a bag when one topic's message definition or QoS has a form that it does not know
    (rosbag2 itself records encoding "unknown"), although neither is needed here, and cannot open a path with #, ? or %.
    """

    def __init__(self, file: Path) -> None:
        self._db = connect(file)
        self._steps_left = SQL_STEPS_AT_LEAST + SQL_STEPS_PER_BYTE * file.stat().st_size
        self._db.set_progress_handler(self._count_steps, 10_000)
        # A view, a virtual table or a computed column has no bytes in the file: a few of its words are endless rows.
        computed = (
            "SELECT lower(name) FROM sqlite_master WHERE lower(name) IN ('topics', 'messages') AND (type != 'table' OR "
            "rootpage = 0 OR EXISTS (SELECT 1 FROM pragma_table_xinfo(sqlite_master.name) WHERE hidden))"
        )
        if names := sorted(name for (name,) in self._query(computed)):
            raise LimitError(f"{' and '.join(names)}: expected a table, whose rows are stored in the file")
        rows = self._query(
            "SELECT topics.id, name, type, count(messages.id) FROM topics "
            "LEFT JOIN messages ON topics.id = messages.topic_id GROUP BY topics.id ORDER BY topics.id"
        )
        self.connections = [SimpleNamespace(id=i, topic=t, msgtype=m, msgcount=n) for i, t, m, n in rows]

    def _count_steps(self) -> bool:
        self._steps_left -= 10_000
        return self._steps_left < 0  # true: sqlite breaks off

    def _query(self, query: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        try:
            for row in self._db.execute(query, values):  # noqa: UP028 - `yield from` closes a cursor after its database
                yield row
        except sqlite3.OperationalError as error:
            if self._steps_left >= 0:
                raise
            raise LimitError("sqlite needs more time for it than a file of its size can take") from error

    def close(self) -> None:
        """Close the file; contextlib.closing calls this when the bag's ExitStack unwinds."""
        self._db.close()

    @property
    def definitions(self) -> dict[str, tuple[str, str]]:
        """Message type -> (encoding, text) of its definition; {} in bags from before ROS 2 Iron, which hold none."""
        stored = "SELECT 1 FROM sqlite_master WHERE name = 'message_definitions' AND type = 'table' AND rootpage > 0"
        if not list(self._query(stored)):
            return {}
        query = "SELECT topic_type, encoding, encoded_message_definition FROM message_definitions"
        rows = [row for row in self._query(query) if all(type(value) is str for value in row)]
        return {ros2_type(name): (encoding, text) for name, encoding, text in rows}

    def messages(self, connections: Sequence[Any]) -> Iterator[tuple[Any, int, bytes]]:
        """(connection, receive time in ns, CDR bytes) of each message of `connections`."""
        wanted = {c.id: c for c in connections}
        marks = ", ".join("?" * len(wanted))
        query = f"SELECT topic_id, timestamp, data FROM messages WHERE topic_id IN ({marks}) ORDER BY id"
        for topic_id, time_ns, data in self._query(query, tuple(wanted)):
            if type(time_ns) is not int or type(data) is not bytes:  # sqlite types values, not columns
                raise ValueError("a message's time stamp or data is not of its type")
            yield wanted[topic_id], time_ns, data

    def places(self, connections: Sequence[Any]) -> Iterator[tuple[Any, int, int, int]]:
        """(connection, receive time in ns, rowid, length in bytes) of each of messages(), without reading its bytes.

        Raises:
            SlowAtRandom: a row cannot be found by its rowid.
        """
        wanted = {c.id: c for c in connections}
        marks = ", ".join("?" * len(wanted))
        columns = "topic_id, timestamp, rowid, length(data)"
        query = f"SELECT {columns} FROM messages WHERE topic_id IN ({marks}) ORDER BY id"
        try:
            for topic_id, time_ns, rowid, length in self._query(query, tuple(wanted)):
                yield wanted[topic_id], time_ns, rowid, length
        except sqlite3.OperationalError as error:  # a table that somebody made WITHOUT ROWID
            raise SlowAtRandom(f"has rows that are not found one by one ({error})") from error


class _SchemasWithoutDefinitions(dict):
    """id -> mcap schema, as McapReader fills it, with an empty message definition in each.

    McapReader closes the whole file when one topic's definition has an encoding that it does not know. They are kept
    beside, for types that data.ros_distro does not have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.definitions: dict[str, tuple[str, str]] = {}  # message type -> (encoding, text)

    def __setitem__(self, key: int, schema: Any) -> None:
        self.definitions[ros2_type(schema.name)] = (schema.encoding, schema.data)
        super().__setitem__(key, schema._replace(encoding="ros2msg", data=""))


def _mcap_with_limits() -> Any:
    """rosbags' mcap module once more, for us alone: its functions unpack chunks without a limit and sort messages."""
    spec = importlib.util.find_spec("rosbags.rosbag2.storage_mcap")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.DECOMPRESSORS = {  # (bytes, the size that the chunk declares) -> bytes
        "": lambda data, size: data,
        "lz4": lambda data, size: lz4.frame.LZ4FrameDecompressor().decompress(data, _chunk_limit(size) + 1),
        "zstd": lambda data, size: unpack(data, _chunk_limit(size), "a chunk"),
    }
    # It sorts messages by time, within chunks and then between them. We want them as they were recorded: once they are
    # sorted, nobody sees that a clock was set back. (What it sorts without a key is no messages.)
    module.sorted = lambda found, key=None: found if key else sorted(found)
    module.heapq = SimpleNamespace(merge=itertools.chain)
    return module


def _chunk_limit(size: int) -> int:
    if size > MAX_UNPACKED_BYTES:
        raise LimitError(f"a chunk declares {size} bytes unpacked, expected at most {MAX_UNPACKED_BYTES}")
    return size


McapReader: Any = _mcap_with_limits().McapReader


class _Mcap(McapReader):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.schemas = _SchemasWithoutDefinitions()

    def open(self) -> None:
        """Read the index, in the file's order; refuse one that names a chunk again and again, to unpack each time."""
        super().open()
        self.chunks.sort(key=lambda chunk: chunk.chunk_start_offset)
        size = Path(self.path).stat().st_size
        unpacked, limit = sum(chunk.uncompressed_size for chunk in self.chunks), _unpack_limit(size)
        if unpacked > limit:
            raise LimitError(f"{size} bytes whose chunks declare {unpacked} unpacked, expected at most {limit}")


class McapStorage(Reader):
    """A .mcap file: rosbags' reader, which here looks at no message definition that the file holds."""

    STORAGE_PLUGINS = {**Reader.STORAGE_PLUGINS, ".mcap": _Mcap}

    @property
    def definitions(self) -> dict[str, tuple[str, str]]:
        """As of Sqlite3Storage."""
        return cast(Any, self.storage).schemas.definitions

    def places(self, connections: Sequence[Any]) -> Iterator[tuple[Any, int, int, int]]:
        """(connection, receive time in ns, where its bytes begin, their number) of each message, as the file has them.

        Raises:
            SlowAtRandom: the file is compressed, in chunks.
            ValueError: it is damaged.
        """
        storage, wanted = cast(Any, self.storage), {c.id: c for c in connections}
        file = os.open(storage.path, os.O_RDONLY)
        try:
            for channel, time_ns, position, length in _mcap_messages(file, storage.data_start, storage.data_end):
                if channel in wanted:
                    yield wanted[channel], time_ns, position, length
        finally:
            os.close(file)


def _mcap_messages(file: int, begin: int, end: int, in_chunk: bool = False) -> Iterator[tuple[int, int, int, int]]:
    """(channel, log time in ns, where its bytes begin, their number) of each message between two positions of an mcap.

    Its specification, "Records": each has an operation (1 byte), a length (8), its content. A message's (5) begins with
    22 bytes: channel, sequence, log time, publish time. A chunk's (6) with 28, a text that names the compression, and
    the length of the records that follow.
    """
    while begin < end:
        head = os.pread(file, 49, begin)
        if len(head) < 9 or begin + 9 + (size := int.from_bytes(head[1:9], "little")) > end:
            raise ValueError(f"the record at byte {begin} breaks off")
        if head[0] == 5:
            if size < 22:
                raise ValueError(f"the message at byte {begin} is too short")
            channel, _, time_ns = struct.unpack_from("<HIQ", head, 9)
            yield channel, time_ns, begin + 31, size - 22
        elif head[0] == 6:
            if in_chunk or size < 40:
                raise ValueError(f"the chunk at byte {begin} is none")
            if int.from_bytes(head[37:41], "little"):
                raise SlowAtRandom("is compressed in chunks, of which a picture takes a whole one")
            records = int.from_bytes(head[41:49], "little")
            if records > size - 40:
                raise ValueError(f"the chunk at byte {begin} breaks off")
            yield from _mcap_messages(file, begin + 49, begin + 49 + records, in_chunk=True)
        begin += 9 + size


Storage = McapStorage | Sqlite3Storage


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
                f"killed); merge them with: sqlite3 {shlex.quote(str(file))} 'PRAGMA wal_checkpoint(TRUNCATE)'"
            )
        with storage_errors(bag, file):
            opened = file
            if file.name.endswith(".zstd"):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=scratch, prefix=".unpack-")))
                opened = folder / file.name.removesuffix(".zstd")
                _unpack_file(file, opened)
            if opened.suffix == ".db3":
                readers.append(stack.enter_context(contextlib.closing(Sqlite3Storage(opened))))
            else:
                readers.append(stack.enter_context(McapStorage(opened)))
            if not all(isinstance(text, str) for c in readers[-1].connections for text in (c.topic, c.msgtype)):
                raise ValueError("a topic's name or type is not text")
    return readers


def _unpack_limit(size: int) -> int:
    """How many bytes a file of `size` bytes may unpack to."""
    return max(MAX_UNPACKED_BYTES, MAX_UNPACK_RATIO * size)


def _unpack_file(file: Path, target: Path) -> None:
    size = file.stat().st_size
    limit = _unpack_limit(size)
    advice = (
        f"expected at most {limit}; if you know it to be right, unpack it first: unzstd --rm {shlex.quote(str(file))}"
    )
    with file.open("rb") as packed, target.open("wb") as out:
        declared = zstd.get_frame_info(packed.read(18)).decompressed_size  # None: the frame does not say
        if (declared or 0) > limit:
            raise LimitError(f"{size} bytes that declare {declared} unpacked, {advice}")
        packed.seek(0)
        done = 0
        with zstd.open(packed, "rb") as unpacked:
            while block := unpacked.read(1 << 20):
                done += len(block)
                if done > limit:
                    raise LimitError(f"{size} bytes unpack to {done} and more, {advice}")
                out.write(block)


def unpack(data: bytes, limit: int, what: str) -> bytes:
    """zstd frames to bytes, as zstd.decompress does, but to `limit` bytes at most; `what` they are, for the error.

    Raises:
        LimitError: they are more, or declare more.
        zstd.ZstdError: they are damaged or cut short.
    """
    parts: list[bytes] = []
    room, rest = limit, data
    while True:
        if (zstd.get_frame_info(rest).decompressed_size or 0) > room:
            raise LimitError(_too_much(what, data, limit))
        frame = zstd.ZstdDecompressor()
        parts.append(frame.decompress(rest, room + 1))
        room -= len(parts[-1])
        if room < 0:
            raise LimitError(_too_much(what, data, limit))
        if not frame.eof:
            raise zstd.ZstdError("compressed data breaks off")
        rest = frame.unused_data
        if not rest:
            return b"".join(parts)


def _too_much(what: str, data: bytes, limit: int) -> str:
    declared = zstd.get_frame_info(data).decompressed_size
    return f"{what} of {len(data)} bytes unpacks to more than {limit} bytes" + (
        f" (it declares {declared})" if declared is not None else ""
    )


@contextlib.contextmanager
def storage_errors(bag: Bag, file: Path) -> Generator[None]:
    """While a storage file is being read: whatever goes wrong becomes a BagError that names the bag and the file.

    Broken files make rosbags, sqlite, zstd and struct raise a dozen exception types; ours is one line.
    """
    try:
        yield
    except BagError:
        raise
    except LimitError as exc:
        raise BagError(
            f"{bag.name}: {file.name}: {exc}; record it again, or leave it out with data.on_bad_bag: skip"
        ) from exc
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
        if other := _something_else(file):
            raise BagError(f"{bag.name}: {file.name} {other}, or leave it out with data.on_bad_bag: skip") from exc
        reason = " ".join(str(exc).split()) or type(exc).__name__
        raise BagError(
            f"{bag.name}: {file.name} is damaged or not a finished recording ({reason[:200]}); {_recovery(file)}, or "
            "leave it out with data.on_bad_bag: skip"
        ) from exc


def _recovery(file: Path) -> str:
    """How to get what is left out of a damaged storage file."""
    if file.name.endswith(".zstd"):
        return "copy it again"
    old, new = (shlex.quote(str(f)) for f in (file, file.with_name(f"recovered-{file.name}")))
    command = f"mcap recover {old} -o {new}" if file.suffix == ".mcap" else f"sqlite3 {old} .recover | sqlite3 {new}"
    return f"recover it with: {command}, and put that in its place"


def _something_else(file: Path) -> str:
    """What a file that cannot be read is, if it is no recording of ROS 2 at all, and what to do; else ""."""
    try:
        with file.open("rb") as stream:
            head = stream.read(200)
    except OSError:
        return ""
    size = int.from_bytes(head[17:21], "little")  # magic, operation and size of the header record, then a text: profile
    if (
        head.startswith(b"\x89MCAP0\r\n\x01")
        and size <= len(head) - 21
        and (profile := head[21 : 21 + size]) != b"ros2"
    ):
        return (
            f"is an mcap of profile {profile.decode(errors='replace')!r}, expected 'ros2': its messages are not those "
            "of ROS 2; record with ros2 bag record, or convert it to ROS 2 messages"
        )
    return lfs_pointer(head)


def messages(bag: Bag, readers: Sequence[Storage], topics: set[str]) -> Iterator[tuple[str, str, int, bytes]]:
    """(topic, message type, receive time in ns, CDR bytes) of each message of `topics`, file by file.

    CDR is how ROS 2 writes a message as bytes. Within a file they come as they were recorded. All that depends on this
    is how a clock that was set back is noticed (synchronisation.py).

    Raises:
        BagError: a file is damaged.
    """
    for file, reader in zip(bag.files, readers, strict=True):
        connections: list[Any] = [c for c in reader.connections if c.topic in topics]
        if not connections:
            continue
        # An mcap without a chunk index is refused by messages() unless in time order; we sort, so scan it.
        storage = getattr(reader, "storage", None)
        scan = getattr(storage, "messages_scan", None) if not getattr(storage, "chunks", True) else None
        stream = scan(connections) if scan else reader.messages(connections)
        while True:
            with storage_errors(bag, file):
                item = next(stream, None)
                if item is not None and bag.compression == "message":
                    data = unpack(item[2], MAX_UNPACKED_BYTES, f"{item[0].topic}: a message")
                    item = (item[0], item[1], data)
            if item is None:
                break
            yield item[0].topic, ros2_type(item[0].msgtype), item[1], item[2]


def ros2_type(name: str) -> str:
    """`sensor_msgs/Image` -> `sensor_msgs/msg/Image`: converted bags carry the legacy spelling."""
    package, _, rest = name.partition("/")
    return name if "/" in rest or not rest else f"{package}/msg/{rest}"


def topics_of(readers: Sequence[Storage]) -> dict[str, tuple[set[str], int]]:
    """For each topic (its message types, number of messages), summed over the storage files."""
    topics: dict[str, tuple[set[str], int]] = {}
    for reader in readers:
        for connection in reader.connections:
            types, count = topics.get(connection.topic, (set(), 0))
            topics[connection.topic] = (types | {ros2_type(connection.msgtype)}, count + connection.msgcount)
    return topics


def definition_of(bag: Bag, readers: Sequence[Storage], msgtype: str) -> tuple[str, str] | None:
    """(encoding, text) of the definition of a message type that a bag brings along, or None.

    Raises:
        BagError: a file is damaged.
    """
    for file, reader in zip(bag.files, readers, strict=True):
        with storage_errors(bag, file):
            if found := reader.definitions.get(msgtype):
                return found
    return None
