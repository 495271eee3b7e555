"""A recording onto a regular time grid: which frames there are, what each shows, which action follows it.

Knows: clocks that jitter, gaps, the project's conventions for joints (sign, wrapping) and actions.
Must not know: bags, messages, the cache, pixels (a frame names its image by number).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .commands import delay_s
from .errors import BagError
from .in_place import Source
from .reading import Recording
from .settings import BagSettings

MOVED_RAD = 1e-3  # a joint whose whole range in an episode is below this "never moved" (encoder noise is ~1e-5)
STILL_RAD_PER_S = 3e-3  # a frame in which every joint is slower than this is "still"
MAX_EPISODE_S = 24 * 3600.0  # longer recordings are broken time stamps
# UR joints turn by 2 pi to either side. Some drivers count on, hence the margin; a pose of which every angle is below
# 15.7 degrees, an arm stretched out flat, is none that anybody works in.
MAX_UR_RAD = 5 * np.pi
# A message may be late, by milliseconds. A clock that is set back by more than this is not put in order again.
MAX_STAMP_DELAY_MS = 10_000.0  # a message that is received later than this after its stamp was stamped by another clock
MAX_LATE_NS, MAX_OVERLAP_NS = 500_000_000, 50_000_000
# A UR10e's joints turn by at most 2.1 to 3.15 rad/s. Messages that are lost, late or out of order make a step between
# two of them look up to three times as fast. What is beyond is a jump: a few are cut out, more have a cause to find.
MAX_UR_RAD_PER_S, MAX_JUMPS = 10.0, 10


@dataclass
class Episode:
    """One recording, or a part of it, on a regular time grid: T kept frames.

    S states (joints, then data.state_topics), A of them acted.

    Frames that lack a sample of some camera or state were dropped. A segment is a run of frames with none dropped in
    between; neither an action nor a chunk of actions goes beyond one. Frame t's action leads to frame t+1, so that a
    segment's last frame has none; where all actions are of commands, it is of the command in force at frame t.
    """

    name: str
    time_ns: np.ndarray  # (T,) int64 tick times
    path_rad: np.ndarray  # (T, S) float64, states; angles without jumps
    segments: np.ndarray  # (S, 2) int64: [start, stop) of each segment in 0..T
    image_index: dict[str, np.ndarray]  # camera -> (T,) int64, which stored image a frame shows
    sync_report: dict[str, Any]  # what became of the recording: an entry of sync_report.json, a row of sync_table()
    entry: Path | None = None  # cache entry that holds the pixels, or where they are
    source: Source | None = None  # the recording's files, if its pictures are read there; None: the entry has pixels
    image_shape: dict[str, tuple[int, int]] = field(default_factory=dict)  # camera -> (H, W) as stored
    source_shape: dict[str, tuple[int, int]] = field(default_factory=dict)  # camera -> (H, W) as recorded
    stored_images: dict[str, int] = field(default_factory=dict)  # camera -> number of the recording's images
    content_hash: str = ""  # Bag.content_hash(): of the files' bytes
    recording_hash: str = ""  # Recording.sha256(): two bags with the same one are copies, whatever their bytes
    reference_rad: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (S,) around which angles are wrapped
    wrapped: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # (S,) bool, which states are
    # (T, S) float64, states as they were recorded, jumps and all. None with wrap_angles: they are on path_rad.
    recorded: np.ndarray | None = None
    action_mode: str = ""  # what actions are: BagSettings.action_mode
    acted: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (A,) which states are in the action
    joints: int = 0  # how many of the states, the first, are joints
    # (T, A) float64, where the action of frame t leads: on path_rad. None without commands: to frame t+1's path_rad.
    target: np.ndarray | None = None
    ahead: int = 1  # frames from a frame to the one that its action needs: 0 where all actions are of commands
    bag: str = ""  # the recording that it is from, or a part of
    whole: bool = True  # False: a part of it, and other parts of its entry's pixels are not its own (cutting.py)
    kept: tuple[Path, int] | None = None  # where its arrays lie on disk, if they do (warm.py)

    # States and actions follow from the path; they are computed where they are asked for, and take no memory.

    @property
    def state(self) -> np.ndarray:
        """(T, S) float32, rad for revolute joints."""
        return self.states(slice(None)).astype(np.float32)

    def states(self, frames: int | slice) -> np.ndarray:
        """(..., S) float64, of some frames: angles on the turn around reference_rad."""
        if self.recorded is not None:
            return self.recorded[frames]
        state = np.array(self.path_rad[frames])
        state[..., self.wrapped] = wrap_to_pi(state[..., self.wrapped], self.reference_rad[self.wrapped])
        return state

    @property
    def action(self) -> np.ndarray:
        """(T, A) float32, the first of the chunk from frame t; zeros where frame t has no action."""
        return self._where_acted(self.first_actions).astype(np.float32)

    def _where_acted(self, of: Callable[[int, int], np.ndarray]) -> np.ndarray:
        """(T, A) float64: of(start, stop), (stop - start, A), for all frames that have an action; zeros elsewhere."""
        values = np.zeros((len(self.time_ns), len(self.acted)))
        for start, stop in self.segments:
            last = max(start, stop - self.ahead)
            values[start:last] = of(start, last)
        return values

    def first_actions(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, A) float64: the first action of the chunk from each of these frames of a segment.

        Absolute ones start on the turn of the episode's first state and follow the motion without jumps.
        """
        if self.action_mode == "absolute":
            return self._target(start, stop) + (self.states(0) - self.path_rad[0])[self.acted]
        if self.target is not None:
            return self.target[start:stop] - self.path_rad[start:stop, self.acted]
        path = self.path_rad if self.recorded is None else self.recorded
        return np.diff(path[start : stop + 1, self.acted], axis=0)

    @property
    def frames_with_action(self) -> int:
        """How many frames have an action: of what is measured, all but each segment's last."""
        return int(np.maximum(np.diff(self.segments, axis=1) - self.ahead, 0).sum())

    @property
    def has_action(self) -> bool:
        """Whether there is anything to learn or to measure."""
        return self.frames_with_action > 0

    @property
    def action_stop(self) -> np.ndarray:
        """(T,) int64: for each frame the index behind the last action of its segment; == t where t has none."""
        stop = np.empty(len(self.time_ns), np.int64)
        for first, last in self.segments:
            stop[first:last] = last - self.ahead
        return stop

    @property
    def chunks_are(self) -> str:
        """How chunks follow from chunk_values.

        They are these "values", their "offsets" from chunk_origins, or "steps" from one to the next, the first of which
        is from chunk_origins.
        """
        if self.action_mode == "relative":
            return "offsets"
        return "values" if self.action_mode == "absolute" or self.target is None else "steps"

    @property
    def chunk_values(self) -> np.ndarray:
        """(T, A) float64: what stands in a chunk for each frame that has an action; see chunks_are."""
        return self._where_acted(self.first_actions if self.chunks_are == "values" else self._target)

    @property
    def chunk_origins(self) -> np.ndarray:
        """(T, A) float64: from where a chunk leads that begins in a frame; see chunks_are."""
        return self.path_rad[:, self.acted]

    def chunk(self, t: int, count: int) -> np.ndarray:
        """(count, A): the actions of a chunk from frame t, `count` of which lie in t's segment."""
        if self.chunks_are == "offsets":
            return self._target(t, t + count) - self.path_rad[t, self.acted]
        if self.chunks_are == "values":
            return self.first_actions(t, t + count)
        return np.diff(self._target(t, t + count), axis=0, prepend=self.path_rad[t, self.acted][None])

    def chunk_actions(self, start: int, count: int, k: int) -> np.ndarray:
        """(count - k + 1, A): the k-th actions, k >= 1, of the chunks from `count` frames of a segment."""
        target, stop = self._target(start, start + count), start + count - k + 1
        if self.action_mode == "relative" or k == 1:
            return target[k - 1 :] - self.path_rad[start:stop, self.acted]
        return np.diff(target, axis=0)[k - 2 :]

    def _target(self, start: int, stop: int) -> np.ndarray:
        return self.path_rad[start + 1 : stop + 1, self.acted] if self.target is None else self.target[start:stop]


