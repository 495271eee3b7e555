"""Bags to times, joints and pixels: odd bags are read, bad ones are refused in one line."""

from __future__ import annotations

import contextlib
import os
import resource
import sqlite3
import struct
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from rosbags.highlevel import AnyReader

import rosbag_dataset as rd
from tests.bags import (
    CAMERA_TOPIC,
    JOINT_TOPIC,
    JOINTS,
    STORE,
    T0_NS,
    compressed,
    edit_metadata,
    encode,
    image,
    joint_state,
    make_take,
    noise_images,
    ros,
    settings,
    storage_file,
    strip_mcap_index,
    write_bag,
    write_split_bag,
)

TAKE = make_take(seconds=0.4)
STORAGES = ("sqlite3", "mcap")
both_storages = pytest.mark.parametrize("storage", STORAGES)


def read(bag_dir, **changes):
    """The only bag below `bag_dir`: -> (Recording, {camera: (N, H, W, 3)})."""
    (bag,) = rd.find_bags(bag_dir)
    images = {}
    recording = rd.read_bag(
        bag, settings(bag_dir, **changes), lambda camera, rgb: images.setdefault(camera, []).append(rgb.copy())
    )
    return recording, {camera: np.stack(frames) for camera, frames in images.items()}


def assert_is_take(bag_dir, take=TAKE, **changes):
    """Every joint position, every pixel and every time of the take came out of the bag."""
    recording, images = read(bag_dir, **changes)
    joints, camera = np.argsort(recording.joint_time_ns), np.argsort(recording.camera_time_ns["color"])
    np.testing.assert_array_equal(recording.joint_time_ns[joints], take.joint_ns)
    np.testing.assert_array_equal(recording.joint_rad[joints], take.joint_rad)
    np.testing.assert_array_equal(recording.camera_time_ns["color"][camera], take.camera_ns)
    np.testing.assert_array_equal(images["color"][camera], take.images)


def error_of(action):
    """The message of the BagError that `action` raises, which is one line."""
    with pytest.raises(rd.BagError) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def sql(bag, *statements):
    with sqlite3.connect(storage_file(bag)) as db:
        for statement in statements:
            db.execute(statement)
    db.close()


# -- kinds of bags ------------------------------------------------------------------------------------------------


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
    assert [b.name for b in rd.find_bags(tmp_path / "bags")] == [f"a/{storage_file(bag).name}"]
    assert_is_take(tmp_path / "bags")


def test_bags_are_found_recursively_and_sorted(tmp_path):
    """Bags at any depth, through links, once each; hidden folders and files are passed over."""
    root = tmp_path / "bags"
    for name in ("b", "a/deep/er", ".hidden/c", "a/.trash/d"):
        write_bag(root / name, TAKE.messages()[:3])
    write_bag(tmp_path / "elsewhere" / "e", TAKE.messages()[:3])
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "up").symlink_to(root)  # a loop
    (root / ".partial.db3").write_bytes(b"")
    (root / "notes.txt").write_text("no bag")
    assert [b.name for b in rd.find_bags(root)] == ["a/deep/er", "b", "link/e"]


def test_folder_that_is_one_bag(tmp_path):
    """data.bag_dir may be a single bag; the episode is called after the folder."""
    write_bag(tmp_path / "solo", TAKE.messages())
    assert [b.name for b in rd.find_bags(tmp_path / "solo")] == ["solo"]
    assert_is_take(tmp_path / "solo")


# -- odd bags -----------------------------------------------------------------------------------------------------


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


@both_storages
def test_renamed_storage_file(tmp_path, storage):
    """The storage file under another name than metadata.yaml says."""
    bag = write_bag(tmp_path / "bags" / "a", TAKE.messages(), storage)
    file = storage_file(bag)
    file.rename(file.with_stem("renamed_later"))
    assert_is_take(tmp_path / "bags")


@both_storages
@pytest.mark.parametrize("name", ["2024-05-01.bag", "run #1", "50%41", "what?", "data.set", "two  words", "grün"])
def test_folder_names(tmp_path, storage, name):
    """Folder names that look like a ROS 1 file, or that an URI would take apart."""
    bag = write_bag(tmp_path / "plain", TAKE.messages(), storage)
    (tmp_path / "bags").mkdir()
    bag.rename(tmp_path / "bags" / name)
    assert [b.name for b in rd.find_bags(tmp_path / "bags")] == [name]
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


