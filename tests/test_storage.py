"""Storage files to messages: every kind is read, odd ones too; damaged ones are refused in one line."""

from __future__ import annotations

import contextlib
import os
import resource
import shlex
import shutil
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rosbags.highlevel import AnyReader
from rosbags.rosbag1 import Writer as Writer1
from rosbags.rosbag2 import Reader, storage_mcap
from rosbags.typesys import Stores, get_typestore

from rosbag_dataset import BagError, find_bags, read_bag, synchronise
from rosbag_dataset.storage import LimitError, open_storage, unpack, zstd
from tests.bags import (
    JOINT_TOPIC,
    STORE,
    T0_NS,
    edit_metadata,
    make_take,
    ros,
    settings,
    storage_file,
    strip_mcap_index,
    write_bag,
    write_split_bag,
)
from tests.checks import TAKE, assert_is_take, both_storages, error_of, python, read, sql

# -- kinds of storage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        dict(storage="sqlite3"),
        dict(storage="mcap"),
        dict(storage="sqlite3", compression="file"),
        dict(storage="mcap", compression="file"),
        dict(storage="sqlite3", compression="message"),
        dict(storage="mcap", compression="message"),
        dict(storage="mcap", compression="storage"),
    ],
    ids=lambda how: "-".join(how.values()),
)
@pytest.mark.parametrize("parts", [1, 3])
def test_storage_compression_and_splits(tmp_path, how, parts):
    """Every storage, compressed or not, whole or split in several files, gives back exactly what was recorded."""
    messages = TAKE.messages()
    if parts == 1:
        write_bag(tmp_path / "bags" / "a", messages, **how)
    else:
        third = len(messages) // 3
        write_split_bag(
            tmp_path / "bags" / "a", [messages[:third], messages[third : 2 * third], messages[2 * third :]], **how
        )
    assert_is_take(tmp_path / "bags")


@pytest.mark.parametrize("unchunk", [False, True], ids=["chunks", "no-chunks"])
@pytest.mark.parametrize("shuffled", [False, True], ids=["in-order", "shuffled"])
def test_mcap_without_index(tmp_path, unchunk, shuffled):
    """An mcap without a summary section (a recorder that was stopped hard, then repaired) is scanned, in any order."""
    messages = TAKE.messages()
    if shuffled:
        np.random.default_rng(0).shuffle(messages)
    bag = write_bag(tmp_path / "bags" / "a", messages, storage="mcap")
    strip_mcap_index(storage_file(bag), unchunk)
    assert_is_take(tmp_path / "bags")


@both_storages
@pytest.mark.parametrize("compression", ["none", "file"])
def test_bare_storage_file(tmp_path, storage, compression):
    """A .db3, .mcap, .db3.zstd or .mcap.zstd without metadata.yaml is a bag too."""
    bag = write_bag(tmp_path / "bags" / "a", TAKE.messages(), storage, compression)
    assert storage_file(bag).name.endswith(".zstd") == (compression == "file")
    (bag / "metadata.yaml").unlink()
    assert [b.name for b in find_bags(tmp_path / "bags")] == [f"a/{storage_file(bag).name}"]
    assert_is_take(tmp_path / "bags")


# -- what an error says to do -------------------------------------------------------------------------------------


def command_in(message, before, after=", "):
    """The command that a message prints."""
    return message.partition(before)[2].partition(after)[0]


def run_as_printed(command):
    bash = ["bash", "-euo", "pipefail", "-c", command]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(bash, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr)