def synchronise(
    name: str, recording: Recording, settings: BagSettings, angle_reference_rad: np.ndarray | None = None
) -> Episode:
    """Put a recording on a grid of `fps`, drop frames that lack a sample, and cut it into segments.

    The grid covers the time in which every camera and state was being recorded and starts on an image of the first
    camera. Images are taken by nearest neighbour; each joint is interpolated linearly (or nearest) between the messages
    that have it, after putting them in time order, and so is each other state; one of bools or integers is what the
    last message at or before a frame said. Joint conventions (sign, wrapping) are applied here.

    Args:
        name: the episode's name.
        recording: times, joints and further states, from read_bag() or load_entry().
        settings: topics, rate and conventions.
        angle_reference_rad: (S,) as in refer_angles(); None is 0 for every state.

    Raises:
        BagError: topics that do not overlap in time, broken time stamps, a clock that was set back, positions in
            degrees, a joint that jumps again and again, no joint that moves, no frame left, or fewer than
            min_used_share asks for.
    """
    tick_ns = 1e9 / settings.fps
    joint_streams = _joint_streams(recording, settings)
    other_streams = _other_streams(recording, settings)
    for stream in (*joint_streams, *other_streams):
        _check_clock(f"{name}: {stream.name}", stream.recorded_ns, settings)
    for camera, times in recording.camera_time_ns.items():
        _check_clock(f"{name}: {settings.camera_topics[camera]}", times, settings)
    _check_unit(name, joint_streams, settings)
    camera_order = {c: np.argsort(t, kind="stable") for c, t in recording.camera_time_ns.items()}
    camera_ns = {c: t[camera_order[c]] for c, t in recording.camera_time_ns.items()}

    # The grid.
    streams = {s.name: s.time_ns for s in (*joint_streams, *other_streams)}
    streams |= {settings.camera_topics[c]: t for c, t in camera_ns.items()}
    begin, end = max(t[0] for t in streams.values()), min(t[-1] for t in streams.values())
    if end < begin:
        spans = "; ".join(f"{topic} {t[0] / 1e9:.3f} to {t[-1] / 1e9:.3f} s" for topic, t in streams.items())
        raise BagError(f"{name}: the topics do not overlap in time: {spans}; see data.time_source")
    if (end - begin) / 1e9 > MAX_EPISODE_S:
        raise BagError(
            f"{name}: spans {(end - begin) / 1e9:.0f} s, more than a day; its time stamps are broken, "
            "see data.time_source"
        )
    first_camera = next(iter(camera_ns.values()))
    begin = first_camera[np.searchsorted(first_camera, begin)]  # exists: the camera's last image is at or after `end`
    count = int(max(0, end - begin) / tick_ns + 1e-6) + 1  # stamps are rounded to ns: keep a tick that ends on `end`
    ticks = begin + np.rint(np.arange(count) * tick_ns).astype(np.int64)

    # Which of its ticks are kept: those with a sample of every camera and state near enough.
    index = {c: nearest_index(t, ticks) for c, t in camera_ns.items()}
    offset_ms = {
        s.name: np.abs(s.time_ns[nearest_index(s.time_ns, ticks)] - ticks) / 1e6
        for s in (*joint_streams, *other_streams)
    }
    for camera, i in index.items():
        offset_ms[settings.camera_topics[camera]] = np.abs(camera_ns[camera][i] - ticks) / 1e6
    near = np.all([o <= settings.max_offset_ms for o in offset_ms.values()], axis=0)
    joints_whole = near & ~np.any([_in_gap(s, ticks, settings) for s in joint_streams], axis=0)
    whole = joints_whole & ~np.any([np.zeros_like(near), *(_in_gap(s, ticks, settings) for s in other_streams)], axis=0)
    # Which max_offset_ms would do for each tick, and so for nearly all.
    gaps_ms = [_gap_ms(s, ticks, settings) for s in (*joint_streams, *other_streams)]
    needed_ms = np.max([*offset_ms.values(), *(gap_ms / 2 for gap_ms in gaps_ms)], axis=0)
    keeps_95_percent_ms = math.ceil(np.quantile(needed_ms, 0.95))
    if not whole.any():
        worst = ", ".join(f"{t} {np.median(o):.1f} ms" for t, o in offset_ms.items())
        states = "joints and states" if other_streams else "joints"
        raise BagError(
            f"{name}: no frame has every topic within data.max_offset_ms {settings.max_offset_ms:g} (and {states} on "
            f"both sides, at most twice that apart); median offsets: {worst}; data.max_offset_ms: "
            f"{keeps_95_percent_ms} would keep 95% of the frames"
        )
    fastest, jumps = _fast_steps(joint_streams, begin, end, settings)
    steady = whole & ~_at_jumps(jumps, ticks)
    if fastest is not None and (len(jumps) > MAX_JUMPS or not steady.any()):
        raise BagError(
            f"{name}: {settings.joint_topic}: {fastest['joint']} jumps by {fastest['rad']:.3f} rad at "
            f"{begin / 1e9 + fastest['at_s']:.3f} s ({fastest['rad_per_s']:.0f} rad/s), one of {len(jumps)} steps "
            f"faster than {MAX_UR_RAD_PER_S:g} rad/s, which no UR makes; two publishers that take turns look so, see: "
            f"ros2 topic info -v {settings.joint_topic}; record with one of them, or leave this recording out with "
            "data.on_bad_bag: skip"
        )
    commands, kept = _commands(name, recording, ticks, steady, settings)
    first_ns, last_ns = min(t[0] for t in streams.values()), max(t[-1] for t in streams.values())
    recorded_s, used_s = (last_ns - first_ns) / 1e9 + 1 / settings.fps, int(kept.sum()) / settings.fps
    if used_s < settings.min_used_share * recorded_s:
        spans = ", ".join(
            f"{topic} {(t[0] - first_ns) / 1e9:.1f} to {(t[-1] - first_ns) / 1e9:.1f} s" for topic, t in streams.items()
        )
        raise BagError(
            f"{name}: frames cover {used_s:.1f} of the {recorded_s:.1f} s that were recorded, "
            f"{used_s / recorded_s:.0%}, expected a share of at least data.min_used_share {settings.min_used_share:g}: "
            f"{spans}, and in the time of all of them {int((~kept).sum())} frames were dropped; record it again, lower "
            "data.min_used_share to take it as it is, or leave it out with data.on_bad_bag: skip"
        )
    moved = np.empty(recording.joint_rad.shape[1], bool)
    for s in joint_streams:
        moved[s.states] = np.ptp(s.value, axis=0) >= MOVED_RAD
    if not moved.any():
        raise BagError(
            f"{name}: no joint moves by more than {MOVED_RAD:g} rad in the whole recording; "
            f"is {settings.joint_topic} the live robot?"
        )

    # What the kept frames hold.
    state, path = _resample([*joint_streams, *other_streams], ticks[kept], settings)
    segments = _segments(kept)
    image_index = {c: camera_order[c][i[kept]] for c, i in index.items()}
    image_age_s = {c: (ticks[kept] - camera_ns[c][i[kept]]) / 1e9 for c, i in index.items()}

    sync_report = {
        "episode": name,
        "begin_ns": int(begin),  # of the bag's clock: what all times in s here count from
        "duration_s": round(max(0, end - begin) / 1e9, 3),
        "recorded_s": round(recorded_s, 3),
        "used_s": round(used_s, 3),
        "image_size": {c: list(shape) for c, shape in recording.image_shape.items()},
        "frames": int(kept.sum()),
        "dropped": int((~kept).sum()),
        "dropped_in_joint_gaps": int((near & ~joints_whole).sum()),
        "dropped_in_state_gaps": int((joints_whole & ~whole).sum()),
        "dropped_at_joint_jumps": int((whole & ~steady).sum()),
        "dropped_without_command": int((steady & ~kept).sum()),
        "joint_jumps": len(jumps),
        "fastest_joint_step": fastest,
        "ignored_joint_messages": recording.ignored_joint_messages,
        "ignored_messages": recording.ignored_messages,
        "late_ms": _late_ms(recording, settings),
        "picture_faults": {
            camera: {
                kind: {
                    "count": count,
                    "first_s": round((first - begin) / 1e9, 3),
                    "last_s": round((last - begin) / 1e9, 3),
                }
                for kind, (count, first, last) in found.items()
            }
            for camera, found in recording.picture_faults.items()
        },
        "dropped_packets": {
            c: {"before_keyframe": before, "later": later} for c, (before, later) in recording.dropped_packets.items()
        },
        "max_offset_ms_that_keeps_95_percent": keeps_95_percent_ms,
        "segments": len(segments),
        "frames_without_action": 0 if settings.commanded.all() else len(segments),
        "repeated_images": {
            c: int(sum((np.diff(i[a:b]) == 0).sum() for a, b in segments)) for c, i in image_index.items()
        },
        "unused_images": {c: int(len(camera_ns[c]) - len(np.unique(i))) for c, i in image_index.items()},
        "topics": {
            topic: {
                "messages": len(times),
                "rate_hz": round((len(times) - 1) * 1e9 / max(1, int(times[-1] - times[0])), 2),
                "offset_ms_median": round(float(np.median(offset_ms[topic])), 2),
                "offset_ms_worst": round(float(offset_ms[topic].max()), 2),
                "starts_s": round((times[0] - begin) / 1e9, 3),
                "ends_s": round((times[-1] - end) / 1e9, 3),
            }
            for topic, times in streams.items()
        },
        "joints_never_moved": [n for n, m in zip(settings.joint_names, moved, strict=True) if not m],
        "states_never_changed": [n for n in settings.state_topics if np.ptp(recording.states[n].value) == 0],
        "commands": _command_report(recording, joint_streams, begin, end, settings),
        "still_share": _still_share(joint_streams),
        "rest_at_start_s": _rest_at_start_s(path[:, : len(moved)], settings.fps),
        "image_age_s": {
            c: {"median": round(float(np.median(age)), 4), "most": round(float(age.max()), 4)}
            for c, age in image_age_s.items()
        },
    }
    episode = Episode(
        name, ticks[kept], path, segments, image_index, sync_report,
        image_shape=recording.image_shape, source_shape=recording.source_shape,
        stored_images={c: len(t) for c, t in camera_ns.items()}, reference_rad=np.zeros(path.shape[1]),
        wrapped=settings.revolute & settings.wrap_angles, recorded=None if settings.wrap_angles else state,
        action_mode=settings.action_mode, acted=settings.acted, joints=len(settings.joint_names),
        ahead=0 if settings.commanded.all() else 1,
    )  # fmt: skip
    if settings.commanded.any():
        episode.target = _targets(path[:, settings.acted], commands[kept], settings)
    refer_angles(episode, episode.reference_rad if angle_reference_rad is None else angle_reference_rad, settings)
    return episode