@both_storages
def test_two_publishers_on_one_topic(tmp_path, storage):
    """Two connections of one topic are read as one topic, and their counts add up."""
    bag = write_bag(tmp_path / "bags" / "a", TAKE.messages(), storage, publishers=2)
    with contextlib.ExitStack() as stack:
        (reader,) = rd.open_storage(rd.find_bags(bag)[0], stack)
        assert [c.topic for c in reader.connections].count(JOINT_TOPIC) == 2
    assert_is_take(tmp_path / "bags")


# -- joints -------------------------------------------------------------------------------------------------------


def joint_bag(tmp_path, *messages):
    """A bag with an image at each end and these JointState messages, 10 ms apart."""
    joints = [(JOINT_TOPIC, T0_NS + i * 10**7, m) for i, m in enumerate(messages)]
    frames = [(CAMERA_TOPIC, T0_NS + t, image(T0_NS, TAKE.images[0])) for t in (0, 10**7)]
    write_bag(tmp_path / "bags" / "a", joints + frames)
    return tmp_path / "bags"


def test_joints_by_name_in_every_message(tmp_path):
    """The order of the names may change from message to message; other joints in the message are ignored."""
    rng = np.random.default_rng(3)
    want = rng.normal(size=(20, 6))
    messages = []
    for row in want:
        names = [*JOINTS, "gripper_finger", "wheel"]
        order = rng.permutation(8)
        values = np.append(row, [9.0, np.nan])  # an unasked joint may even be nan
        messages.append(joint_state(T0_NS, values[order], [names[i] for i in order]))
    recording, _ = read(joint_bag(tmp_path, *messages))
    np.testing.assert_array_equal(recording.joint_rad, want)


def test_joint_prefix_and_own_order(tmp_path):
    """Prefixed names are names as any other, and state follows data.joint_names, not the message."""
    names = [f"ur10e_{n}" for n in JOINTS]
    bag_dir = joint_bag(tmp_path, *[joint_state(T0_NS, np.arange(6.0) + i, names) for i in range(3)])
    picked = ("ur10e_elbow_joint", "ur10e_shoulder_pan_joint")
    recording, _ = read(bag_dir, joint_names=picked, joint_sign=[1, 1])
    np.testing.assert_array_equal(recording.joint_rad, [[2, 0], [3, 1], [4, 2]])
    assert settings(bag_dir, joint_names=picked).revolute.all()


def test_velocity_and_effort_may_be_empty(tmp_path):
    """Only positions are read."""
    message = joint_state(T0_NS, np.arange(6.0))
    message.velocity = np.zeros(0)
    recording, _ = read(joint_bag(tmp_path, message, message))
    np.testing.assert_array_equal(recording.joint_rad[0], np.arange(6))


@pytest.mark.parametrize(
    ("values", "names", "words"),
    [
        (range(5), JOINTS[:5], ["wrist_3_joint is missing", "wrist_2_joint", "data.joint_names"]),
        (
            range(6),
            [f"ur_{n}" for n in JOINTS],
            ["has: ur_shoulder_pan_joint, ur_shoulder_lift_joint"],
        ),
        (range(6), (), ["none at all", "name field is empty"]),
        (range(5), JOINTS, ["6 joint names but 5 positions"]),
        ((), JOINTS, ["6 joint names but 0 positions"]),
        ((0, 1, np.nan, 3, 4, 5), JOINTS, ["elbow_joint is nan"]),
        ((0, 1, 2, 3, 4, -np.inf), JOINTS, ["wrist_3_joint is -inf"]),
    ],
    ids=["one-missing", "prefix", "no-names", "short", "no-positions", "nan", "inf"],
)
def test_bad_joints(tmp_path, values, names, words):
    """A bad JointState anywhere is refused, with the bag, topic, message and joint in the line."""
    good = joint_state(T0_NS, np.arange(6.0))
    bag_dir = joint_bag(tmp_path, good, good, joint_state(T0_NS, list(values), names))
    message = error_of(lambda: read(bag_dir))
    assert message.startswith(f"a: {JOINT_TOPIC}, message 3: ")
    assert all(word in message for word in words), message


