"""Messages to times and joint positions: by name, in every message, by the clock that was asked for."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from rosbag_dataset import find_bags, load_episodes, read_bag
from tests.bags import (
    CAMERA_TOPIC,
    JOINT_TOPIC,
    JOINTS,
    T0_NS,
    image,
    joint_state,
    make_take,
    settings,
    write_bag,
)
from tests.checks import TAKE, both_storages, error_of, read, sql

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
        (range(6), (), ["none at all", "name field is empty"]),
        (range(5), JOINTS, ["6 joint names but 5 positions"]),
        ((), JOINTS, ["6 joint names but 0 positions"]),
        ((0, 1, np.nan, 3, 4, 5), JOINTS, ["elbow_joint is nan"]),
        ((0, 1, 2, 3, 4, -np.inf), JOINTS, ["wrist_3_joint is -inf"]),
        ((0, 1), ["wheel", "elbow_joint"][::-1] * 2, ["4 joint names but 2 positions"]),
        ((0, 1, 1), ["wheel", "elbow_joint", "elbow_joint"], ["elbow_joint stands there more than once"]),
        ((0, np.nan), ["wheel", "elbow_joint"], ["elbow_joint is nan"]),
    ],
    ids=["no-names", "short", "no-positions", "nan", "inf", "short-subset", "twice", "nan-subset"],
)
def test_bad_joints(tmp_path, values, names, words):
    """A bad JointState anywhere is refused, with the bag, topic, message and joint in the line."""
    good = joint_state(T0_NS, np.arange(6.0))
    bag_dir = joint_bag(tmp_path, good, good, joint_state(T0_NS, list(values), names))
    message = error_of(lambda: read(bag_dir))
    assert message.startswith(f"a: {JOINT_TOPIC}, message 3: ")
    assert all(word in message for word in words), message


GRIPPER = ("finger_joint",)


def test_each_joint_comes_from_the_messages_that_have_it(tmp_path):
    """Any subset, in any order: a row per message that has one, NaN where it has not; the others are counted."""
    recording, _ = read(
        joint_bag(
            tmp_path,
            joint_state(T0_NS, [1, 2], ["wheel", "elbow_joint"]),
            joint_state(T0_NS, [3], ["wheel"]),
            joint_state(T0_NS, [4, 5], ["shoulder_pan_joint", "elbow_joint"]),
            joint_state(T0_NS, [], ["wheel"]),  # of joints that nobody wants it may lack positions,
            joint_state(T0_NS, [6, 7], ["wheel", "wheel"]),  # name one twice,
            joint_state(T0_NS, [], []),  # or hold nothing
            joint_state(T0_NS, [8], ["shoulder_pan_joint"]),
        ),
        joint_names=("shoulder_pan_joint", "elbow_joint"),
    )
    np.testing.assert_array_equal(recording.joint_rad, [[np.nan, 2], [4, 5], [8, np.nan]])
    np.testing.assert_array_equal(recording.joint_time_ns - T0_NS, [0, 2 * 10**7, 6 * 10**7])
    assert recording.ignored_joint_messages == 4


@both_storages
@pytest.mark.parametrize("time_source", ["receive", "header"])
def test_messages_of_a_gripper_that_is_not_wanted(tmp_path, storage, time_source):
    """They change nothing: joints, times and hash are those of a bag without them, even if their header has no time."""
    gripper = [(JOINT_TOPIC, int(t), joint_state(0, [0.1], GRIPPER)) for t in TAKE.joint_ns[1::3] + 10**6]
    for name, more in (("alone", []), ("with", gripper)):
        write_bag(tmp_path / name / "a", sorted(TAKE.messages() + more, key=lambda m: m[1]), storage)
    alone, both = (read(tmp_path / name, time_source=time_source)[0] for name in ("alone", "with"))
    np.testing.assert_array_equal(both.joint_time_ns, TAKE.joint_ns)
    np.testing.assert_array_equal(both.joint_rad, TAKE.joint_rad)
    assert both.sha256() == alone.sha256()
    assert (alone.ignored_joint_messages, both.ignored_joint_messages) == (0, len(gripper))


@both_storages
@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([*JOINTS, "finger"], ["joint finger is in none of the 67 ", f"are: {', '.join(JOINTS)}, finger_joint;"]),
        ([f"ur_{n}" for n in JOINTS], ["joint ur_shoulder_pan_joint, ur_shoulder_lift", "are: shoulder_pan_joint"]),
    ],
    ids=["one", "all"],
)  # fmt: skip
def test_a_joint_that_never_appears(tmp_path, storage, names, words):
    """The line names it, the topic and the joints that do appear there; it is said before a pixel is decoded."""
    gripper = [(JOINT_TOPIC, int(t), joint_state(int(t), [0.1], GRIPPER)) for t in TAKE.joint_ns[1::3] + 10**6]
    write_bag(tmp_path / "bags" / "a", TAKE.messages() + gripper, storage)
    (bag,), pixels = find_bags(tmp_path / "bags"), []
    wanted = settings(tmp_path / "bags", joint_names=names)
    message = error_of(lambda: read_bag(bag, wanted, lambda camera, rgb: pixels.append(camera)))
    assert message.startswith("a: data.joint_names: ") and f"on {JOINT_TOPIC}; " in message and not pixels
    assert all(word in message for word in [*words, "set data.joint_topic"]), message


def test_a_topic_without_joints(tmp_path):
    """No name in any message is said as such, and of thousands of names a line holds a few."""
    empty = joint_state(T0_NS, [], [])
    assert "none at all (their name fields are empty)" in error_of(
        lambda: read(joint_bag(tmp_path / "0", empty, empty))
    )
    many = joint_state(T0_NS, np.zeros(5000), [f"joint_{i}" for i in range(5000)])
    message = error_of(lambda: read(joint_bag(tmp_path / "1", many)))
    assert "joint_59, ...; name some" in message and "joint_60" not in message


# -- topics -------------------------------------------------------------------------------------------------------


def pasted(message):
    """The settings that an error says to put into the config."""
    return yaml.safe_load(message.rpartition("put into the config: ")[2])


def another_robot(path, more=()):
    """A take whose topics and joints have other names, beside topics of other types; -> the bag's folder."""
    names = [f"ur10e_{name}" for name in JOINTS[::-1]]
    joints = [
        ("/ur/joint_states", int(t), joint_state(int(t), q[::-1].copy(), names))
        for t, q in zip(TAKE.joint_ns, TAKE.joint_rad, strict=True)
    ]
    messages = joints + [("/front", t, m) for topic, t, m in TAKE.messages() if topic == CAMERA_TOPIC]
    write_bag(path / "a", messages, extra_topics=[("/empty", "sensor_msgs/msg/Image"), *more])
    return path


