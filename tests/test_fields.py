"""TOPIC:FIELD to a number: which texts there are, what they find in a message, and what a wrong one is told."""

from __future__ import annotations

import re

import numpy as np
import pytest
from rosbags.typesys import Stores, get_typestore

from rosbag_dataset import BagError
from rosbag_dataset.definitions import MAX_DEFINITION_BYTES, register
from rosbag_dataset.fields import is_held, parse_field
from tests.bags import io_states, joint_state, number, numbers, ros, wrench

TWO_FINGERS = joint_state(0, [0.03, 0.04], ["left_finger", "right/finger-1"])


def trajectory_state():
    """A message whose list of names stands beside the message that has the list of numbers."""
    position = ros("trajectory_msgs/msg/JointTrajectoryPoint", np.array([1.0, 2.0]), *[np.zeros(0)] * 3,
                   ros("builtin_interfaces/msg/Duration", 0, 0))  # fmt: skip
    return ros("trajectory_msgs/msg/JointTrajectory", TWO_FINGERS.header, ["left", "right"], [position])


@pytest.mark.parametrize(
    ("path", "message", "value", "held"),
    [
        ("data", number("Float32", 0.25), 0.25, False),
        ("data", number("Bool", True), 1, True),
        ("data", number("Int16", -3), -3, True),
        ("data[1]", numbers([1, 2, 3]), 2, False),
        ("wrench.force.z", wrench(0, (1, 2, 3)), 3, False),
        ("position[0]", TWO_FINGERS, 0.03, False),
        ("position[right/finger-1]", TWO_FINGERS, 0.04, False),
        ("position[third_finger]", TWO_FINGERS, None, None),
        ("digital_out_states[1].state", io_states([0, 1, 0]), 1, True),
        ("digital_out_states[2].pin", io_states([0, 1, 0]), 2, True),
        ("points[0].positions[right]", trajectory_state(), 2, False),
    ],
)
def test_a_field_is_found(path, message, value, held):
    """By name, place in a list, or a name that a list of the message gives; bools and integers are held."""
    field = parse_field(f"/topic:{path}")
    assert (field.topic, field.path) == ("/topic", path)
    found = field.read(message, "here")
    assert found == value and (found is None or is_held(found) == held)


@pytest.mark.parametrize(
    "text", ["data", "/topic", "/topic:", "topic:data", "/t:3", "/t:a[", "/t:a[]", "/t:a..b", "/t:.a"]
)
def test_what_is_no_field_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(f"found {text!r}, expected TOPIC:FIELD")):
        parse_field(text)


@pytest.mark.parametrize(
    ("path", "message", "line"),
    [
        ("force.z", wrench(0, (1, 2, 3)), "here: force.z: no field force; fields there: header, wrench"),
        ("wrench.force", wrench(0, (1, 2, 3)), "here: wrench.force: expected a number, found a message with x, y, z"),
        ("position", TWO_FINGERS, "here: position: expected a number, found a list"),
        ("position.real", TWO_FINGERS, "here: position.real: no field real; there is a list"),
        ("name[0]", TWO_FINGERS, "here: name[0]: expected a number, found a text"),
        ("position[2]", TWO_FINGERS, "here: position[2]: [2] of a list of 2"),
        ("data[0]", number("Float64", 1.0), "here: data[0]: expected a list, to take [0], found a number"),
        ("data[grip]", numbers([1]), "here: data[grip]: [grip] is a name, and this type has no list of names"),
        ("data", number("Float64", np.nan), "here: data is nan, expected a finite number"),
        (
            "position[a]",
            joint_state(0, [1, 2], ["a", "a"]),
            "here: position[a]: a stands there more than once, expected once",
        ),
    ],
)
def test_what_is_no_number_is_said(path, message, line):
    """One line with the place, what was found, and what was expected."""
    with pytest.raises(BagError) as refused:
        parse_field(f"/topic:{path}").read(message, "here")
    assert str(refused.value).startswith(line) and "\n" not in str(refused.value)


# -- definitions that a bag brings along --------------------------------------------------------------------------


@pytest.fixture
def store():
    return get_typestore(Stores.ROS2_HUMBLE)


def test_a_definition_is_taken_with_what_it_is_made_of(store):
    """Its own parts from the same text, ROS' own from the distribution, constants and all."""
    text = (
        "uint8 OPEN=1\nstd_msgs/Header header\nPart[<=4] parts\nfloat64[3] force\n"
        f"{'=' * 80}\nMSG: my_msgs/Part\nbool on  # or off\n"
    )
    register(store, "my_msgs/msg/Whole", text)
    assert [name for name, _ in store.fielddefs["my_msgs/msg/Whole"][1]] == ["header", "parts", "force"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("uint8 a\n" * (MAX_DEFINITION_BYTES // 8 + 1), "bytes long, expected at most"),
        ("float64[99999] a\n", "99999 places, expected at most 4096"),
        ("string[4000] a\nstring[4000] b\n", "8000 places"),
        ("Self a\n", "made of itself"),
        ("Other a\n", "made of 'x/msg/Other', which it does not define"),
        ("%% no definition", "Could not parse"),
        (f"bool a\n{'=' * 80}\nMSG: x/__import__\nbool b\n", "is no type with fields as ROS names them"),
    ],
    ids=["long", "array", "arrays", "recursive", "incomplete", "garbage", "name"],
)
def test_a_hostile_definition_is_refused(store, text, words):
    """rosbags makes Python code of a definition: nothing gets there but names, numbers and lists of limited length."""
    with pytest.raises(ValueError, match=re.escape(words)):
        register(store, "x/msg/Self", text)
