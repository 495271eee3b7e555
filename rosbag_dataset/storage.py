"""Storage files (sqlite3, mcap, zstd around either) to messages: topic, type, receive time, bytes.

Knows: file formats, the quirks of the libraries that read them, and how each of their failures becomes one line.
Must not know: which topics are wanted, and what is inside a message (topics.py, images.py).
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

from rosbags.rosbag2 import Reader
from rosbags.rosbag2.storage_mcap import McapReader

from .bags import Bag
from .errors import DISK_FULL, BagError, SetupError

if sys.version_info >= (3, 14):  # the zstd that rosbags itself depends on
    from compression import zstd
else:
    from backports import zstd


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
        """Close the file; contextlib.closing calls this when the bag's ExitStack unwinds."""
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


class _SchemasWithoutDefinitions(dict):
    """id -> mcap schema, as McapReader fills it, with an empty message definition in each.

    The definitions are not needed here (those of data.ros_distro are used), and McapReader closes the whole file when
    one topic's definition has an encoding that it does not know.
    """

    def __setitem__(self, key: int, schema: Any) -> None:
        super().__setitem__(key, schema._replace(encoding="ros2msg", data=""))


class _Mcap(McapReader):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.schemas = _SchemasWithoutDefinitions()


class McapStorage(Reader):
    """A .mcap file: rosbags' reader, which here looks at no message definition that the file holds."""

    STORAGE_PLUGINS = {**Reader.STORAGE_PLUGINS, ".mcap": _Mcap}


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
                f"killed); merge them with: sqlite3 {file.name} 'PRAGMA wal_checkpoint(TRUNCATE)'"
            )
        with storage_errors(bag, file):
            opened = file
            if file.name.endswith(".zstd"):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=scratch, prefix=".unpack-")))
                opened = folder / file.name.removesuffix(".zstd")
                with file.open("rb") as raw, zstd.open(raw, "rb") as unpacked, opened.open("wb") as out:
                    shutil.copyfileobj(unpacked, out, 1 << 20)
            if opened.suffix == ".db3":
                readers.append(stack.enter_context(contextlib.closing(Sqlite3Storage(opened))))
            else:
                readers.append(stack.enter_context(McapStorage(opened)))
            if not all(isinstance(text, str) for c in readers[-1].connections for text in (c.topic, c.msgtype)):
                raise ValueError("a topic's name or type is not text")
    return readers


@contextlib.contextmanager
def storage_errors(bag: Bag, file: Path) -> Generator[None]:
    """While a storage file is being read: whatever goes wrong becomes a BagError that names the bag and the file.

    Broken files make rosbags, sqlite, zstd and struct raise a dozen exception types; ours is one line.
    """
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


def messages(bag: Bag, readers: Sequence[Storage], topics: set[str]) -> Iterator[tuple[str, str, int, bytes]]:
    """(topic, message type, receive time in ns, CDR bytes) of each message of `topics`, file by file.

    CDR is how ROS 2 writes a message as bytes. Order within a file is the library's; nothing downstream depends on it.

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
                    item = (item[0], item[1], zstd.decompress(item[2]))
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