def _late_ms(recording: Recording, settings: BagSettings) -> dict[str, float]:
    """Camera -> how much later its messages were received after their header stamps than the joints', median, ms.

    Only where receive times are used, and both have stamps, of one clock.
    """
    delays = recording.stamp_delay_ms
    if settings.time_source != "receive" or settings.joint_topic not in delays:
        return {}
    late = {c: delays[t] - delays[settings.joint_topic] for c, t in settings.camera_topics.items() if t in delays}
    return {camera: round(ms, 1) for camera, ms in late.items() if abs(ms) <= MAX_STAMP_DELAY_MS}


def _commands(
    name: str, recording: Recording, ticks_ns: np.ndarray, steady: np.ndarray, settings: BagSettings
) -> tuple[np.ndarray, np.ndarray]:
    """The commands in force at the ticks, (T, A) float64, NaN of what has none; and which ticks are kept, (T,) bool.

    Those of the `steady` ones at which all that is commanded has a command that is not too old.

    Raises:
        BagError: that is none, or the clock was set back while commands were recorded.
    """
    commands, kept = np.full((len(ticks_ns), len(settings.acted)), np.nan), steady.copy()
    oldest: dict[str, float] = {}
    for column in np.flatnonzero(settings.commanded):
        state = settings.state_names[settings.acted[column]]
        given = recording.commands[state]
        _check_clock(f"{name}: commands of {state}", given.message_ns, settings)
        commands[:, column], age_ns = given.at(ticks_ns)
        oldest[state] = float(np.median(age_ns[steady])) / 1e6
        kept &= age_ns <= (np.inf if settings.command_max_age_ms is None else settings.command_max_age_ms * 1e6)
        kept &= np.isfinite(commands[:, column])
    if not kept.any():
        ages = ", ".join(f"{state} {age:.0f} ms" for state, age in oldest.items())
        raise BagError(
            f"{name}: no frame has a command of each of these states that is at most data.command_max_age_ms "
            f"{settings.command_max_age_ms} old; median ages: {ages}"
        )
    return commands, kept