# -- image encodings ----------------------------------------------------------------------------------------------

PALETTE = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30], [255, 255, 255], [0, 0, 0]], np.uint8)
PAINTED = PALETTE[[[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]]]  # (3, 4, 3)
GREY = np.array([[0, 1, 2, 127], [128, 129, 254, 255], [10, 100, 200, 50]], np.uint8)
WHOLE = GREY.astype(np.uint16) * 256 + 77  # what a 16-bit camera sees; the low byte is not kept
BAYER = ("rggb", "bggr", "gbrg", "grbg")


def grey3(grey):
    return np.repeat(np.asarray(grey, np.uint8)[..., None], 3, axis=2)


def through_cdr(message):
    """As it comes out of a bag."""
    return STORE.deserialize_cdr(STORE.serialize_cdr(message, message.__msgtype__), message.__msgtype__)


def decode(message, resize=None):
    rgb, shape = rd._image(through_cdr(message), message.__msgtype__, resize, "here", decode=True)
    assert rgb.dtype == np.uint8 and rgb.flags.c_contiguous and rgb.shape[2] == 3
    return rgb


def pad_rows(pixels, extra, last_row_too=True):
    """-> fields of an Image whose rows are followed by `extra` bytes of rubbish."""
    rows = [row.tobytes() + b"\xaa" * extra for row in pixels]
    data = b"".join(rows) if last_row_too else b"".join(rows)[:-extra]
    return dict(step=len(rows[0]), data=np.frombuffer(data, np.uint8))


alpha = np.full((3, 4, 1), 99, np.uint8)
RAW_CASES = {
    "rgb8": (PAINTED, PAINTED),
    "bgr8": (PAINTED[..., [2, 1, 0]], PAINTED),
    "rgba8": (np.concatenate([PAINTED, alpha], axis=2), PAINTED),
    "bgra8": (np.concatenate([PAINTED[..., [2, 1, 0]], alpha], axis=2), PAINTED),
    "mono8": (GREY, grey3(GREY)),
    "mono16": (WHOLE, grey3(GREY)),
    # one level per centimetre: 0 = none, 4 mm, 5.1 mm, 1 cm | 254 cm, 255 cm, 3 m, 65 m | ...
    "16UC1": (
        np.array([[0, 4, 6, 10], [2540, 2550, 3000, 65535], [1000, 1234, 1237, 99]], np.uint16),
        grey3([[0, 0, 1, 1], [254, 255, 255, 255], [100, 123, 124, 10]]),
    ),
    "32FC1": (
        np.array([[0, 0.004, 0.006, 0.01], [2.54, 2.55, 3.0, 1e30], [np.nan, np.inf, -np.inf, -1]], np.float32),
        grey3([[0, 0, 1, 1], [254, 255, 255, 255], [0, 0, 0, 0]]),
    ),
}


def test_every_encoding_has_a_test():
    """Whoever adds an encoding adds its expectation here."""
    bayer = {f"bayer_{p}{bits}" for p in BAYER for bits in (8, 16)}
    assert set(rd._RAW_ENCODINGS) == set(RAW_CASES) | bayer


@pytest.mark.parametrize("rows", ["plain", "padded", "last-row-short"])
@pytest.mark.parametrize("big", [False, True], ids=["little-endian", "big-endian"])
@pytest.mark.parametrize("encoding", RAW_CASES)
def test_raw_encodings(encoding, big, rows):
    """Known colours, greys and depths, with `step` wider than the row, in both byte orders."""
    pixels, want = RAW_CASES[encoding]
    stored = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<"))
    padding = {} if rows == "plain" else pad_rows(stored, 5, last_row_too=rows == "padded")
    np.testing.assert_array_equal(decode(image(T0_NS, stored, encoding, is_bigendian=int(big), **padding)), want)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("pattern", BAYER)
