"""A folder of bags to episodes: bad bags are refused or skipped in one line; copies stay on one side of the split."""

from __future__ import annotations

import dataclasses
import shutil
import struct

import numpy as np
import pytest

from rosbag_dataset import load_episodes, split_episodes, sync_table
from tests.bags import (
    CAMERA_TOPIC,
    COMPRESSED_VIDEO,
    FFMPEG_PACKET,
    JOINT_TOPIC,
    JOINTS,
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
    write_bag,
    write_split_bag,
)
from tests.checks import TAKE, error_of, still_joints, truncated
from tests.episodes import sync

# -- the table of bad input ---------------------------------------------------------------------------------------


def without(topic):
    return [m for m in TAKE.messages() if m[0] != topic]


def camera_messages(*images, offset=0):
    return [(CAMERA_TOPIC, int(t) + offset, m) for t, m in zip(TAKE.camera_ns, images, strict=False)]


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


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5242880\n"


def pointer(file):
    """A bag whose storage file is what git leaves of it without its large file storage."""

    def make(path):
        bag = write_bag(path, TAKE.messages(), "mcap" if "mcap" in file else "sqlite3")
        storage_file(bag).unlink()
        (bag / file).write_text(POINTER)

    return make


def profile(name):
    """A bag whose mcap says that its messages are of another kind."""

    def make(path):
        file = storage_file(write_bag(path, TAKE.messages(), "mcap"))
        content = file.read_bytes()
        size = struct.unpack_from("<Q", content, 9)[0] + len(name) - 4
        assert content[17:25] == b"\x04\0\0\0ros2"
        header = struct.pack("<QI", size, len(name)) + name
        file.write_bytes(content[:9] + header + content[25:])

    return make


def bag_of(messages, **how):
    return lambda path: write_bag(path, messages, **how)


