"""Storage files to messages: every kind is read, odd ones too; damaged ones are refused in one line."""

from __future__ import annotations

import contextlib
import resource
import struct

import numpy as np
import pytest
from rosbags.highlevel import AnyReader
from rosbags.rosbag2 import Reader, storage_mcap

from rosbag_dataset import BagError, find_bags, read_bag, synchronise
from rosbag_dataset.storage import open_storage
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
from tests.checks import TAKE, assert_is_take, both_storages, error_of, read, sql

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
def test_bare_storage_file(tmp_path, storage):
    """A .db3 or .mcap without metadata.yaml is a bag too."""
    bag = write_bag(tmp_path / "bags" / "a", TAKE.messages(), storage)
    (bag / "metadata.yaml").unlink()
    assert [b.name for b in find_bags(tmp_path / "bags")] == [f"a/{storage_file(bag).name}"]
    assert_is_take(tmp_path / "bags")


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