def test_bayer(pattern, bits):
    """A mosaic of a smooth colour image, built by hand from the pattern's letters, comes back within 2 levels."""
    y, x = np.mgrid[0:32, 0:40]
    rgb = np.stack([40 + 3 * x, 200 - 2 * y, 30 + x + 2 * y], axis=2).astype(np.uint8)
    mosaic = np.zeros((32, 40), np.uint8)
    for i, letter in enumerate(pattern):  # the letters go row by row over each 2x2 cell
        r, c = divmod(i, 2)
        mosaic[r::2, c::2] = rgb[r::2, c::2, "rgb".index(letter)]
    stored = mosaic if bits == 8 else mosaic.astype("<u2") * 256 + 77
    got = decode(image(T0_NS, stored, f"bayer_{pattern}{bits}"))
    inside = np.s_[2:-2, 2:-2]
    assert np.abs(got[inside].astype(int) - rgb[inside]).max() <= 2


@pytest.mark.parametrize("size", [(3, 4), (6, 2), (2, 3), (7, 5), (11, 16)], ids=str)
@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "mono8", "jpeg"])
def test_resize_is_that_of_opencv(encoding, size):
    """image_resize, with another aspect too: INTER_AREA when it shrinks both ways, else INTER_LINEAR."""
    rgb = cv2.GaussianBlur(noise_images(1, (7, 8), seed=1)[0], (3, 3), 1)
    if encoding == "mono8":
        message, rgb = image(T0_NS, rgb[..., 0], encoding), grey3(rgb[..., 0])
    elif encoding == "jpeg":
        jpeg = encode(rgb, ".jpg")
        message, rgb = compressed(T0_NS, jpeg), cv2.imdecode(np.frombuffer(jpeg, np.uint8), 1)[..., ::-1].copy()
    else:
        message = image(T0_NS, rgb if encoding == "rgb8" else rgb[..., ::-1], encoding)
    how = cv2.INTER_AREA if size[0] <= 7 and size[1] <= 8 else cv2.INTER_LINEAR
    np.testing.assert_array_equal(decode(message, size), cv2.resize(rgb, size[::-1], interpolation=how))