SHORT = np.frombuffer(bytes(100), np.uint8)
TWO_SIZES = (TAKE.images[0], noise_images(1, (8, 10), seed=5)[0])
BIGGER = noise_images(12, (8, 10), seed=5)
IMAGE, COMPRESSED, JOINT = (f"sensor_msgs/msg/{name}" for name in ("Image", "CompressedImage", "JointState"))
STRING = ros("std_msgs/msg/String", "x")
BAD_BAGS = {
    "no-joint-topic": (bag_of(without(JOINT_TOPIC)), ["data.joint_topic", f"{CAMERA_TOPIC} ({IMAGE}, 11)"]),
    "no-camera-topic": (bag_of(without(CAMERA_TOPIC)), ["data.camera_topic: no topic", f"{JOINT_TOPIC} ({JOINT}, 50)"]),
    "wrong-type": (
        bag_of([*without(CAMERA_TOPIC), (CAMERA_TOPIC, T0_NS, STRING)]),
        [CAMERA_TOPIC, "std_msgs/msg/String", f"expected {FFMPEG_PACKET} or {COMPRESSED_VIDEO} or {COMPRESSED} or "],
    ),
    "no-message": (bag_of(without(CAMERA_TOPIC), extra_topics=[(CAMERA_TOPIC, IMAGE)]), [CAMERA_TOPIC, "no message"]),
    "empty-bag": (bag_of([], extra_topics=[(CAMERA_TOPIC, IMAGE), (JOINT_TOPIC, JOINT)]), ["no message"]),
    "no-topics": (bag_of([]), ["no topic", "none at all"]),
    "truncated-db3": (truncated("sqlite3", 0.6), ["b.db3 is damaged", "/bags/b/b.db3 .recover | sqlite3 /"]),
    "truncated-mcap": (truncated("mcap", 0.6), ["b.mcap is damaged", "mcap recover"]),
    "empty-db3": (truncated("sqlite3", 0), ["b.db3 is damaged"]),
    "empty-mcap": (truncated("mcap", 0), ["b.mcap is damaged"]),
    "lfs-db3": (pointer("b.db3"), ["b.db3 is a git-lfs pointer, not the file of 5242880 bytes", "git lfs pull"]),
    "lfs-mcap": (pointer("b.mcap"), ["b.mcap is a git-lfs pointer", "git lfs pull"]),
    "lfs-zstd": (pointer("b.mcap.zstd"), ["b.mcap.zstd is a git-lfs pointer", "git lfs pull"]),
    "lfs-metadata": (metadata_text(POINTER), ["metadata.yaml is a git-lfs pointer", "git lfs pull"]),
    "foreign-mcap": (profile(b"ros1"), ["b.mcap is an mcap of profile 'ros1', expected 'ros2'", "convert it"]),
    "mcap-without-profile": (profile(b""), ["b.mcap is an mcap of profile '', expected 'ros2'"]),
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
        bag_of(without(CAMERA_TOPIC) + camera_messages(image(T0_NS, TAKE.images[0], "yuv411"))),
        [CAMERA_TOPIC, "'yuv411'"],
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
    message = error_of(lambda: load_episodes(settings(bag_dir), workers=1, progress=False))
    assert message.startswith("b"), message
    assert all(word in message for word in words), message


def test_bad_bag_is_skipped_and_reported(bad, capfd):
    """on_bad_bag: skip keeps the good bags and returns each bad one with the reason, which is printed too."""
    bag_dir, words = bad
    write_bag(bag_dir / "a", TAKE.messages())
    write_bag(bag_dir / "c", TAKE.messages(), "mcap")
    episodes, skipped = load_episodes(settings(bag_dir, on_bad_bag="skip"), workers=2, progress=False)
    assert [e.name for e in episodes] == ["a", "c"]
    ((name, why),) = [(s["bag"], s["why"]) for s in skipped]
    assert name in ("b", "b/old.bag", "b/lost.db3") and all(word in why for word in words)
    assert f"skipped bag {why}" in capfd.readouterr().err


def test_all_skipped_is_an_error(tmp_path):
    """With nothing left there is nothing to train on."""
    for name in "ab":
        truncated("mcap", 0.5)(tmp_path / "bags" / name)
    message = error_of(lambda: load_episodes(settings(tmp_path / "bags", on_bad_bag="skip"), 1, False))
    assert "all 2 bags were skipped" in message and "a.mcap is damaged" in message


def test_a_bag_of_which_little_can_be_used_is_skipped(tmp_path):
    """data.min_used_share makes it a bad bag as any other."""
    take = make_take(seconds=2.0)
    write_bag(tmp_path / "bags" / "a", take.messages())
    write_bag(tmp_path / "bags" / "b", [m for m in take.messages() if m[0] == JOINT_TOPIC or m[1] < T0_NS + 3 * 10**8])
    wanted = settings(tmp_path / "bags", on_bad_bag="skip", min_used_share=0.5)
    episodes, skipped = load_episodes(wanted, 1, False)
    assert [e.name for e in episodes] == ["a"] and [s["bag"] for s in skipped] == ["b"]
    assert "frames cover 0.3 of the 2.0 s that were recorded" in skipped[0]["why"]
    assert [e.name for e in load_episodes(settings(tmp_path / "bags"), 1, False)[0]] == ["a", "b"]


def test_bag_called_like_a_key_is_skipped(tmp_path):
    """A bag whose name begins as a config key does is a bag as any other."""
    write_bag(tmp_path / "bags" / "a", TAKE.messages())
    truncated("mcap", 0.5)(tmp_path / "bags" / "data.second")
    _, skipped = load_episodes(settings(tmp_path / "bags", on_bad_bag="skip"), 1, False)
    assert [s["bag"] for s in skipped] == ["data.second"]


# -- bags that do not go together ---------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", [None, [6, 8]], ids=["as-is", "resized"])
def test_sizes_that_differ_between_bags(tmp_path, resize):
    """Two cameras' sizes do not go into one data set, unless image_resize brings them to one."""
    write_bag(tmp_path / "bags" / "a", TAKE.messages())
    write_bag(tmp_path / "bags" / "b", make_take(seconds=0.4, size=(10, 12)).messages())
    wanted = settings(tmp_path / "bags", image_resize=resize)
    if resize:
        assert {e.image_shape["color"] for e in load_episodes(wanted, 1, False)[0]} == {(6, 8)}
    else:
        message = error_of(lambda: load_episodes(wanted, 1, False))
        assert all(word in message for word in ("b: ", "10x12", "those of a", "6x8", "conventions.image_resize"))


def test_two_bags_with_different_joints(tmp_path):
    """The second robot's names are listed."""
    write_bag(tmp_path / "bags" / "a", TAKE.messages())
    names = [f"left_{n}" for n in JOINTS]
    other = [(t, n, joint_state(n, np.ones(6), names) if t == JOINT_TOPIC else m) for t, n, m in TAKE.messages()]
    write_bag(tmp_path / "bags" / "b", other)
    message = error_of(lambda: load_episodes(settings(tmp_path / "bags"), 1, False))
    assert message.startswith("b: ") and "shoulder_pan_joint" in message and "left_elbow_joint" in message


@pytest.mark.parametrize("how", ["linked", "renamed with other metadata", "mcap", "compressed", "split"])
def test_copies_are_reported_and_kept_together(tmp_path, how):
    """A copy of a recording says so in report and table, whatever its name, metadata, storage and compression."""
    messages = make_take(seconds=0.3).messages()
    bag = write_bag(tmp_path / "bags" / "a", messages)
    if how == "linked":
        (tmp_path / "bags" / "b").symlink_to(tmp_path / "copy")
        shutil.copytree(bag, tmp_path / "copy")
    elif how.startswith("renamed"):
        shutil.copytree(bag, tmp_path / "bags" / "b")
        with (tmp_path / "bags" / "b" / "metadata.yaml").open("a") as metadata:
            metadata.write("# checked by hand\n")
    elif how == "mcap":
        write_bag(tmp_path / "bags" / "b", messages, storage="mcap")
    elif how == "compressed":
        write_bag(tmp_path / "bags" / "b", messages, compression="message")
    else:
        write_split_bag(tmp_path / "bags" / "b", [messages[:20], messages[20:]])
    write_bag(tmp_path / "bags" / "c", make_take(seconds=0.3, seed=1).messages())
    episodes, _ = load_episodes(settings(tmp_path / "bags"), 1, False)
    assert [e.sync_report["copy_of"] for e in episodes] == ["", "a", ""]
    assert "b is a copy of a" in sync_table([e.sync_report for e in episodes])
    for seed in range(10):
        _, held_out = split_episodes(episodes, 0.5, seed)
        assert [e.name for e in held_out] in ([], ["c"], ["a", "b"])


# -- training and validation --------------------------------------------------------------------------------------


def named(count, copies=()):
    """Episodes of which only name and content matter; `copies` maps an episode's number to the one it copies."""
    blank = sync(make_take(seconds=0.3))
    copies = dict(copies)
    return [dataclasses.replace(blank, name=f"e{i:02}", recording_hash=f"hash{copies.get(i, i)}") for i in range(count)]


@pytest.mark.parametrize(
    ("count", "fraction", "fewest", "most"),
    [(4, 0.1, 0, 3), (5, 0.1, 1, 4), (9, 0.1, 1, 8), (5, 1e-9, 1, 1), (4, 1e-9, 0, 0), (5, 0.0, 0, 0), (1, 0.9, 0, 0),
     (2, 0.999, 1, 1), (6, 0.999, 5, 5)],
)  # fmt: skip
def test_how_many_are_held_out(count, fraction, fewest, most):
    """At least one of five or more, never all, and none where val_fraction is 0."""
    for seed in range(20):
        training, validation = split_episodes(named(count), fraction, seed)
        assert fewest <= len(validation) <= most and len(training) == count - len(validation) > 0
        assert sorted(e.name for e in training + validation) == [e.name for e in named(count)]


def test_the_share_that_is_held_out():
    """val_fraction of many episodes: 100 of 1000 within four standard deviations, for each of five seeds."""
    for seed in range(5):
        assert abs(len(split_episodes(named(1000), 0.1, seed)[1]) - 100) < 4 * np.sqrt(1000 * 0.1 * 0.9)


def test_new_recordings_move_no_old_one_to_the_other_side():
    """Of 100 bags, ten or so are held out; with more bags, wherever their names come, the same ten still are."""
    for seed in range(10):
        before = {e.name for e in split_episodes(named(100), 0.1, seed)[1]}
        after = {e.name for e in split_episodes(named(160)[::-1], 0.1, seed)[1]}
        assert len(before) > 2 and before == {name for name in after if int(name[1:]) < 100}


def test_split_is_deterministic():
    """By the seed alone; another seed splits otherwise."""
    splits = [[e.name for e in split_episodes(named(30), 0.2, seed)[1]] for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]
    assert splits[0] == sorted(splits[0])


@pytest.mark.parametrize("seed", range(20))
def test_copies_stay_on_one_side(seed):
    """The same recording twice never sits in training and validation at once."""
    training, validation = split_episodes(named(10, {7: 2, 9: 2, 8: 0}.items()), 0.3, seed)
    assert not {e.recording_hash for e in training} & {e.recording_hash for e in validation}
    assert validation
