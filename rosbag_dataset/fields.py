"""One number of a message, named by a text TOPIC:FIELD: where it stands, and how it is taken out of a message.

    /gripper/width:data                          a std_msgs/Float64
    /gripper/state:position[0]                   the first of a list
    /gripper/state:position[finger_joint]        of a JointState, by the joint's name
    /ft/wrench:wrench.force.z                    a field of a field
    /io_states:digital_out_states[3].state       a bit

Knows: the form of the text, what messages are made of.
Must not know: files, clocks, settings, what the number is for.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import BagError

PATH = re.compile(r"[A-Za-z]\w*(\[[^\[\]]+\]|\.[A-Za-z]\w*)*")
EXAMPLE = "TOPIC:FIELD, for example /gripper/state:position[0]"
# What a list of names is called in the messages that have lists in its order: JointState, JointTrajectory and
# controllers' states, DynamicJointState.
NAME_LISTS = ("name", "joint_names", "interface_names")

Step = str | int | tuple[str]  # a field, a place in a list, or (a name,) for the place that a list of names gives


@dataclass(frozen=True)
class TopicField:
    """A number in the messages of a topic.

    Attributes:
        text: as written, TOPIC:FIELD.
        topic: the part before the colon.
        steps: the way from a message to the number.
    """

    text: str
    topic: str
    steps: tuple[Step, ...]

    @property
    def path(self) -> str:
        """The part behind the colon."""
        return self.text[len(self.topic) + 1 :]

    def read(self, message: Any, where: str) -> bool | int | float | None:
        """The number in a message; None where the list of names does not have the name that is asked for.

        Raises:
            BagError: there is no such field or place, what stands there is no number, or it is not finite. `where` is
                the bag, topic and message number.
        """
        value, owners = message, [message]
        for step in self.steps:
            if isinstance(step, str):
                names = _fields(value)
                if step not in names:
                    there = f"fields there: {', '.join(names)}" if names else f"there is {_kind(value)}"
                    raise BagError(f"{where}: {self.path}: no field {step}; {there}")
                value = getattr(value, step)
                owners.append(value)
                continue
            if not isinstance(value, list | np.ndarray):
                raise BagError(f"{where}: {self.path}: expected a list, to take [{_text(step)}], found {_kind(value)}")
            place = step if isinstance(step, int) else self._place_of(step[0], owners, where)
            if place is None:
                return None
            if place >= len(value):
                raise BagError(f"{where}: {self.path}: [{_text(step)}] of a list of {len(value)}")
            value = value[place]
            owners.append(value)
        if not isinstance(value, bool | int | float | np.number | np.bool_):
            raise BagError(f"{where}: {self.path}: expected a number, found {_kind(value)}")
        if not np.isfinite(value):
            raise BagError(f"{where}: {self.path} is {value}, expected a finite number")
        return value

    def names_in(self, message: Any) -> list[str]:
        """Names by which places in this message can be asked for, for an error."""
        return next((list(names) for name in NAME_LISTS if (names := getattr(message, name, None))), [])

    def _place_of(self, name: str, owners: list[Any], where: str) -> int | None:
        """Where `name` stands in the innermost list of names; None if it does not."""
        for owner in reversed(owners):
            lists = [getattr(owner, key) for key in NAME_LISTS if key in _fields(owner)]
            if lists:
                if lists[0].count(name) > 1:
                    raise BagError(f"{where}: {self.path}: {name} stands there more than once, expected once")
                return lists[0].index(name) if name in lists[0] else None
        raise BagError(
            f"{where}: {self.path}: [{name}] is a name, and this type has no list of names "
            f"({', '.join(NAME_LISTS)}); use a number, from 0 on"
        )


def parse_field(text: str) -> TopicField:
    """A text TOPIC:FIELD; see the head of this file.

    Raises:
        ValueError: it is none.
    """
    topic, _, path = text.partition(":")
    if not (topic.startswith("/") and PATH.fullmatch(path)):
        raise ValueError(f"found {text!r}, expected {EXAMPLE}")
    steps: list[Step] = []
    for name, inside in re.findall(r"([A-Za-z]\w*)|\[([^\[\]]+)\]", path):
        steps.append(name or (int(inside) if inside.isdigit() else (inside,)))
    return TopicField(text, topic, tuple(steps))


def is_held(value: bool | int | float) -> bool:
    """Whether a value counts until the next one comes, as of a switch: nothing lies between two of its values."""
    return isinstance(value, bool | int | np.integer | np.bool_)


def _fields(value: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []


def _kind(value: Any) -> str:
    """What a value is, for an error."""
    if names := _fields(value):
        return f"a message with {', '.join(names)}"
    return {str: "a text", list: "a list", np.ndarray: "a list"}.get(type(value), "a number")


def _text(step: Step) -> str:
    return step[0] if isinstance(step, tuple) else str(step)