def with_exif_rotation(jpeg: bytes) -> bytes:
    """The same JPEG with an EXIF tag that asks viewers to turn it by 90 degrees."""
    tiff = b"II*\0" + struct.pack("<IHHHIIHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)[:22]
    segment = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


SMOOTH = cv2.resize(PAINTED, (48, 32), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize(
    ("data", "kind", "want", "levels"),
    [
        (encode(SMOOTH, ".jpg"), "jpeg", SMOOTH, 40),
        (encode(SMOOTH, ".jpg"), "rgb8; jpeg compressed bgr8", SMOOTH, 40),
        (with_exif_rotation(encode(SMOOTH, ".jpg")), "jpeg", SMOOTH, 40),
        (encode(grey3(GREY), ".png"), "png", grey3(GREY), 0),
        (encode(PAINTED, ".png"), "png", PAINTED, 0),
        (encode(PAINTED, ".png"), "bgr8; png compressed bgr8", PAINTED, 0),
        (cv2.imencode(".png", GREY)[1].tobytes(), "mono8; png compressed", grey3(GREY), 0),
        (cv2.imencode(".png", np.dstack([PAINTED[..., ::-1], alpha]))[1].tobytes(), "png", PAINTED, 0),
        (cv2.imencode(".png", RAW_CASES["16UC1"][0])[1].tobytes(), "16UC1; png compressed ", RAW_CASES["16UC1"][1], 0),
        (cv2.imencode(".png", RAW_CASES["16UC1"][0])[1].tobytes(), "16UC1", RAW_CASES["16UC1"][1], 0),
        (cv2.imencode(".png", WHOLE)[1].tobytes(), "mono16; png compressed mono16", grey3(GREY), 0),
    ],
    ids=["jpeg", "rgb8-jpeg", "exif", "png-grey", "png", "bgr8-png", "mono8-png", "rgba-png", "16UC1",
         "16UC1-bare", "mono16"],
)  # fmt: skip
def test_compressed_images(data, kind, want, levels):
    """JPEG and PNG of each format string as RGB; EXIF does not turn a robot's camera."""
    got = decode(compressed(T0_NS, data, kind)).astype(int)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= levels
    assert np.abs(got - want).mean() <= levels / 8
    if levels:  # chroma subsampling blurs edges; a swap of red and blue would be far away
        assert np.abs(got[..., ::-1] - want).mean() > 5 * np.abs(got - want).mean()


def test_exif_fixture_turns_elsewhere():
    """The EXIF case above is a real one: a reader that obeys the tag turns the image."""
    data = np.frombuffer(with_exif_rotation(encode(SMOOTH, ".jpg")), np.uint8)
    assert cv2.imdecode(data, cv2.IMREAD_COLOR).shape[:2] == (48, 32)


SHORT = np.frombuffer(bytes(100), np.uint8)
JPEG, PNG = encode(SMOOTH, ".jpg"), encode(SMOOTH, ".png")


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (image(0, PAINTED, data=SHORT[:35]), ["35 bytes", "3x4 rgb8", "36"]),
        (image(0, PAINTED, step=200, data=SHORT), ["100 bytes", "412"]),
        (image(0, PAINTED, data=SHORT[:0]), ["0 bytes"]),
        (image(0, PAINTED, step=11), ["step of 11", "at least 12"]),
        (image(0, PAINTED, height=0), ["0x4"]),
        (image(0, PAINTED, width=0), ["3x0"]),
        (image(0, PAINTED, height=2**32 - 1, width=2**31), ["step"]),
        (image(0, PAINTED, encoding="yuv422"), ["'yuv422'", "rgb8", "bayer_grbg16"]),
        (image(0, PAINTED, encoding=""), ["encoding ''"]),
        (compressed(0, JPEG[: len(JPEG) // 2]), ["JPEG breaks off", str(len(JPEG) // 2)]),
        (compressed(0, JPEG[:-2]), ["JPEG breaks off"]),
        (compressed(0, PNG[: len(PNG) // 2], "png"), ["do not decode"]),
        (compressed(0, PNG[:16] + b"\x00\xff\xff\xff\x00\xff\xff\xff" + PNG[24:], "png"), ["do not decode"]),
        (compressed(0, b""), ["0 bytes", "do not decode"]),
        (compressed(0, b"no picture", "tiff"), ["'tiff'", "do not decode"]),
        (compressed(0, bytes(12) + PNG, "16UC1; compressedDepth png"), ["compressedDepth", "not supported"]),
        (compressed(0, cv2.imencode(".png", WHOLE)[1], "png"), ["uint16", "'png'"]),
    ],
    ids=["short", "short-step", "empty", "step", "height", "width", "huge", "yuv", "no-encoding", "jpeg-half",
         "jpeg-end", "png-half", "png-huge", "nothing", "tiff", "compressedDepth", "png-16"],
)  # fmt: skip
def test_bad_images(message, words):
    """A payload that is short, or of a kind that is not supported, is refused and never guessed at."""
    kind = message.__msgtype__
    text = error_of(lambda: rd.decode_image(through_cdr(message), kind, "a: /camera, message 7"))
    assert text.startswith("a: /camera, message 7: ")
    assert all(word in text for word in words), text


# -- time ---------------------------------------------------------------------------------------------------------


def test_time_source(tmp_path):
    """`receive` is the bag's clock, `header` the publishers'."""
    write_bag(tmp_path / "bags" / "a", TAKE.messages(clock_offset_ns=-123_456_789))
    receive, _ = read(tmp_path / "bags")
    headers, _ = read(tmp_path / "bags", time_source="header")
    np.testing.assert_array_equal(receive.joint_time_ns, TAKE.joint_ns)
    np.testing.assert_array_equal(headers.joint_time_ns, TAKE.joint_ns - 123_456_789)
    np.testing.assert_array_equal(headers.camera_time_ns["color"], TAKE.camera_ns - 123_456_789)


def test_zero_header_stamps(tmp_path):
    """A stamp that was never set is no time: refused, with the way out; as receive times they are of no interest."""
    take = make_take(seconds=0.2)
    messages = take.messages()
    messages[4] = (JOINT_TOPIC, messages[4][1], joint_state(0, take.joint_rad[0]))
    write_bag(tmp_path / "bags" / "a", messages)
    message = error_of(lambda: read(tmp_path / "bags", time_source="header"))
    assert JOINT_TOPIC in message and "header.stamp is 0" in message and "data.time_source: receive" in message
    read(tmp_path / "bags")


def test_receive_time_out_of_range(tmp_path):
    """Negative receive times come from a damaged file."""
    bag = write_bag(tmp_path / "bags" / "a", TAKE.messages())
    sql(bag, "UPDATE messages SET timestamp = -5 WHERE id = 3")
    assert "-5 ns is out of range" in error_of(lambda: read(tmp_path / "bags"))


@pytest.mark.parametrize("change", ["timestamp = 'noon'", "timestamp = 1.5", "data = 'text'", "data = x'00'"])
def test_sqlite_values_of_another_type(tmp_path, change):
    """Sqlite types values, not columns: a damaged cell may hold anything."""
    bag = write_bag(tmp_path / "bags" / "a", TAKE.messages())
    sql(bag, f"UPDATE messages SET {change} WHERE id = 3")
    message = error_of(lambda: read(tmp_path / "bags"))
    assert message.startswith("a: ") and ("a.db3 is damaged" in message or "message 3: not a valid" in message)


# -- the table of bad input ---------------------------------------------------------------------------------------


def without(topic):
    return [m for m in TAKE.messages() if m[0] != topic]


def camera_messages(*images, offset=0):
    return [(CAMERA_TOPIC, int(t) + offset, m) for t, m in zip(TAKE.camera_ns, images, strict=False)]


def truncated(storage, share):
    def make(path):
        file = storage_file(write_bag(path, TAKE.messages(), storage))
        os.truncate(file, int(file.stat().st_size * share))

    return make


def claims(count):
    def change(info):
        info["topics_with_message_count"][0]["message_count"] += count

    return lambda path: edit_metadata(write_bag(path, TAKE.messages()), change)


def unlisted_file(path):
    """A split bag of which one file was not copied."""
    messages = TAKE.messages()
    bag = write_split_bag(path, [messages[:30], messages[30:]])
    sorted(bag.glob("*.db3"))[1].unlink()


def metadata_text(text):
    return lambda path: (write_bag(path, TAKE.messages()) / "metadata.yaml").write_text(text)


def ros1(path):
    path.mkdir(parents=True)
    (path / "old.bag").write_bytes(b"#ROSBAG V2.0\n")


def dangling(path):
    path.mkdir(parents=True)
    (path / "lost.db3").symlink_to(path / "nowhere.db3")


def bag_of(messages, **how):
    return lambda path: write_bag(path, messages, **how)


def still_joints():
    return [(t, n, joint_state(n, np.ones(6)) if t == JOINT_TOPIC else m) for t, n, m in TAKE.messages()]


TWO_SIZES = (TAKE.images[0], noise_images(1, (8, 10), seed=5)[0])
BIGGER = noise_images(12, (8, 10), seed=5)
IMAGE, JOINT = "sensor_msgs/msg/Image", "sensor_msgs/msg/JointState"
STRING = ros("std_msgs/msg/String", "x")

BAD_BAGS = {
    "no-joint-topic": (bag_of(without(JOINT_TOPIC)), ["data.joint_topic", f"{CAMERA_TOPIC} ({IMAGE}, 11)"]),
    "no-camera-topic": (bag_of(without(CAMERA_TOPIC)), ["data.camera_topics.color", f"{JOINT_TOPIC} ({JOINT}, 50)"]),
    "wrong-type": (
        bag_of([*without(CAMERA_TOPIC), (CAMERA_TOPIC, T0_NS, STRING)]),
        [CAMERA_TOPIC, "std_msgs/msg/String", f"expected sensor_msgs/msg/CompressedImage or {IMAGE}"],
    ),
    "no-message": (bag_of(without(CAMERA_TOPIC), extra_topics=[(CAMERA_TOPIC, IMAGE)]), [CAMERA_TOPIC, "no message"]),
    "empty-bag": (bag_of([], extra_topics=[(CAMERA_TOPIC, IMAGE), (JOINT_TOPIC, JOINT)]), ["no message"]),
    "no-topics": (bag_of([]), ["no topic", "none"]),
    "truncated-db3": (truncated("sqlite3", 0.6), ["b.db3 is damaged", "sqlite3 FILE .recover"]),
    "truncated-mcap": (truncated("mcap", 0.6), ["b.mcap is damaged", "mcap recover"]),
    "empty-db3": (truncated("sqlite3", 0), ["b.db3 is damaged"]),
    "empty-mcap": (truncated("mcap", 0), ["b.mcap is damaged"]),
    "claims-more": (claims(3), ["metadata.yaml claims 53", "holds 50", JOINT_TOPIC]),
    "claims-fewer": (claims(-3), ["metadata.yaml claims 47", "holds 50", JOINT_TOPIC]),
    "file-missing": (unlisted_file, ["metadata.yaml lists b_1.db3", "not there"]),
    "not-yaml": (metadata_text("a: b: c\n\t- ]"), ["metadata.yaml", "ros2 bag reindex"]),
    "other-yaml": (metadata_text("[1, 2]"), ["metadata.yaml", "ros2 bag reindex"]),
    "binary-yaml": (metadata_text("\x00\x07"), ["metadata.yaml", "ros2 bag reindex"]),
    "ros1": (ros1, ["ROS 1 bag file", "rosbags-convert"]),
    "dangling-link": (dangling, ["lost.db3", "No such file"]),
    "still": (bag_of(still_joints()), ["no joint moves", JOINT_TOPIC]),
    "short-image": (
        bag_of(without(CAMERA_TOPIC) + camera_messages(image(T0_NS, TAKE.images[0], data=SHORT[:7]))),
        [f"{CAMERA_TOPIC}, message 1", "7 bytes"],
    ),
    "encoding": (
        bag_of(without(CAMERA_TOPIC) + camera_messages(image(T0_NS, TAKE.images[0], "yuv422_yuy2"))),
        [CAMERA_TOPIC, "'yuv422_yuy2'"],
    ),
    "size-changes": (
        bag_of(without(CAMERA_TOPIC) + camera_messages(*[image(T0_NS, p) for p in (*TAKE.images[:3], *BIGGER)])),
        [f"{CAMERA_TOPIC}, message 4", "from 6x8 to 8x10"],
    ),
    "size-changes-compressed": (
        bag_of(without(CAMERA_TOPIC) + camera_messages(*[compressed(T0_NS, encode(p, ".png")) for p in TWO_SIZES])),
        [f"{CAMERA_TOPIC}, message 2", "from 6x8 to 8x10"],
    ),
    "no-overlap": (
        bag_of([(t, n + (10**10 if t == CAMERA_TOPIC else 0), m) for t, n, m in TAKE.messages()]),
        ["do not overlap", CAMERA_TOPIC, JOINT_TOPIC],
    ),
}  # fmt: skip


@pytest.fixture(params=BAD_BAGS)
def bad(request, tmp_path):
    """-> (folder with one bad bag called b, words of its error)."""
    make, words = BAD_BAGS[request.param]
    make(tmp_path / "bags" / "b")
    return tmp_path / "bags", words


def test_bad_bag_is_refused_in_one_line(bad):
    """on_bad_bag: error: one line with the bag's name first, the topic or key, and the fact."""
    bag_dir, words = bad
    message = error_of(lambda: rd.load_episodes(settings(bag_dir), workers=1, progress=False))
    assert message.startswith("b"), message
    assert all(word in message for word in words), message


def test_bad_bag_is_skipped_and_reported(bad, capfd):
    """on_bad_bag: skip keeps the good bags and returns each bad one with the reason, which is printed too."""
    bag_dir, words = bad
    write_bag(bag_dir / "a", TAKE.messages())
    write_bag(bag_dir / "c", TAKE.messages(), "mcap")
    episodes, skipped = rd.load_episodes(settings(bag_dir, on_bad_bag="skip"), workers=2, progress=False)
    assert [e.name for e in episodes] == ["a", "c"]
    ((name, why),) = [(s["bag"], s["why"]) for s in skipped]
    assert name in ("b", "b/old.bag", "b/lost.db3") and all(word in why for word in words)
    assert f"skipped bag {why}" in capfd.readouterr().err


def test_all_skipped_is_an_error(tmp_path):
    """With nothing left there is nothing to train on."""
    for name in "ab":
        truncated("mcap", 0.5)(tmp_path / "bags" / name)
    message = error_of(lambda: rd.load_episodes(settings(tmp_path / "bags", on_bad_bag="skip"), 1, False))
    assert "all 2 bags were skipped" in message and "a.mcap is damaged" in message


def test_a_slow_bad_bag_before_a_quick_one(tmp_path, monkeypatch):
    """Two bad bags at once: whichever fails first is the error, and the other's absence from the cache is not."""
    for name in "ab":
        write_bag(tmp_path / "bags" / name, still_joints())
    truncated("mcap", 0.5)(tmp_path / "bags" / "c")

    def fail(bag, *rest, **also):
        time.sleep({"a": 1.0}.get(bag.name, 0.0))
        raise rd.BagError(f"{bag.name}: broken")

    monkeypatch.setattr(rd, "read_bag", fail)
    message = error_of(lambda: rd.load_episodes(settings(tmp_path / "bags"), workers=2, progress=False))
    assert message in ("b: broken", "c: broken")


@pytest.mark.parametrize("resize", [None, [6, 8]], ids=["as-is", "resized"])
def test_sizes_that_differ_between_bags(tmp_path, resize):
    """Two cameras' sizes do not go into one data set, unless image_resize brings them to one."""
    write_bag(tmp_path / "bags" / "a", TAKE.messages())
    write_bag(tmp_path / "bags" / "b", make_take(seconds=0.4, size=(10, 12)).messages())
    wanted = settings(tmp_path / "bags", image_resize=resize)
    if resize:
        assert {e.image_shape["color"] for e in rd.load_episodes(wanted, 1, False)[0]} == {(6, 8)}
    else:
        message = error_of(lambda: rd.load_episodes(wanted, 1, False))
        assert all(word in message for word in ("b: ", "10x12", "those of a", "6x8", "conventions.image_resize"))


def test_two_bags_with_different_joints(tmp_path):
    """The second robot's names are listed."""
    write_bag(tmp_path / "bags" / "a", TAKE.messages())
    names = [f"left_{n}" for n in JOINTS]
    other = [(t, n, joint_state(n, np.ones(6), names) if t == JOINT_TOPIC else m) for t, n, m in TAKE.messages()]
    write_bag(tmp_path / "bags" / "b", other)
    message = error_of(lambda: rd.load_episodes(settings(tmp_path / "bags"), 1, False))
    assert message.startswith("b: ") and "shoulder_pan_joint" in message and "left_elbow_joint" in message


def test_bag_dir_that_is_none(tmp_path):
    """A bag_dir that is missing, a file, or empty: what was found, and which key to set."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    cases = {"absent": "found nothing there", "file": "found a file there", "empty": "no ROS 2 bag"}
    for name, fact in cases.items():
        message = error_of(lambda name=name: rd.load_episodes(settings(tmp_path / name), 1, False))
        assert message.startswith("data.bag_dir: ") and name in message and fact in message


@pytest.mark.parametrize("on_bad_bag", ["error", "skip"])
def test_unknown_distribution(tmp_path, on_bad_bag):
    """A wrong setting is not a bag's fault, so that skip does not skip for it."""
    write_bag(tmp_path / "bags" / "data.first", TAKE.messages())
    wanted = settings(tmp_path / "bags", ros_distro="hubmle", on_bad_bag=on_bad_bag)
    message = error_of(lambda: rd.load_episodes(wanted, 1, False))
    assert message.startswith("data.ros_distro: found 'hubmle'") and "humble" in message


def test_bag_called_like_a_key_is_skipped(tmp_path):
    """A bag whose name begins as a config key does is a bag as any other."""
    write_bag(tmp_path / "bags" / "a", TAKE.messages())
    truncated("mcap", 0.5)(tmp_path / "bags" / "data.second")
    _, skipped = rd.load_episodes(settings(tmp_path / "bags", on_bad_bag="skip"), 1, False)
    assert [s["bag"] for s in skipped] == ["data.second"]


def test_missing_and_wrong_settings():
    """settings_from() names what the config lacks or what does not fit."""
    good = {f: getattr(settings(Path("bags")), f) for f in rd.BagSettings.__dataclass_fields__}
    assert "camera_topic" in error_of(lambda: rd.settings_from({**good, "camera_topics": None}))
    assert "fps" in error_of(lambda: rd.settings_from({k: v for k, v in good.items() if k != "fps"}))
    assert "'fast'" in error_of(lambda: rd.settings_from({**good, "fps": "fast"}))


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
            (found,) = rd.find_bags(tmp_path / "bags")
            rd.synchronise("a", rd.read_bag(found, wanted, lambda camera, rgb: None), wanted)
        except rd.BagError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert refused > 20, "the damage was real"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 200 * 1024