def _targets(path: np.ndarray, commands: np.ndarray, settings: BagSettings) -> np.ndarray:
    """(T, A) float64, where each frame's action leads: its command on the turn of the path, or else the next path.

    Args:
        path: (T, A) float64, what was measured, without jumps.
        commands: (T, A) float64, those in force, in the robot's own sign.
        settings: which are commanded, which are angles, signs.
    """
    target, acted = np.concatenate([path[1:], path[-1:]]), settings.acted
    sign = np.ones(len(settings.state_names))
    if settings.apply_joint_sign:
        sign[: len(settings.joint_names)] = settings.joint_sign
    for column in np.flatnonzero(settings.commanded):
        command = commands[:, column] * sign[acted[column]]
        if settings.wrap_angles and settings.revolute[acted[column]]:
            command = wrap_to_pi(command, path[:, column])
        target[:, column] = command
    return target


def _command_report(
    recording: Recording, joint_streams: Sequence[_Stream], begin: int, end: int, settings: BagSettings
) -> dict[str, Any]:
    """What was commanded: of each state its messages and their rate, and the joints' delay behind all commands."""
    of_state = {j: (s, i) for s in joint_streams for i, j in enumerate(s.states)}
    names = [settings.state_names[i] for i in settings.acted[settings.commanded]]
    pairs = []
    for name in names:
        if name in settings.joint_names:
            stream, column = of_state[settings.joint_names.index(name)]
            given = recording.commands[name]
            angles = np.unwrap(given.value) if settings.revolute[stream.states[column]] else given.value
            pairs.append(((given.time_ns, angles), (stream.time_ns, stream.path[:, column])))
    delay = delay_s([asked for asked, _ in pairs], [done for _, done in pairs]) if pairs else None
    rates = {}
    for name in names:
        times = recording.commands[name].message_ns
        hz = (len(times) - 1) * 1e9 / max(1, int(times.max() - times.min()))
        rates[name] = {"messages": len(times), "rate_hz": round(hz, 2)}
    return {"of": rates, "joints_lag_s": delay} if names else {}