def test_all_settings_that_do_not_fit_are_one_message(tmp_path):
    """It names the keys as the user set them and the topics that fit, and what it says to paste works."""
    bag_dir = another_robot(tmp_path / "bags", [(f"/string_{i}", "std_msgs/msg/String") for i in range(30)])
    message = error_of(lambda: read(bag_dir))
    words = [
        f"a: data.joint_topic: no topic {JOINT_TOPIC}; set it to one of the topics in this bag: /ur/joint_states (",
        f"50); data.camera_topic: no topic {CAMERA_TOPIC}; set it to one of the topics in this bag: /front",
    ]
    assert all(word in message for word in words), message
    assert "/empty" not in message and "/string" not in message and len(message) < 1000
    recording, _ = read(bag_dir, **pasted(message)["data"])
    np.testing.assert_array_equal(recording.joint_rad, TAKE.joint_rad)


def test_settings_for_several_cameras(tmp_path):
    """Only what does not fit changes, and each camera gets a topic of its own."""
    frames = [
        (topic, int(t), image(int(t), TAKE.images[0])) for t in TAKE.camera_ns for topic in ("/left/rgb", "/right/rgb")
    ]
    write_bag(tmp_path / "bags" / "a", TAKE.messages() + frames)
    cameras = {"color": CAMERA_TOPIC, "l": "/left/image", "r": "/left/second"}
    message = error_of(lambda: read(tmp_path / "bags", camera_topics=cameras))
    assert "data.camera_topics.l: no topic /left/image" in message and "data.camera_topics.r" in message
    assert pasted(message) == {"data": {"camera_topics": cameras | {"l": "/left/rgb", "r": "/right/rgb"}}}


def test_joints_with_a_prefix(tmp_path):
    """Where only the names differ, by a prefix, they can be pasted, too."""
    bag_dir = another_robot(tmp_path / "bags")
    message = error_of(lambda: read(bag_dir, joint_topic="/ur/joint_states", camera_topic="/front"))
    assert pasted(message) == {"data": {"joint_names": [f"ur10e_{name}" for name in JOINTS]}}


def test_topics_of_no_fitting_type(tmp_path):
    """None is offered; of what is there a bounded number is named."""
    more = [(f"/string_{i:02}", "std_msgs/msg/String") for i in range(30)]
    write_bag(tmp_path / "bags" / "a", [m for m in TAKE.messages() if m[0] == JOINT_TOPIC], extra_topics=more)
    message = error_of(lambda: read(tmp_path / "bags"))
    assert "this bag has none of type" in message and "with messages, but /joint_states (" in message
    assert "/string_06 (std_msgs/msg/String, 0); 23 more" in message and "/string_07" not in message
    assert "put into the config" not in message


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


# -- message definitions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_bad_bag", ["error", "skip"])
def test_unknown_distribution(tmp_path, on_bad_bag):
    """A wrong setting is not a bag's fault, so that skip does not skip for it."""
    write_bag(tmp_path / "bags" / "data.first", TAKE.messages())
    wanted = settings(tmp_path / "bags", ros_distro="hubmle", on_bad_bag=on_bad_bag)
    message = error_of(lambda: load_episodes(wanted, 1, False))
    assert message.startswith("data.ros_distro: found 'hubmle'") and "humble" in message
