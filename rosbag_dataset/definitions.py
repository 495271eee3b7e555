"""Message types that a ROS distribution does not have, from the definition that the bag brings along.

mcap holds the definition of each type, and so do sqlite3 bags since ROS 2 Iron. rosbags compiles them to Python code,
and a bag may come from somebody else (docs/trust.md): only names, numbers and lists of limited length get there.

Knows: definitions in the form ros2msg, and how rosbags takes them.
Must not know: bags, topics, messages.
"""

from __future__ import annotations

import re

from rosbags.interfaces import Nodetype
from rosbags.typesys import get_types_from_msg
from rosbags.typesys.store import Typestore

# A definition with all that it is made of: those of ROS itself have at most 20 KB, and a few fixed lists of up to 36
# numbers (covariances). rosbags writes a line of code for each place of some fixed lists.
MAX_DEFINITION_BYTES, MAX_FIXED_PLACES = 200_000, 4096
TYPE_NAME = re.compile(r"[A-Za-z]\w*(/[A-Za-z]\w*)+")
FIELD_NAME = re.compile(r"[A-Za-z]\w*")


def register(store: Typestore, msgtype: str, text: str) -> None:
    """Teach `store` the type `msgtype` and those that it is made of; types that it knows already stay as they are.

    Args:
        store: a store of its own for each bag: another bag may have another type of that name.
        msgtype: for example "ur_msgs/msg/IOStates".
        text: the definition, with those of the types that it is made of, as rosbag2 writes them (ros2msg).

    Raises:
        ValueError: it cannot be used; what is wrong with it.
    """
    if len(text) > MAX_DEFINITION_BYTES:
        raise ValueError(f"{len(text)} bytes long, expected at most {MAX_DEFINITION_BYTES}")
    try:
        types = get_types_from_msg(text, msgtype)
    except Exception as exc:  # rosbags has several
        raise ValueError(" ".join(str(exc).split())[:120] or type(exc).__name__) from exc
    fixed = [kind[1][1] for _, fields in types.values() for _, kind in fields if kind[0] == Nodetype.ARRAY]
    if sum(fixed) > MAX_FIXED_PLACES:
        raise ValueError(f"its fixed lists have {sum(fixed)} places, expected at most {MAX_FIXED_PLACES}")
    new = {}
    for name, (_, fields) in types.items():
        if not TYPE_NAME.fullmatch(name) or not all(FIELD_NAME.fullmatch(field) for field, _ in fields):
            raise ValueError(f"{name!r:.60} is no type with fields as ROS names them")
        if name not in store.fielddefs:
            new[name] = ([], fields)  # without its constants, which no message holds
    try:
        store.register(new)
        store.get_msgdef(msgtype)
    except RecursionError as exc:
        raise ValueError("it is made of itself") from exc
    except KeyError as exc:
        raise ValueError(f"it is made of {exc}, which it does not define") from exc
    except Exception as exc:  # two fields of one name, ...
        raise ValueError(f"{type(exc).__name__}: {' '.join(str(exc).split())[:120]}") from exc