def refer_angles(episode: Episode, reference_rad: np.ndarray, settings: BagSettings) -> None:
    """Give an episode's angles on the turn around a reference, in place: states, actions and the sync report.

    The same pose of a joint has infinitely many angles, a turn apart. Wrapped states lie in (reference - pi,
    reference + pi]; absolute actions start on the turn of the episode's first state and follow the motion without
    jumps. With the reference of statistics.angle_references() the seam, half a turn away, is where no training
    episode comes; a joint that crosses it all the same is named in the sync report.

    Args:
        episode: from synchronise().
        reference_rad: (S,) float64, rad; used for joints that are wrapped.
        settings: those that the episode was synchronised with; without `wrap_angles` nothing is done.
    """
    if not settings.wrap_angles:
        return
    episode.reference_rad = np.asarray(reference_rad, np.float64)
    state = episode.states(slice(None))
    turned = np.abs(np.diff(state - episode.path_rad, axis=0)).max(axis=0, initial=0.0) > np.pi
    names = [name for name, crosses in zip(settings.state_names, turned, strict=True) if crosses]
    episode.sync_report["joints_across_the_seam"] = names


@dataclass
class _Stream:
    """States that always come in the same messages: M samples, in time order, no two at one time."""

    name: str  # in reports and errors: the topic, and which of its states if others come apart
    states: list[int]  # which ones, of BagSettings.state_names
    recorded_ns: np.ndarray  # int64, as recorded: in the order of the file, with the same time twice or not
    time_ns: np.ndarray  # (M,) int64
    value: np.ndarray  # (M, len(states)) float64, as recorded
    path: np.ndarray  # the same, angles without jumps by a turn
    held: bool = False  # bools or integers: nothing lies between two of them


