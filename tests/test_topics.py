"""Messages to times and joint positions: by name, in every message, by the clock that was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from rosbag_dataset import load_episodes
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
from tests.checks import TAKE, error_of, read, sql

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