@pytest.mark.parametrize(
    ("storage", "command"),
    [("sqlite3", "sqlite3 {old} .recover | sqlite3 {new}"), ("mcap", "mcap recover {old} -o {new}")],
)
def test_how_to_recover_a_damaged_file(tmp_path, storage, command):
    """With the paths of the files, whatever they are called: neither tool has to be installed here."""
    file = storage_file(write_bag(tmp_path / "my bags" / "it's one", TAKE.messages(), storage))
    os.truncate(file, file.stat().st_size // 2)
    printed = command_in(error_of(lambda: read(tmp_path / "my bags")), "recover it with: ", ", and put")
    old, new = str(file), str(file.with_name(f"recovered-{file.name}"))
    assert shlex.split(printed) == [part.format(old=old, new=new) for part in command.split()]


@pytest.mark.parametrize("compression", ["none", "file"])
def test_what_is_merged_or_unpacked_as_the_error_says(tmp_path, compression):
    """A write-ahead log, and a file that unpacks to more than it should: afterwards the bag is read."""
    file = storage_file(write_bag(tmp_path / "my bags" / "it's one", TAKE.messages(), compression=compression))
    if compression == "none":
        writer = sqlite3.connect(file)
        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute("CREATE TABLE other (id)")
        for ending in ("", "-wal"):  # as if the recorder had been killed
            shutil.copy(f"{file}{ending}", f"{file}{ending}.kept")
        writer.close()
        for ending in ("", "-wal"):
            os.replace(f"{file}{ending}.kept", f"{file}{ending}")
        command = command_in(error_of(lambda: read(tmp_path / "my bags")), "merge them with: ", "\n")
    else:
        file.write_bytes(zstd.compress(bytes(200 << 20)) + file.read_bytes()[:0])
        command = command_in(error_of(lambda: read(tmp_path / "my bags")), "unpack it first: ", ";")
    run_as_printed(command)
    if compression == "none":
        assert_is_take(tmp_path / "my bags")
    else:
        assert file.with_suffix("").stat().st_size == 200 << 20 and not file.exists()


def test_a_ros_1_bag_is_converted_as_the_error_says(tmp_path):
    """rosbags-convert is there: rosbags is a requirement."""
    ros1 = get_typestore(Stores.ROS1_NOETIC)
    (tmp_path / "bags").mkdir()
    with Writer1(tmp_path / "bags" / "old one.bag") as writer:
        for topic, time_ns, message in TAKE.messages():
            kind = message.__msgtype__
            known = {c.topic: c for c in writer.connections}
            link = known.get(topic) or writer.add_connection(topic, kind, typestore=ros1)
            header = ros1.types["std_msgs/msg/Header"](0, message.header.stamp, "")
            message = ros1.types[kind](header, *list(vars(message).values())[1:-1])
            writer.write(link, time_ns, ros1.serialize_ros1(message, kind))
    run_as_printed(command_in(error_of(lambda: read(tmp_path / "bags")), "convert it first: ", "\n"))
    (tmp_path / "bags" / "old one.bag").unlink()
    recording, images = read(tmp_path / "bags")
    np.testing.assert_array_equal(recording.joint_rad, TAKE.joint_rad)
    np.testing.assert_array_equal(images["color"], TAKE.images)


# -- odd storage --------------------------------------------------------------------------------------------------


@both_storages
def test_qos_that_differs_is_not_a_silent_zero(tmp_path, storage):
    """metadata.yaml with another QoS than the storage: rosbags by folder yields no message at all, we read them."""
    bag = write_bag(tmp_path / "bags" / "a", TAKE.messages(), storage)
    time = {"sec": 0, "nsec": 0}
    qos = dict(
        history=1, depth=10, reliability=1, durability=2, deadline=time, lifespan=time, liveliness=1,
        liveliness_lease_duration=time, avoid_ros_namespace_conventions=False,
    )  # fmt: skip

    def change(info):
        for entry in info["topics_with_message_count"]:
            entry["topic_metadata"]["offered_qos_profiles"] = [qos]

    edit_metadata(bag, change)
    with AnyReader([bag], default_typestore=STORE) as reader:
        assert not list(reader.messages()), "the trap is set"
    assert_is_take(tmp_path / "bags")


def test_legacy_type_names(tmp_path):
    """Converted bags spell sensor_msgs/Image without /msg/."""
    bag = write_bag(tmp_path / "bags" / "a", TAKE.messages())
    sql(bag, "UPDATE topics SET type = replace(type, '/msg/', '/')")
    assert_is_take(tmp_path / "bags")


@both_storages
@pytest.mark.parametrize("encoding", ["ros2msg", "unknown"])
def test_foreign_types_on_other_topics(tmp_path, storage, encoding):
    """Topics that nobody asked for may be of types with garbage definitions; rosbag2 itself writes "unknown"."""
    odd = ("/odd", T0_NS, ros("std_msgs/msg/String", "x"))
    bag = write_bag(tmp_path / "bags" / "a", [*TAKE.messages(), odd], storage)
    if storage == "sqlite3":
        sql(
            bag,
            "UPDATE topics SET type = 'acme_msgs/srv/Do_Event', offered_qos_profiles = 'not: [qos' WHERE name = '/odd'",
            "UPDATE message_definitions SET topic_type = 'acme_msgs/srv/Do_Event', encoded_message_definition = '?(', "
            f"encoding = '{encoding}' WHERE topic_type LIKE 'std_msgs%'",
        )
    else:
        text = STORE.generate_msgdef("std_msgs/msg/String", ros_version=2)[0].encode()
        content = storage_file(bag).read_bytes()
        schema = b"std_msgs/msg/String" + b"\x07\0\0\0ros2msg" + struct.pack("<I", len(text)) + text
        garbage = b"acme_msgs/msg/Event" + b"\x07\0\0\0" + encoding.encode() + schema[30:34] + b"(" * len(text)
        assert content.count(schema) == 2 and len(schema) == len(garbage), "once in the data and once in the summary"
        storage_file(bag).write_bytes(content.replace(schema, garbage))
    assert_is_take(tmp_path / "bags")


def test_sqlite_without_message_definitions(tmp_path):
    """Bags older than Iron hold no definitions, no hashes and an older table layout."""
    bag = write_bag(tmp_path / "bags" / "a", TAKE.messages())
    sql(
        bag,
        "DROP TABLE message_definitions",
        "DROP TABLE schema",
        "DROP TABLE metadata",
        "ALTER TABLE topics DROP COLUMN type_description_hash",
        "ALTER TABLE topics DROP COLUMN offered_qos_profiles",
        "DROP INDEX timestamp_idx",
    )
    assert_is_take(tmp_path / "bags")


def test_write_ahead_log_that_was_never_merged(tmp_path):
    """A -wal file holds messages that a read-only open would not see: refused with the command that merges it."""
    bag = write_bag(tmp_path / "bags" / "a", TAKE.messages())
    file = storage_file(bag)
    (bag / f"{file.name}-wal").write_bytes(b"x" * 100)
    message = error_of(lambda: read(tmp_path / "bags"))
    assert message.startswith("a: ") and "-wal" in message and "wal_checkpoint" in message
    (bag / f"{file.name}-wal").write_bytes(b"")
    assert_is_take(tmp_path / "bags")


def test_rosbags_itself_stays_as_it_is(tmp_path):
    """What we do about definitions that rosbags refuses is done to our reader: rosbags' own still refuses them."""
    odd = ("/odd", T0_NS, ros("std_msgs/msg/String", "x"))
    bag = write_bag(tmp_path / "bags" / "a", [*TAKE.messages(), odd], "mcap")
    file = storage_file(bag)
    file.write_bytes(file.read_bytes().replace(b"\x07\0\0\0ros2msg", b"\x07\0\0\0unknown"))
    before = vars(storage_mcap).copy(), vars(storage_mcap.McapReader).copy(), vars(Reader).copy()
    assert_is_take(tmp_path / "bags")
    assert (vars(storage_mcap), vars(storage_mcap.McapReader), vars(Reader)) == before
    assert not [name for name, thing in before[0].items() if "rosbag_dataset" in str(getattr(thing, "__module__", ""))]
    with pytest.raises(KeyError, match="unknown"):
        Reader(file).open()


@both_storages
def test_two_publishers_on_one_topic(tmp_path, storage):
    """Two connections of one topic are read as one topic, and their counts add up."""
    bag = write_bag(tmp_path / "bags" / "a", TAKE.messages(), storage, publishers=2)
    with contextlib.ExitStack() as stack:
        (reader,) = open_storage(find_bags(bag)[0], stack)
        assert [c.topic for c in reader.connections].count(JOINT_TOPIC) == 2
    assert_is_take(tmp_path / "bags")


@pytest.mark.parametrize("change", ["timestamp = 'noon'", "timestamp = 1.5", "data = 'text'", "data = x'00'"])
def test_sqlite_values_of_another_type(tmp_path, change):
    """Sqlite types values, not columns: a damaged cell may hold anything."""
    bag = write_bag(tmp_path / "bags" / "a", TAKE.messages())
    sql(bag, f"UPDATE messages SET {change} WHERE id = 3")
    message = error_of(lambda: read(tmp_path / "bags"))
    assert message.startswith("a: ") and ("a.db3 is damaged" in message or "message 3: not a valid" in message)


# -- more memory, disk or time than a recording can need ----------------------------------------------------------

GB = 1_000_000_000
HEAD = ("<8sBQI4sI", b"\x89MCAP0\r\n", 1, 12, 4, b"ros2", 0)  # magic, and the header record with its profile


def zeros(size: int, declared: int | None = None) -> bytes:
    """A zstd frame of `size` zeros (in steps of 128 KiB), four bytes for each 128 KiB; it may declare another size."""
    blocks, last = size >> 17, 1
    header = b"\x28\xb5\x2f\xfd" + (b"\0\x38" if declared is None else b"\xc0\x38" + struct.pack("<Q", declared))
    block = [struct.pack("<I", flag | 1 << 1 | 1 << 20)[:3] + b"\0" for flag in (0, last)]
    return header + block[0] * (blocks - 1) + block[1]


def mcap(chunk: bytes, declared: int, indexed: int = 0) -> bytes:
    """An mcap file of one zstd chunk, which its index, if it has one, names so many times."""
    record = struct.pack("<QQQII4sQ", 0, 0, declared, 0, 4, b"zstd", len(chunk)) + chunk
    head = struct.pack(*HEAD)
    size = len(record) + 9
    index = struct.pack("<QQQQIQI4sQQ", 0, 1, len(head), size, 0, 0, 4, b"zstd", len(chunk), declared)
    body = head + struct.pack("<BQ", 6, len(record)) + record
    summary = (struct.pack("<BQ", 8, len(index)) + index) * indexed
    return body + summary + struct.pack("<BQQQI", 2, 20, len(body) * bool(indexed), 0, 0) + head[:8]


def bag_of(path, content: bytes, compression: str):
    """A recording with this storage file, or for "message", whose third message has these bytes."""
    bag = write_bag(path, TAKE.messages(), compression=compression if compression == "message" else "file")
    if compression == "message":
        with sqlite3.connect(storage_file(bag)) as db:
            db.execute("UPDATE messages SET data = ? WHERE id = 3", (content,))
        db.close()
    elif compression == "file":
        storage_file(bag).write_bytes(content)
    else:
        shutil.rmtree(bag)
        path.with_suffix(".mcap.zstd" if compression == "bare file" else ".mcap").write_bytes(content)


BOMBS = {  # what lies in the bag, how, and what the error names
    "message": (zeros(4 * GB), "message", ["a.db3: /", "bytes unpacks to more than 134217728"]),
    "message that says so": (zeros(4 * GB, 4 * GB), "message", ["it declares 4000000000"]),
    "message that lies": (zeros(4 * GB, 100), "message", ["a: a.db3"]),
    "file": (zeros(3 * GB), "file", ["bytes unpack to 135", "expected at most 134217728", "unzstd --rm /"]),
    "file that says so": (zeros(3 * GB, 3 * GB), "file", ["bytes that declare 3000000000 unpacked"]),
    "bare file": (zeros(3 * GB, 3 * GB), "bare file", ["a.mcap.zstd: ", "bytes that declare 3000000000 unpacked"]),
    "chunk": (mcap(zeros(4 * GB), 1000), "none", ["bytes unpacks to more than 1000 bytes"]),
    "chunk that says so": (mcap(zeros(4 * GB), 4 * GB), "none", ["a chunk declares 4000000000 bytes unpacked"]),
    "one chunk, many times": (mcap(zeros(100 << 20), 100 << 20, indexed=40), "none", ["declare 4194304000 unpacked"]),
}  # fmt: skip
PEAK_OF_A_REFUSAL = """
import sys; from pathlib import Path
from rosbag_dataset import BagError, find_bags, read_bag; from tests.bags import settings
def peak_kib():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
(bag,) = find_bags(Path(sys.argv[1]))
before = peak_kib()
try:
    read_bag(bag, settings(Path(sys.argv[1])), lambda camera, rgb: None, scratch=Path(sys.argv[2]))
except BagError as error:
    print(peak_kib() - before, error, sep="\\n")
"""


@pytest.mark.parametrize("content, compression, words", BOMBS.values(), ids=list(BOMBS))
def test_what_unpacks_to_gigabytes_is_refused(tmp_path, content, compression, words):
    """In one line that names the file and both sizes, within some hundred MB of memory and of disk."""
    bag_of(tmp_path / "bags" / "a", content, compression)
    (tmp_path / "scratch").mkdir()
    with_a_small_disk = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (GB, GB)))
    process = python(PEAK_OF_A_REFUSAL, tmp_path / "bags", tmp_path / "scratch", **with_a_small_disk)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    grown_kib, message = stdout.splitlines()
    assert message.startswith("a") and all(word in message for word in words), message
    assert int(grown_kib) < 400 * 1024, f"{grown_kib} KiB"
    assert not any((tmp_path / "scratch").iterdir())


