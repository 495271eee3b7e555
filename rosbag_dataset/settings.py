"""What to read from a bag and how: the `data` and `conventions` sections of a config, as one frozen object.

Knows: names, types and meaning of the settings, and which joints are angles.
Must not know: where a config comes from (files, overrides, defaults: the trainer's), what is done with the settings.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import BagError
from .fields import EXAMPLE, TopicField, parse_field

UR_JOINTS = (
    "shoulder_pan_joint", "shoulder_lift_joint", "elbow_joint", "wrist_1_joint", "wrist_2_joint", "wrist_3_joint",
)  # fmt: skip

# What a setting can be that is a choice: for the config's schema, for those who check one, for the robot's side.
CHOICES = {
    "joint_resample": ("linear", "nearest"),
    "time_source": ("receive", "header"),
    "on_bad_bag": ("error", "skip"),
    "frames": ("auto", "cache", "bags"),
    "episodes": ("bag", "gaps", "still", "marker", "file"),
    "action_mode": ("delta", "absolute", "relative"),
}

# Keys that a checkpoint from before they were there does not have, and what that means.
NEXT_STATE = "next_state"  # data.action_source: actions are of what was measured a frame later
DATASET_ACTION = "action of the dataset"  # the same of data.lerobot_dataset, whose actions are taken as commands
SINCE: dict[str, Any] = {
    "state_topics": None, "observed_only": (), "state_units": None,
    "action_source": NEXT_STATE, "command_topics": None, "command_max_age_ms": None,
    "episodes": "bag", "episode_pause_s": math.inf, "episode_marker_topic": None, "keep_failures": False,
    "trim_still_s": None, "min_episode_s": 0.0,
    "frames": "cache",
}  # fmt: skip

Rule = tuple[bool, str, Any, str]  # whether it holds, the key, what was found, what is expected


@dataclass(frozen=True)
class BagSettings:
    """What to read from a bag and how. No defaults here: they live in the trainer's schema (and config.yaml).

    Attributes:
        bag_dir: folder that is searched recursively for bags.
        cache_dir: folder for decoded frames, and for indices of those that stay in the bags.
        joint_topic: topic of sensor_msgs/msg/JointState.
        camera_topics: camera name -> topic of Image or CompressedImage; order is the model's camera order.
        one_camera: camera_topics is data.camera_topic, for messages that name the key.
        joint_names: J joint names, with which state and action begin, in this order.
        state_topics: further states, name -> where their number stands; behind the joints, in this order. S states in
            all.
        observed_only: names of states that are not in the action, which has the other A, in the same order.
        state_units: name of a state -> its unit, for people; joints are in rad unless it says otherwise.
        action_source: NEXT_STATE, or the topic on which joints are commanded: a JointTrajectory, the JointState of a
            leader (both by name), or the Float64MultiArray of a forward controller (in the order of joint_names).
        command_topics: name of a state -> where its command stands; goes before action_source.
        command_max_age_ms: a command that is older has no action; None: commands never get old.
        fps: rate of the training frames in Hz.
        max_offset_ms: a frame needs a sample of every topic within this many milliseconds.
        joint_resample: "linear" or "nearest".
        time_source: "receive" (the bag's time stamps) or "header" (header.stamp).
        ros_distro: whose message definitions decode the bag, for example "humble".
        joint_sign: J factors of +1 or -1, used when apply_joint_sign.
        apply_joint_sign: multiply joint positions by joint_sign.
        wrap_angles: wrap revolute joints to within half a turn of a reference (synchronisation.refer_angles).
        image_resize: (H, W) of the stored frames, or None to keep the camera's size.
        action_mode: what the k-th action, k >= 1, of a chunk from frame t is: "delta" (q[t+k] - q[t+k-1]), "absolute"
            (q[t+k]) or "relative" (q[t+k] - q[t], the offset from the state in which the chunk was predicted). Of what
            is commanded the command in force at frame t+k-1 stands for q[t+k].
        min_used_share: a recording is refused if frames cover less than this share of its time.
        on_bad_bag: "error" or "skip".
        episodes: what is an episode: "bag" (a whole recording), or what separates several in one: see cutting.py.
        episode_pause_s: "gaps", "still": a pause of the recorder, or a rest of the arm, longer than this separates.
        episode_marker_topic: "marker": topic of a std_msgs Bool, String or integer, or None.
        keep_failures: "file": keep episodes that their sidecar marks as failures.
        trim_still_s: cut the rest at the start of each episode to this, or None to keep it.
        min_episode_s: shorter episodes are left out.
        frames: where pictures are read: "cache" (a decoded copy), "bags" (in place, by an index), or "auto" (in place
            where that is quick: in_place.choose(); from a copy where there is one).
    """

    bag_dir: Path
    cache_dir: Path
    joint_topic: str
    camera_topics: dict[str, str]
    one_camera: bool
    joint_names: tuple[str, ...]
    state_topics: dict[str, TopicField]
    observed_only: tuple[str, ...]
    state_units: dict[str, str]
    action_source: str
    command_topics: dict[str, TopicField]
    command_max_age_ms: float | None
    fps: float
    max_offset_ms: float
    joint_resample: str
    time_source: str
    ros_distro: str
    joint_sign: tuple[float, ...]
    apply_joint_sign: bool
    wrap_angles: bool
    image_resize: tuple[int, int] | None
    action_mode: str
    min_used_share: float
    on_bad_bag: str
    episodes: str
    episode_pause_s: float
    episode_marker_topic: str | None
    keep_failures: bool
    trim_still_s: float | None
    min_episode_s: float
    frames: str

    @property
    def state_names(self) -> tuple[str, ...]:
        """The names of all S states: joints, then data.state_topics."""
        return (*self.joint_names, *self.state_topics)

    @property
    def acted(self) -> np.ndarray:
        """(A,) int64: which states are in the action, too."""
        return np.flatnonzero([name not in self.observed_only for name in self.state_names])

    @property
    def commanded(self) -> np.ndarray:
        """(A,) bool: which of them have actions from commands; the others from what was measured a frame later."""
        by_source = self.joint_names if self.action_source != NEXT_STATE else ()
        return np.array([self.state_names[i] in {*self.command_topics, *by_source} for i in self.acted])

    @property
    def units(self) -> tuple[str, ...]:
        """The S states' units; "" of one that nobody has said."""
        joints = dict.fromkeys(self.joint_names, "rad")
        return tuple(self.state_units.get(name, joints.get(name, "")) for name in self.state_names)

    @property
    def revolute(self) -> np.ndarray:
        """Which states are angles, (S,) bool.

        JointState carries no joint types, so the UR arm's own joint names (with any prefix) count as revolute. Any
        other joint (a gripper's finger) and any state of data.state_topics is never wrapped.
        """
        return np.array([name.endswith(UR_JOINTS) and name in self.joint_names for name in self.state_names])


def settings_from(values: dict[str, Any]) -> BagSettings:
    """BagSettings from the merged `data` and `conventions` keys of a config; keys of other use are ignored.

    `camera_topics` wins over `camera_topic`, which is one camera called "color". Without the keys about episodes a bag
    is one episode.

    Raises:
        BagError: a key is missing, or holds something of another type.
    """
    values = SINCE | dict(values)
    names = [f.name for f in dataclasses.fields(BagSettings)]
    missing = [n for n in names if n not in values and n not in ("camera_topics", "one_camera")]
    if not (values.get("camera_topics") or values.get("camera_topic")):
        missing.append("camera_topic")
    if missing:
        raise BagError(f"the config lacks {', '.join(missing)} in its data or conventions section")
    try:
        values["one_camera"] = not values.get("camera_topics")
        values["camera_topics"] = dict(values.get("camera_topics") or {"color": values["camera_topic"]})
        values["joint_names"] = tuple(values["joint_names"] or ())
        values["state_topics"] = {name: parse_field(text) for name, text in (values["state_topics"] or {}).items()}
        values["observed_only"] = tuple(values["observed_only"] or ())
        values["state_units"] = dict(values["state_units"] or {})
        values["command_topics"] = {n: parse_field(text) for n, text in (values["command_topics"] or {}).items()}
        if values["command_max_age_ms"] is not None:
            values["command_max_age_ms"] = float(values["command_max_age_ms"])
        values["joint_sign"] = tuple(float(s) for s in values["joint_sign"] or ())
        values["image_resize"] = tuple(values["image_resize"]) if values["image_resize"] else None
        for name in ("fps", "max_offset_ms", "min_used_share", "episode_pause_s", "min_episode_s"):
            values[name] = float(values[name])
        values["trim_still_s"] = None if values["trim_still_s"] is None else float(values["trim_still_s"])
    except (AttributeError, TypeError, ValueError) as exc:
        raise BagError(f"the config's data or conventions section: {exc}") from None
    return BagSettings(**{n: values[n] for n in names})


def action_unit(unit: str, action_mode: str) -> str:
    """The unit of actions on a state in `unit`, which may be "": of deltas "rad per frame"."""
    return f"{unit} per frame".strip() if action_mode == "delta" else unit


def setting_rules(
    joint_names: Sequence[str], joint_sign: Sequence[float], apply_joint_sign: bool,
    image_resize: Sequence[int] | None, cameras: Mapping[str, str], min_used_share: float,
) -> list[Rule]:  # fmt: skip
    """Rules between the settings of bags, for those who read a config; `cameras` are {name: topic}."""
    joints = len(joint_names)
    size = image_resize is None or (len(image_resize) == 2 and min(image_resize) >= 32)
    plain = all(re.fullmatch(r"\w+", name) for name in cameras)
    distinct = len(set(cameras.values())) == len(cameras)
    fits = len(joint_sign) == joints or not apply_joint_sign
    one_sign_each = f"{joints} signs, one per data.joint_names"
    return [
        (joints > 0 and len(set(joint_names)) == joints, "data.joint_names", list(joint_names), "different names"),
        (all(abs(s) == 1 for s in joint_sign), "conventions.joint_sign", list(joint_sign), "+1 or -1 each"),
        (fits, "conventions.joint_sign", list(joint_sign), one_sign_each),
        (size, "conventions.image_resize", image_resize, "[height, width] of at least 32 pixels each"),
        (plain, "data.camera_topics", list(cameras), "names of letters, digits and underscores"),
        (0 <= min_used_share <= 1, "data.min_used_share", min_used_share, "a share from 0 to 1"),
        (distinct, "data.camera_topics", dict(cameras), "a topic of its own per camera"),
    ]


def command_rules(
    joint_names: Sequence[str], joint_topic: str, state_topics: Mapping[str, str], observed_only: Sequence[str],
    action_source: str, command_topics: Mapping[str, str], command_max_age_ms: float | None, cameras: Mapping[str, str],
) -> list[Rule]:  # fmt: skip
    """Rules between the settings of commands; topics and `cameras` as in a config, with texts."""
    acted = [name for name in (*joint_names, *state_topics) if name not in observed_only]
    taken = {joint_topic, *cameras.values()}
    named = action_source.startswith("/") and action_source not in taken
    source = named or action_source in (NEXT_STATE, DATASET_ACTION)
    broken = []
    for text in command_topics.values():
        try:
            if parse_field(text).topic in cameras.values():
                broken.append(text)
        except ValueError:
            broken.append(text)
    return [
        (source, "data.action_source", action_source, f"{NEXT_STATE}, or a topic of commands, which begins with /"),
        (set(command_topics) <= set(acted), "data.command_topics", list(command_topics),
         f"names of states that are acted on: {', '.join(acted)}"),
        (not broken, "data.command_topics", broken, f"{EXAMPLE}, of each"),
        (command_max_age_ms is None or 0 < command_max_age_ms < math.inf, "data.command_max_age_ms",
         command_max_age_ms, "above 0, or null"),
    ]  # fmt: skip


def episode_rules(data: Any) -> list[Rule]:
    """Rules between the settings of a `data` section that say what an episode is; `data` has them as attributes."""
    topic, marked = data.episode_marker_topic, data.episodes == "marker"
    return [
        (bool(topic) or not marked, "data.episode_marker_topic", topic, "a topic, with data.episodes: marker"),
        (not marked or data.time_source == "receive", "data.time_source", data.time_source,
         "receive with data.episodes: marker, because markers have no header.stamp"),
    ]  # fmt: skip


def state_rules(
    joint_names: Sequence[str], joint_topic: str, state_topics: Mapping[str, str], observed_only: Sequence[str],
    state_units: Mapping[str, str], cameras: Mapping[str, str],
) -> list[Rule]:  # fmt: skip
    """Rules between the settings of states; `state_topics` and `cameras` as in a config, with texts."""
    states = [*joint_names, *state_topics]
    key, texts, pictures = "data.state_topics", list(state_topics.values()), set(cameras.values())
    plain = all(re.fullmatch(r"\w+", name) and name not in joint_names for name in state_topics)
    broken, seen = [], []
    for text in texts:
        try:
            field = parse_field(text)
        except ValueError:
            broken.append(text)
            continue
        if field.topic in pictures or (field.topic, field.path.partition("[")[0]) == (joint_topic, "position"):
            seen.append(text)
    of_states = f"names of states, each once: {', '.join(states)}"
    some_left = len(set(observed_only)) == len(observed_only) < len(states) and set(observed_only) <= set(states)
    return [
        (plain, key, list(state_topics), "names of letters, digits and underscores that no joint has"),
        (not broken, key, broken, f"{EXAMPLE}, of each"),
        (not seen, key, seen, "a topic without pictures, and no joint's position: that is for data.joint_names"),
        (len(set(texts)) == len(texts), key, texts, "a field of its own per state"),
        (some_left, "data.observed_only", list(observed_only), f"{of_states}; one at least is acted on"),
        (set(state_units) <= set(states), "data.state_units", list(state_units), of_states),
    ]