def _stream(
    name: str, states: list[int], recorded_ns: np.ndarray, values: np.ndarray, settings: BagSettings, held: bool = False
) -> _Stream:
    """A stream of samples (N,) and (N, len(states)), in file order; of samples at one time the last counts."""
    time_ns, value = recorded_ns, values
    if not (np.diff(recorded_ns) > 0).all():
        order = np.argsort(recorded_ns, kind="stable")
        last_of_equal = np.append(recorded_ns[order[1:]] != recorded_ns[order[:-1]], True)
        time_ns, value = recorded_ns[order[last_of_equal]], values[order[last_of_equal]]
    path = value.copy()
    for j in np.flatnonzero(settings.revolute[states]):  # one by one: unwrap takes five times what it is given
        path[:, j] = np.unwrap(path[:, j])
    return _Stream(name, states, recorded_ns, time_ns, value, path, held)


def _other_streams(recording: Recording, settings: BagSettings) -> list[_Stream]:
    """The samples of data.state_topics; those of one topic together if they come in the same messages."""
    together: dict[tuple[str, bytes, bool], list[str]] = {}
    for name, field_ in settings.state_topics.items():
        samples = recording.states[name]
        together.setdefault((field_.topic, samples.time_ns.tobytes(), samples.held), []).append(name)
    return [
        _stream(
            f"{topic} ({', '.join(names)})",
            [settings.state_names.index(name) for name in names],
            recording.states[names[0]].time_ns,
            np.stack([recording.states[name].value for name in names], axis=1),
            settings,
            held,
        )
        for (topic, _, held), names in together.items()
    ]


def streams_of(recording: Recording, settings: BagSettings) -> list[_Stream]:
    """The samples of joints and other states, apart as they came: the first of a sync report's "topics"."""
    return [*_joint_streams(recording, settings), *_other_streams(recording, settings)]


def _joint_streams(recording: Recording, settings: BagSettings) -> list[_Stream]:
    """The joints' samples apart, as their publishers sent them: mostly one stream of all."""
    present = ~np.isnan(recording.joint_rad)
    together: dict[bytes, list[int]] = {}  # joints by the rows that have them
    for joint in range(present.shape[1]):
        together.setdefault(present[:, joint].tobytes(), []).append(joint)
    streams: list[_Stream] = []
    for joints in together.values():
        names = ", ".join(settings.joint_names[joint] for joint in joints)
        name = settings.joint_topic if len(together) == 1 else f"{settings.joint_topic} ({names})"
        rows = np.flatnonzero(present[:, joints[0]])
        whole = len(rows) == len(present) and len(together) == 1
        rad = recording.joint_rad if whole else recording.joint_rad[rows][:, joints]
        streams.append(_stream(name, joints, recording.joint_time_ns[rows], rad, settings))
    return streams


def _check_clock(where: str, recorded_ns: np.ndarray, settings: BagSettings) -> None:
    """The clock was not set back while (N,) messages were recorded: sorted by time, two motions would be one.

    Files that are read in a wrong order step back as well, but to times that no other has: sorting puts those right.

    Raises:
        BagError: it was, saying when and by how much.
    """
    steps = np.diff(recorded_ns)
    back = np.flatnonzero(steps < -MAX_LATE_NS) + 1
    if not len(back):
        return
    runs = np.append(0, back)  # where each stretch between two steps back begins
    first, last = np.minimum.reduceat(recorded_ns, runs), np.maximum.reduceat(recorded_ns, runs)
    order = np.argsort(first, kind="stable")
    if (np.maximum.accumulate(last[order])[:-1] - first[order][1:] <= MAX_OVERLAP_NS).all():
        return
    at = int(steps.argmin())
    other = "header" if settings.time_source == "receive" else "receive"
    raise BagError(
        f"{where}: the clock steps back by {-steps[at] / 1e9:.3f} s after message {at + 1}, from "
        f"{recorded_ns[at] / 1e9:.3f} to {recorded_ns[at + 1] / 1e9:.3f} s, and that time was recorded twice; record "
        f"it again, take the other clock with data.time_source: {other} if nobody set that one, or leave it out with "
        "data.on_bad_bag: skip"
    )


