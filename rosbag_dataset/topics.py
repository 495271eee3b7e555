"""The door for topics: which ones are read, whether a bag has them, and how a message becomes a time and numbers.

These are the joint topic, read by joint name from whichever message carries the joint; the topics of further states,
each a field of some message (fields.py); what was commanded; and the cameras' topics. wanted_topics() names them all,
so that all are checked alike.

Knows: message types and fields, joint names, clocks.
Must not know: how files are read (storage.py) and pixels decoded (images.py), the time grid (synchronisation.py).
"""

from __future__ import annotations

import difflib
import functools
import itertools
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from .bags import Bag
from .definitions import register
from .errors import BagError, SetupError
from .fields import TopicField
from .images import COMPRESSED_TYPE, IMAGE_TYPE
from .settings import NEXT_STATE, BagSettings
from .storage import Storage, definition_of, messages, topics_of
from .video import VIDEO_TYPES

JOINT_TYPE = "sensor_msgs/msg/JointState"
TRAJECTORY_TYPE, ARRAY_TYPE = "trajectory_msgs/msg/JointTrajectory", "std_msgs/msg/Float64MultiArray"
MAX_TRAJECTORY_NS = 24 * 3600 * 10**9
TOPICS_SHOWN = 8  # in an error
MARKER_TYPES = {"std_msgs/msg/Bool", "std_msgs/msg/String"} | {
    f"std_msgs/msg/{sign}Int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)
}
MARKER_WORDS = {"start": 1, "stop": 0}  # what a String may say
NAMES_SHOWN = 60  # of the joints that a topic has, in an error; a humanoid has half as many


def wanted_topics(settings: BagSettings) -> list[tuple[str, str, set[str]]]:
    """(config key, topic, message types it may have) of each topic that is read.

    Joints', cameras', further states', commands'. One may be there more than once. No types: any that has the field.
    """
    wanted = [("data.joint_topic", settings.joint_topic, {JOINT_TYPE})]
    pictures = {IMAGE_TYPE, COMPRESSED_TYPE, *VIDEO_TYPES}
    for camera, topic in settings.camera_topics.items():
        key = "data.camera_topic" if settings.one_camera else f"data.camera_topics.{camera}"
        wanted.append((key, topic, pictures))
    if settings.action_source != NEXT_STATE:
        wanted.append(("data.action_source", settings.action_source, {JOINT_TYPE, TRAJECTORY_TYPE, ARRAY_TYPE}))
    wanted += [(key, field.topic, set()) for key, field in wanted_fields(settings).items()]
    if settings.episodes == "marker":
        wanted.append(("data.episode_marker_topic", settings.episode_marker_topic or "", MARKER_TYPES))
    return wanted


def wanted_fields(settings: BagSettings) -> dict[str, TopicField]:
    """Config key -> field, of further states and of their commands."""
    states = {f"data.state_topics.{name}": field for name, field in settings.state_topics.items()}
    return states | {f"data.command_topics.{name}": field for name, field in settings.command_topics.items()}


def source_joints(settings: BagSettings) -> list[int]:
    """Which of data.joint_names are to be found on data.action_source: those acted on without a topic of their own."""
    if settings.action_source == NEXT_STATE:
        return []
    without = {*settings.observed_only, *settings.command_topics}
    return [j for j, name in enumerate(settings.joint_names) if name not in without]