def test_zstd_frames_are_unpacked_as_by_the_library():
    """Whole, several in a row, to the last byte that is allowed; what is cut short is refused."""
    for data in (b"", b"x", bytes(1000), np.random.default_rng(0).bytes(300_000)):
        packed = zstd.compress(data)
        assert unpack(packed, len(data), "it") == data
        assert unpack(packed + packed, 2 * len(data), "it") == data + data
        for cut in (0, 1, len(packed) // 2, len(packed) - 1):
            with pytest.raises(zstd.ZstdError):
                unpack(packed[:cut], len(data), "it")
        if data:
            with pytest.raises(LimitError, match="more than"):
                unpack(packed, len(data) - 1, "it")
            with pytest.raises(LimitError, match="more than"):
                unpack(packed + packed, 2 * len(data) - 1, "it")


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i id, 1 topic_id, 0 timestamp FROM n"
COLUMNS = "id INTEGER PRIMARY KEY, topic_id INTEGER, timestamp INTEGER"
TRAPS = {
    "an endless view": (f"CREATE VIEW messages AS {ENDLESS}", "messages: expected a table"),
    "a computed column": (
        f"CREATE TABLE messages({COLUMNS}, data AS (zeroblob(900000000)))", "messages: expected a table",
    ),
    "topics that are computed": (
        f"CREATE VIEW topics AS SELECT i id, i name, i type FROM ({ENDLESS})", "topics: expected a table",
    ),
}  # fmt: skip


@pytest.mark.timeout(30)
@pytest.mark.parametrize("statement, fact", TRAPS.values(), ids=list(TRAPS))
def test_sqlite_rows_that_are_computed_are_refused(tmp_path, statement, fact):
    """A view or a computed column is rows without end, or bytes without end, out of a few words."""
    bag = write_bag(tmp_path / "bags" / "a", TAKE.messages())
    sql(bag, f"DROP TABLE {'topics' if ' topics' in statement else 'messages'}", statement)
    message = error_of(lambda: read(tmp_path / "bags"))
    assert message.startswith(f"a: a.db3: {fact}"), message


@pytest.mark.timeout(60)
def test_a_table_that_leads_in_circles_is_left(tmp_path):
    """Each inner page of its tree names the next one 400 times: with seven of them a petabyte of rows in 40 KB."""
    bag = write_bag(tmp_path / "bags" / "a", TAKE.messages())
    with sqlite3.connect(storage_file(bag)) as db:
        db.execute("CREATE TABLE filler(x)")
        db.execute("INSERT INTO filler VALUES (zeroblob(100000))")
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'messages'").fetchone()
        (page_size,) = db.execute("PRAGMA page_size").fetchone()
    db.close()
    content = bytearray(storage_file(bag).read_bytes())
    pages = [root, *range(len(content) // page_size - 7, len(content) // page_size)]
    leaf = next(n for n in range(1, len(content) // page_size) if content[n * page_size] == 13 and n + 1 != root) + 1
    for page, child in zip(pages, [*pages[1:], leaf], strict=True):
        cells = 400
        cell = struct.pack(">IB", child, 1)
        at = page_size - len(cell)
        head = struct.pack(">BHHHBI", 5, 0, cells, at, 0, child) + struct.pack(">H", at) * cells
        begin = (page - 1) * page_size
        content[begin : begin + page_size] = (head + bytes(page_size))[:at] + cell
    storage_file(bag).write_bytes(content)
    message = error_of(lambda: read(tmp_path / "bags"))
    assert message.startswith("a: a.db3"), message


# -- damage at random ---------------------------------------------------------------------------------------------


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """One to eight bytes changed, or a piece cut off the end, or out of the middle."""
    kind = rng.integers(4)
    if kind == 0:
        return content[: rng.integers(len(content))]
    if kind == 1:
        a, b = np.sort(rng.integers(len(content), size=2))
        return content[:a] + content[b:]
    out = np.frombuffer(content, np.uint8).copy()
    # half of the flips go where the structure is: the first and last KiB
    places = rng.integers(len(out), size=rng.integers(1, 9))
    if kind == 3:
        places = np.where(places % 2, places % 1024, len(out) - 1 - places % 1024)
    out[places] = rng.integers(256, size=len(places))
    return out.tobytes()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("bare", [False, True], ids=["with-metadata", "bare"])
@both_storages
def test_random_damage_raises_nothing_but_bag_errors(tmp_path, storage, bare):
    """150 mutations of a small file each: read, or refused in one line; no traceback, no hang, no memory eaten."""
    take = make_take(seconds=0.15)
    bag = write_bag(tmp_path / "bags" / "a", take.messages(), storage)
    file = storage_file(bag)
    if bare:
        (bag / "metadata.yaml").unlink()
    content, wanted = file.read_bytes(), settings(tmp_path / "bags")
    rng = np.random.default_rng(len(storage) + bare)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for _ in range(150):
        file.write_bytes(mutate(content, rng))
        try:
            (found,) = find_bags(tmp_path / "bags")
            synchronise("a", read_bag(found, wanted, lambda camera, rgb: None), wanted)
        except BagError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert refused > 20, "the damage was real"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 200 * 1024