def _check_unit(name: str, joint_streams: Sequence[_Stream], settings: BagSettings) -> None:
    """The arm's joints are where a UR's can be.

    Raises:
        BagError: one is beyond, as in a recording in degrees.
    """
    for s in joint_streams:
        for joint in np.flatnonzero(settings.revolute[s.states]):
            far = np.abs(s.value[:, joint])
            at = far.argmax()
            if far[at] <= MAX_UR_RAD:
                continue
            what = "looks like degrees" if far[at] < 1000 else "is no angle"
            raise BagError(
                f"{name}: {settings.joint_topic}: {settings.joint_names[s.states[joint]]} is {s.value[at, joint]:.6g} "
                f"at {s.time_ns[at] / 1e9:.3f} s, which {what}; expected rad, a UR joint's from -6.28 to 6.28; record "
                "positions in rad (degrees x pi / 180), or leave it out with data.on_bad_bag: skip"
            )


def _fast_steps(
    joint_streams: Sequence[_Stream], begin: int, end: int, settings: BagSettings
) -> tuple[dict[str, Any] | None, np.ndarray]:
    """The fastest step of a UR joint from one message to its next, between two times in ns, and those no UR makes.

    Of joints in other units nothing is known. A step takes at least the mean time between messages: they may arrive in
    bursts, with hardly any time in between.

    Returns:
        (its "joint", "rad_per_s", "rad" and "at_s" after `begin`; None if there is no step,
         (N, 2) int64 ns: of each jump, the times of the messages before and after it).
    """
    fastest, most, jumps = None, 0.0, [np.zeros((0, 2), np.int64)]
    for s in joint_streams:
        arm = np.flatnonzero(settings.revolute[s.states])
        inside = np.flatnonzero((s.time_ns[1:] >= begin) & (s.time_ns[:-1] <= end))
        if not len(arm) or not len(inside):
            continue
        before, after = s.time_ns[inside], s.time_ns[inside + 1]
        mean_ns = (s.time_ns[-1] - s.time_ns[0]) / (len(s.time_ns) - 1)
        elapsed_s, fast = np.maximum(after - before, mean_ns) / 1e9, np.zeros(len(inside), bool)
        for joint in arm:
            step_rad = np.abs(np.diff(s.path[:, joint])[inside])
            speed = step_rad / elapsed_s
            fast |= speed > MAX_UR_RAD_PER_S
            at = speed.argmax()
            if fastest is None or speed[at] > most:
                most = speed[at]
                fastest = {
                    "joint": settings.joint_names[s.states[joint]],
                    "rad_per_s": round(float(most), 3),
                    "rad": round(float(step_rad[at]), 4),
                    "at_s": round(float(after[at] - begin) / 1e9, 3),
                }
        jumps.append(np.stack([before[fast], after[fast]], axis=1))
    return fastest, np.concatenate(jumps)


def _at_jumps(jumps: np.ndarray, ticks_ns: np.ndarray) -> np.ndarray:
    """(T,) bool: the ticks within a jump (N, 2), and the first one after it: no action may lead across."""
    at = np.zeros(len(ticks_ns), bool)
    first, last = np.searchsorted(ticks_ns, jumps[:, 0], side="right"), np.searchsorted(ticks_ns, jumps[:, 1])
    for a, b in zip(first, last, strict=True):
        at[a : b + 1] = True
    return at


def nearest_index(times_ns: np.ndarray, ticks_ns: np.ndarray) -> np.ndarray:
    """For each tick the index of the nearest of the sorted `times_ns` (N >= 1); the earlier one on a tie."""
    right = np.clip(np.searchsorted(times_ns, ticks_ns), 0, len(times_ns) - 1)
    left = np.maximum(right - 1, 0)
    return np.where(ticks_ns - times_ns[left] <= np.abs(times_ns[right] - ticks_ns), left, right)


def _in_gap(stream: _Stream, ticks_ns: np.ndarray, settings: BagSettings) -> np.ndarray:
    """(T,) bool: ticks whose two neighbouring samples are more than twice `max_offset_ms` apart.

    A line across such a gap is a guess: the joints may have done anything in between. So is a value that is held across
    it. "nearest" takes a sample that max_offset_ms has found near enough.
    """
    return _gap_ms(stream, ticks_ns, settings) > 2 * settings.max_offset_ms


def _gap_ms(stream: _Stream, ticks_ns: np.ndarray, settings: BagSettings) -> np.ndarray:
    """(T,) float64: how far apart the two samples are between which a tick lies; 0 where only the nearest counts."""
    if settings.joint_resample != "linear" and not stream.held:
        return np.zeros(len(ticks_ns))
    times_ns = stream.time_ns
    left = np.maximum(np.searchsorted(times_ns, ticks_ns, side="right") - 1, 0)
    right = np.minimum(np.searchsorted(times_ns, ticks_ns, side="left"), len(times_ns) - 1)
    return (times_ns[right] - times_ns[left]) / 1e6