def check_topics(bag: Bag, readers: Sequence[Storage], settings: BagSettings) -> None:
    """The wanted topics are there, have the right types, hold messages, and as many as metadata.yaml claims.

    Raises:
        BagError: naming each topic that does not fit, those that would, and the settings to paste into a config.
    """
    topics, wanted = topics_of(readers), wanted_topics(settings)
    wrong: list[str] = []
    instead: dict[str, str] = {}  # topic of the settings -> one that fits
    for key, topic, allowed in wanted:
        types, count = topics.get(topic, (set(), 0))
        expected = " or ".join(sorted(allowed)) or "any"
        if topic not in topics:
            found = f"no topic {topic}"
        elif allowed and not types <= allowed:
            found = f"topic {topic} has type {'/'.join(sorted(types))}, expected {expected}"
        elif not count:
            found = f"topic {topic} is declared but holds no message"
        else:
            claimed = count if bag.claimed is None else bag.claimed.get(topic, 0)
            if claimed != count:
                raise BagError(
                    f"{bag.name}: metadata.yaml claims {claimed} messages on {topic}, the storage holds {count}; a "
                    "file is missing or the recording broke off; copy it again, or accept what is there with: "
                    f"{reindex(bag)}"
                )
            continue
        others = {t for _, t, _ in wanted if t != topic} | {*instead.values()}
        fits = {t: v for t, v in topics.items() if (v[0] <= allowed or not allowed) and v[1] and t not in others}
        if fits:
            instead[topic] = difflib.get_close_matches(topic, sorted(fits), 1, 0)[0]
            wrong.append(f"{key}: {found}; set it to one of the topics in this bag: {_listed(fits)}")
        else:
            wrong.append(f"{key}: {found}; this bag has none of type {expected} with messages, but {_listed(topics)}")
    if not wrong:
        return
    values: dict[str, Any] = {}
    joint_topic = instead.get(settings.joint_topic, settings.joint_topic)
    if joint_topic != settings.joint_topic:
        values["joint_topic"] = joint_topic
    cameras = {camera: instead.get(topic, topic) for camera, topic in settings.camera_topics.items()}
    if cameras != settings.camera_topics:
        values |= {"camera_topic": cameras["color"]} if settings.one_camera else {"camera_topics": cameras}
    if topics.get(joint_topic, (set(), 0))[0] == {JOINT_TYPE}:
        for _, msgtype, _, raw in itertools.islice(messages(bag, readers, {joint_topic}), 1):
            names = parse_message(raw, msgtype, settings.ros_distro, f"{bag.name}: {joint_topic}, message 1").name
            if renamed := _renamed(settings.joint_names, names):
                values["joint_names"] = renamed
                wrong.append(f"data.joint_names: {joint_topic} has them as {', '.join(renamed)}")
    raise BagError(f"{bag.name}: {'; '.join(wrong)}{_to_paste(values)}")


def reindex(bag: Bag) -> str:
    """The command that writes a bag's metadata.yaml anew."""
    storage = " -s mcap" if any(".mcap" in file.name for file in bag.files) else ""
    return f"ros2 bag reindex {shlex.quote(str(bag.path))}{storage}"


def _listed(topics: dict[str, tuple[set[str], int]]) -> str:
    """Some topics as text, each with its types and its number of messages."""
    shown = [f"{t:.100} ({'/'.join(sorted(types))[:100]}, {n})" for t, (types, n) in sorted(topics.items())]
    more = [f"{len(shown) - TOPICS_SHOWN} more"] if len(shown) > TOPICS_SHOWN else []
    return "; ".join(shown[:TOPICS_SHOWN] + more) or "none at all"