def _segments(kept: np.ndarray) -> np.ndarray:
    """(S, 2) int64: the runs of kept ticks, as [start, stop) among the kept ones. `kept` is (ticks,) bool."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], kept.view(np.int8), [0]))))
    kept_so_far = np.cumsum(kept)  # up to and including each tick
    return np.array([(kept_so_far[a] - 1, kept_so_far[b - 1]) for a, b in edges.reshape(-1, 2)], np.int64)


def _still_share(joint_streams: Sequence[_Stream]) -> float:
    """The share of the recording's time in which every joint was slower than STILL_RAD_PER_S."""
    times = np.unique(np.concatenate([s.time_ns for s in joint_streams]))  # between two of them no speed changes
    begin, end = max(s.time_ns[0] for s in joint_streams), min(s.time_ns[-1] for s in joint_streams)
    times = times[(begin <= times) & (times <= end)]
    if len(times) < 2:
        return 1.0
    still = np.ones(len(times) - 1, bool)
    for s in joint_streams:
        fastest = functools.reduce(np.maximum, (np.abs(np.diff(column)) for column in s.value.T))
        speed = fastest / (np.diff(s.time_ns) / 1e9)
        still &= (speed < STILL_RAD_PER_S)[np.searchsorted(s.time_ns, times[:-1], side="right") - 1]
    return round(float(np.average(still, weights=np.diff(times) / 1e9)), 3)


def _rest_at_start_s(path_rad: np.ndarray, fps: float) -> float:
    """How long the joints (T, J) stay still, slower than STILL_RAD_PER_S, from the first frame on."""
    speed = np.abs(np.diff(path_rad, axis=0)).max(axis=1, initial=0.0) * fps
    moving = np.flatnonzero(speed >= STILL_RAD_PER_S)
    return round(int(moving[0] if len(moving) else len(speed)) / fps, 3)


def wrap_to_pi(angle_rad: np.ndarray, reference_rad: np.ndarray | float = 0.0) -> np.ndarray:
    """Angles to (reference - pi, reference + pi], any shapes that broadcast, float64; those inside stay as they are."""
    turns = np.ceil((angle_rad - np.pi - reference_rad) / (2 * np.pi))
    return angle_rad - 2 * np.pi * turns


def no_motion(state_rad: np.ndarray, recorded: np.ndarray, wrapped: np.ndarray, action_mode: str) -> np.ndarray:
    """What a policy must beat: actions (N, A) float32 that keep the joints where they are.

    Args:
        state_rad: (N, A), where they are.
        recorded: (N, A), the recorded actions. Absolute ones are not wrapped, states are: the answer is on their turn.
        wrapped: (A,) bool, which of them are wrapped.
        action_mode: of the recorded actions; the first relative one of a chunk is a delta.
    """
    if action_mode != "absolute":
        return np.zeros_like(recorded, np.float32)
    away = recorded - state_rad
    return (recorded - np.where(wrapped, wrap_to_pi(away), away)).astype(np.float32)


def _resample(streams: Sequence[_Stream], ticks_ns: np.ndarray, settings: BagSettings) -> tuple[np.ndarray, np.ndarray]:
    """States at the ticks, with the project's sign applied to joints: as recorded, and without jumps.

    Returns:
        (the states, (T, S) float64: without `wrap_angles` interpolated between the recorded values, jumps and all;
         the same path without jumps, (T, S) float64. It is unwrapped along all samples of the recording, so that it
         also counts turns that were made while frames were dropped).
    """

    def at_ticks(stream: _Stream, path: np.ndarray) -> np.ndarray:
        times_ns = stream.time_ns
        if stream.held:
            return path[np.searchsorted(times_ns, ticks_ns, side="right") - 1]
        if settings.joint_resample == "linear":
            elapsed, wanted = (times_ns - times_ns[0]).astype(np.float64), (ticks_ns - times_ns[0]).astype(np.float64)
            return np.stack([np.interp(wanted, elapsed, column) for column in path.T], axis=1)
        return path[nearest_index(times_ns, ticks_ns)]

    state, continuous = (np.empty((len(ticks_ns), len(settings.state_names))) for _ in range(2))
    for s in streams:
        continuous[:, s.states] = at_ticks(s, s.path)  # interpolated so, no value lies between +pi and -pi
        state[:, s.states] = continuous[:, s.states] if settings.wrap_angles else at_ticks(s, s.value)
    if settings.apply_joint_sign:
        sign = np.append(np.asarray(settings.joint_sign, np.float64), np.ones(len(settings.state_topics)))
        state, continuous = state * sign, continuous * sign
    return state, continuous