def _renamed(wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    """For each wanted joint the one of `names` that differs by a prefix; [] if some has none, or more than one."""
    named = [name for name in names if name]
    alike = [[name for name in named if name.endswith(joint) or joint.endswith(name)] for joint in wanted]
    return [found[0] for found in alike] if {*wanted}.isdisjoint(names) and all(len(a) == 1 for a in alike) else []


def _to_paste(values: dict[str, Any]) -> str:
    """The end of an error: settings of a config's data section, as YAML."""
    if not values:
        return ""
    text = yaml.safe_dump({"data": values}, default_flow_style=True, sort_keys=False, width=10_000).strip()
    return f"; to take those, put into the config: {text[1:-1]}"


def check_joints(bag: Bag, readers: Sequence[Storage], settings: BagSettings) -> None:
    """Every joint of data.joint_names is in some message; reads only until all were seen: mostly one message.

    Said here, a wrong name costs no decoding of pixels. So are those that are to be commanded by name.

    Raises:
        BagError: naming joints that are in no message, and those that are in some.
    """
    _check_names(bag, readers, settings, settings.joint_topic, list(settings.joint_names), "data.joint_topic")
    types = topics_of(readers).get(settings.action_source, (set(), 0))[0]
    if commanded := [settings.joint_names[j] for j in source_joints(settings) if ARRAY_TYPE not in types]:
        _check_names(bag, readers, settings, settings.action_source, commanded, "data.action_source")


def _check_names(
    bag: Bag, readers: Sequence[Storage], settings: BagSettings, topic: str, missing: list[str], key: str
) -> None:
    there, number = dict[str, None](), 0
    for number, (_, msgtype, _, raw) in enumerate(messages(bag, readers, {topic}), 1):
        message = parse_message(raw, msgtype, settings.ros_distro, f"{bag.name}: {topic}, message {number}")
        names = message.joint_names if msgtype == TRAJECTORY_TYPE else message.name
        missing = [name for name in missing if name not in names]
        if not missing:
            return
        if len(there) <= NAMES_SHOWN:
            there |= dict.fromkeys(names)
    found = list(there)[:NAMES_SHOWN] + ["..."] * (len(there) > NAMES_SHOWN)
    raise BagError(
        f"{bag.name}: data.joint_names: joint {', '.join(missing)} is in none of the {number} messages on {topic}; "
        f"joints that are: {', '.join(found) or 'none at all (their name fields are empty)'}; name some of these, or "
        f"set {key} to the topic that has yours"
        f"{_to_paste({'joint_names': renamed} if (renamed := _renamed(settings.joint_names, list(there))) else {})}"
    )


def check_fields(bag: Bag, readers: Sequence[Storage], settings: BagSettings, typestore: Typestore) -> None:
    """Every field of wanted_fields() is in some message; as check_joints(), reads only until all were seen.

    Raises:
        BagError: naming the field that is in no message, or of another kind than a number.
    """
    missing = wanted_fields(settings)
    numbers, there = dict.fromkeys((f.topic for f in missing.values()), 0), dict.fromkeys(missing, dict[str, None]())
    for topic, msgtype, _, raw in messages(bag, readers, set(numbers)) if missing else ():
        numbers[topic] += 1
        wanted = {key: field for key, field in missing.items() if field.topic == topic}
        if not wanted:
            continue
        where = f"{bag.name}: {topic}, message {numbers[topic]}"
        message = parse_message(raw, msgtype, settings.ros_distro, where, typestore)
        for key, field in wanted.items():
            if field.read(message, where) is not None:
                missing.pop(key)
            elif len(there[key]) <= NAMES_SHOWN:
                there[key] = there[key] | dict.fromkeys(field.names_in(message))
        if not missing:
            return
    for key, field in missing.items():
        found = list(there[key])[:NAMES_SHOWN] + ["..."] * (len(there[key]) > NAMES_SHOWN)
        raise BagError(
            f"{bag.name}: {key}: {field.path} is in none of the {numbers[field.topic]} messages on "
            f"{field.topic}; names that are: {', '.join(found) or 'none at all'}"
        )


def bag_typestore(bag: Bag, readers: Sequence[Storage], settings: BagSettings) -> Typestore:
    """The message definitions of data.ros_distro, and the bag's own of types of wanted_fields() that it lacks.

    Raises:
        BagError: the bag has no such definition, or one that cannot be read.
    """
    topics, store = topics_of(readers), typestore_for(settings.ros_distro)
    unknown = {
        msgtype: f"{bag.name}: {key}: topic {topic} has type {msgtype}, which ROS 2 {settings.ros_distro}'s common "
        "messages do not have"
        for key, topic, allowed in wanted_topics(settings)
        if not allowed
        for msgtype in topics[topic][0]
        if msgtype not in store.fielddefs
    }
    if unknown:
        store = get_typestore(_store_names()[settings.ros_distro])  # of its own: another bag may define it otherwise
    for msgtype, what in unknown.items():
        definition = definition_of(bag, readers, msgtype)
        if definition is None:
            raise BagError(
                f"{what}, and the recording brings no definition of it, as mcap does, and sqlite3 since ROS 2 Iron; "
                "record it with ros2 bag record -s mcap, or name another topic"
            )
        encoding, text = definition
        if encoding != "ros2msg":
            raise BagError(f"{what}, and the recording's definition of it is of kind {encoding!r}, expected 'ros2msg'")
        try:
            register(store, msgtype, text)
        except ValueError as exc:
            raise BagError(f"{what}, and the recording's definition of it cannot be used: {exc}") from exc
    return store


@functools.lru_cache(maxsize=1)  # a new one would compile its decoders again, 10 ms a bag
def typestore_for(ros_distro: str) -> Typestore:
    """The message definitions of a ROS 2 distribution, for example "humble": what turns CDR bytes into messages.

    Beside them those of VIDEO_TYPES, which belong to no distribution.

    Raises:
        SetupError: rosbags does not know that distribution.
    """
    known = _store_names()
    if ros_distro not in known:
        raise SetupError(f"data.ros_distro: found {ros_distro!r}, expected one of {', '.join(sorted(known))}")
    typestore = get_typestore(known[ros_distro])
    for name, definition in VIDEO_TYPES.items():
        typestore.register(get_types_from_msg(definition, name))
    return typestore


def _store_names() -> dict[str, Stores]:
    return {s.value.removeprefix("ros2_"): s for s in Stores if s.value.startswith("ros2_")}


def parse_message(
    raw: bytes | memoryview, msgtype: str, ros_distro: str, where: str, typestore: Typestore | None = None
) -> Any:
    """CDR bytes to a message object with ROS' field names; `where` is the bag, topic and message number, for errors.

    `typestore` is that of the distribution, if it is not one from bag_typestore().

    Raises:
        BagError: the bytes are no message of that type in that distribution.
    """
    typestore = typestore or typestore_for(ros_distro)
    try:
        return typestore.deserialize_cdr(raw, msgtype)
    except Exception as exc:  # rosbags raises several types on short or foreign payloads
        reason = " ".join(str(exc).split())[:120]
        raise BagError(
            f"{where}: not a valid {msgtype} of ROS 2 {ros_distro} ({type(exc).__name__}: {reason}); "
            "set data.ros_distro to the one that recorded it, or leave it out with data.on_bad_bag: skip"
        ) from exc


def stamp_ns(message: Any) -> int:
    """A message's header stamp in ns; 0 if it was never set, or there is none."""
    stamp = message.header.stamp if hasattr(message, "header") else getattr(message, "timestamp", None)  # foxglove's
    return 0 if stamp is None else stamp.sec * 1_000_000_000 + stamp.nanosec


def time_stamp(message: Any, receive_ns: int, time_source: str, where: str) -> int:
    """A message's time in ns, by the clock that data.time_source names: header.stamp, or when the recorder got it.

    Raises:
        BagError: it was never set, or is no time that a recording can have.
    """
    if time_source == "header":
        if not hasattr(message, "header") and not hasattr(message, "timestamp"):  # foxglove's video has the latter
            raise BagError(
                f"{where}: a {type(message).__name__.replace('__', '/')} has no header, and so no time by that clock; "
                "use data.time_source: receive, or take a topic whose messages are stamped"
            )
        time_ns = stamp_ns(message)
        if time_ns <= 0:
            raise BagError(f"{where}: header.stamp is {time_ns} ns (never set); use data.time_source: receive")
    else:
        time_ns = receive_ns
    if not 0 <= time_ns < 1 << 62:
        raise BagError(f"{where}: time stamp {time_ns} ns is out of range; the recording is damaged")
    return time_ns


@functools.lru_cache(maxsize=256)  # a driver has one or two; a hostile bag may have another one in each message
def _columns(names: tuple[str, ...], joint_names: tuple[str, ...]) -> tuple[list[int], list[int], list[str]]:
    """(which of `joint_names` are among a message's `names`, where there, which of them stand there twice)."""
    ours = [j for j, name in enumerate(joint_names) if name in names]
    theirs = [names.index(joint_names[j]) for j in ours]
    return ours, theirs, [joint_names[j] for j in ours if names.count(joint_names[j]) > 1]


def joint_positions(message: Any, joint_names: tuple[str, ...], where: str) -> np.ndarray | None:
    """(J,) float64 rad in the order of `joint_names`, picked by name out of a JointState; NaN where it has none.

    Drivers publish joints in an order of their own, which may change from message to message, and several publishers
    on one topic (arm and gripper) each publish only theirs. None: the message has none of the joints.

    Raises:
        BagError: it cannot be told which position is whose, or one is not finite.
    """
    names = tuple(message.name)
    ours, theirs, twice = _columns(names, joint_names)
    if not names and len(message.position):
        raise BagError(
            f"{where}: of its {len(message.position)} positions none at all has a name (its name field is empty); "
            "record with a driver that names its joints, or leave it out with data.on_bad_bag: skip"
        )
    if not ours:
        return None
    if len(message.position) != len(names):
        raise BagError(
            f"{where}: {len(names)} joint names but {len(message.position)} positions, expected one each; which is "
            "whose cannot be told; record it again, or leave it out with data.on_bad_bag: skip"
        )
    if twice:
        raise BagError(
            f"{where}: {', '.join(twice)} stands there more than once, expected one position of each joint; record it "
            "again with names of their own, or leave it out with data.on_bad_bag: skip"
        )
    values = np.asarray(message.position, np.float64)[theirs]
    if not np.isfinite(values).all():
        bad = [joint_names[j] for j, value in zip(ours, values, strict=True) if not np.isfinite(value)]
        raise BagError(
            f"{where}: position of {', '.join(bad)} is {values[~np.isfinite(values)][0]}, expected a finite angle"
        )
    if len(ours) == len(joint_names):
        return values
    row = np.full(len(joint_names), np.nan)
    row[ours] = values
    return row


def commanded_positions(message: Any, joint_names: tuple[str, ...], where: str) -> np.ndarray:
    """(J,) float64 of a Float64MultiArray, which names nothing: in the order of `joint_names`.

    Raises:
        BagError: it has another number of values, or one is not finite.
    """
    values = np.asarray(message.data, np.float64)
    if len(values) != len(joint_names) or not np.isfinite(values).all():
        raise BagError(
            f"{where}: {len(values)} values ({', '.join(f'{v:.4g}' for v in values[:10])}), expected a finite one for "
            f"each of the {len(joint_names)} data.joint_names, in their order"
        )
    return values


def trajectory_points(message: Any, joint_names: tuple[str, ...], where: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Of a JointTrajectory: ((P,) int64 ns from its start to each point, (P, J) float64, NaN of joints it lacks).

    None: it has none of the joints, or no point.

    Raises:
        BagError: points that go back in time, or without a finite position for each joint.
    """
    names = tuple(message.joint_names)
    ours, theirs, twice = _columns(names, joint_names)
    if not ours or not message.points:
        return None
    if twice:
        raise BagError(f"{where}: {', '.join(twice)} stands there more than once, expected one position of each joint")
    offset_ns = np.array([p.time_from_start.sec * 10**9 + p.time_from_start.nanosec for p in message.points], np.int64)
    if offset_ns[0] < 0 or (np.diff(offset_ns) <= 0).any() or offset_ns[-1] > MAX_TRAJECTORY_NS:
        times_s = ", ".join(f"{time_s:g}" for time_s in offset_ns[:5] / 1e9)
        raise BagError(f"{where}: its points are at {times_s} s, expected ascending times from 0 to a day")
    if any(len(point.positions) != len(names) for point in message.points):
        counts = sorted({len(point.positions) for point in message.points})
        raise BagError(f"{where}: {len(names)} joint names but {counts} positions in its points, expected one each")
    rows = np.full((len(offset_ns), len(joint_names)), np.nan)
    rows[:, ours] = np.array([point.positions for point in message.points], np.float64)[:, theirs]
    if not np.isfinite(rows[:, ours]).all():
        raise BagError(f"{where}: a position is not finite, expected angles")
    return offset_ns, rows


def marker_value(message: Any, where: str) -> int:
    """What a message of data.episode_marker_topic says: 0 stop, anything else start.

    Raises:
        BagError: a String that is neither "start" nor "stop".
    """
    if not isinstance(message.data, str):
        return int(message.data)
    word = message.data.strip().lower()
    if word not in MARKER_WORDS:
        raise BagError(
            f"{where}: found {message.data[:40]!r}, expected {' or '.join(MARKER_WORDS)}; set "
            "data.episode_marker_topic to the topic that says so, or leave it out with data.on_bad_bag: skip"
        )
    return MARKER_WORDS[word]
