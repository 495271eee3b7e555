"""What a person is to see of recordings, taken out of them while they are read: thumbnails, thinned curves, marks.

A recording may be hours long: what stays of it is a few thousand points and ten small pictures per camera, whatever its
length.

Knows: how a recording becomes small; what in it is a rest, a stall, a gap, a jump.
Must not know: what is good or bad about that (findings.py), HTML (html_report.py), files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from report_page import envelope

from .bags import Bag
from .cutting import moves
from .reading import Recording
from .settings import BagSettings
from .synchronisation import MAX_UR_RAD, MAX_UR_RAD_PER_S, Episode, nearest_index, streams_of

THUMBNAILS, THUMBNAIL_WIDTH = 10, 96  # in a strip, side by side; pixels of each
# Pictures are kept small until the episodes are known: enough for a strip without holes, and at most so many of a
# recording that holds many episodes (7 KB each).
KEPT, KEPT_OF_MANY = 4 * THUMBNAILS, 1000
SCENE = (16, 12)  # width and height of the grey picture by which episodes' views are compared
CURVE_BINS, OFFSET_BINS, RATE_BINS = 120, 120, 60  # points of a curve, in pairs; a screen has hardly more
MOST_TICKS = 500_000  # at which offsets are taken; a broken clock may span years
STALL_S, REST_S = 1.0, 0.3  # an arm that stands still for so long amid its motion; at the start or the end
EDGE_S = 0.5  # a topic that starts or ends so much later or earlier than the recording
# A driver that hangs sends what it knows, again and again. A real joint's last digits change all the time.
REPEATED_S = 0.1
MARKS = 20  # of a kind that are kept, the longest; others are counted


@dataclass(frozen=True)
class Mark:
    """Something at some time of a recording, in s from Look.begin_ns on."""

    kind: str  # rest, stall, gap, hang, jump, pictures
    from_s: float
    to_s: float
    where: str  # a topic, joint or camera; "" for the arm
    what: str  # in a few words


@dataclass
class Curve:
    """The values of a state over time, thinned."""

    name: str
    unit: str
    low: float
    high: float
    x_s: np.ndarray  # (K,)
    y: np.ndarray  # (K,)
    breaks: np.ndarray  # (K,) bool: no line leads to this point


@dataclass
class TopicCurve:
    """How often a topic came, and how far its nearest message was, over time; in equal parts of the recording."""

    name: str
    median_hz: float  # by the median time between two messages
    rate_hz: np.ndarray  # (R,)
    offset_ms: np.ndarray  # (OFFSET_BINS,) the largest of each part
    worst_offset_ms: float  # between its first message and its last


@dataclass
class Drawing:
    """What is drawn of an episode, and not needed otherwise."""

    curves: list[Curve]
    topics: list[TopicCurve]
    used_s: list[tuple[float, float]]
    strips: dict[str, np.ndarray]  # camera -> (H, W, 3) uint8 RGB; grey where no picture was


@dataclass
class Look:
    """An episode, or a recording that is none, as a person is to see it."""

    name: str
    begin_ns: int  # what 0 s is
    span_s: tuple[float, float]  # first and last message
    marks: list[Mark]
    more_marks: dict[str, int]  # kind -> how many were left out
    topics: dict[str, dict[str, float]]  # topic -> "median_hz", "worst_offset_ms" between its first and last message
    ranges: dict[str, list[float]]  # state -> lowest and highest value, angles without jumps by a turn
    drawing: Drawing | None  # set to None once it is drawn
    scenes: dict[str, np.ndarray] = field(default_factory=dict)  # camera -> (12, 16) float32 grey levels, the mean view

    def facts(self) -> dict[str, Any]:
        """For a report in JSON."""
        return {
            "span_s": [round(s, 3) for s in self.span_s],
            "marks": [
                dataclasses.asdict(mark) | {"from_s": round(mark.from_s, 3), "to_s": round(mark.to_s, 3)}
                for mark in self.marks
            ],
            "more_marks": self.more_marks,
            "topics": self.topics,
            "ranges": self.ranges,
        }


class Looker:
    """Looks at recordings, one after the other: begin(), image() for each of their pictures, then add().

    Attributes:
        looks: one of each episode, and of each recording that could be read and has none.
    """

    def __init__(self, settings: BagSettings, pictures: bool, draw: Callable[[Look], None] | None) -> None:
        """`pictures`: image() is called; `draw` is given each Look while it has its drawing."""
        self.looks: list[Look] = []
        self.pictures = pictures
        self._settings, self._draw = settings, draw
        self._wanted: dict[str, set[int]] = {}
        self._seen: dict[str, int] = {}
        self._small: dict[str, list[tuple[int, np.ndarray]]] = {}  # camera -> (which image of the bag, pixels)

    def begin(self, counts: dict[str, int]) -> None:
        """A recording follows, with so many images per camera."""
        most = KEPT if self._settings.episodes == "bag" else KEPT_OF_MANY
        self._wanted = {c: set(np.linspace(0, n - 1, min(n, most)).astype(int).tolist()) for c, n in counts.items()}
        self._seen = dict.fromkeys(counts, 0)
        self._small = {camera: [] for camera in counts}

    def image(self, camera: str, image: np.ndarray) -> None:
        """The next picture of a camera, (H, W, 3) uint8 RGB."""
        index = self._seen[camera]
        self._seen[camera] += 1
        if index in self._wanted[camera]:
            height = int(np.clip(image.shape[0] * THUMBNAIL_WIDTH / image.shape[1], 1, 2 * THUMBNAIL_WIDTH))
            small = cv2.resize(image, (THUMBNAIL_WIDTH, height), interpolation=cv2.INTER_AREA)
            self._small[camera].append((index, small))

    def add(self, bag: Bag, recording: Recording, episodes: Sequence[Episode]) -> None:
        """What was read of the recording, and the episodes that came of it; none if it is refused."""
        kept = {
            camera: [(int(recording.camera_time_ns[camera][index]), small) for index, small in pictures]
            for camera, pictures in self._small.items()
        }
        for episode in episodes or [None]:
            look = _look(bag.name if episode is None else episode.name, recording, episode, kept, self._settings)
            if self._draw:
                self._draw(look)
            look.drawing = None
            self.looks.append(look)


def _look(
    name: str, recording: Recording, episode: Episode | None, kept: dict[str, list[tuple[int, np.ndarray]]],
    settings: BagSettings,
) -> Look:  # fmt: skip
    """One episode, or the whole recording where it has none; `kept` are its small pictures with their times in ns."""
    if episode is None:
        every = np.concatenate([recording.joint_time_ns, *recording.camera_time_ns.values()])
        begin_ns = first_ns = int(every.min())
        last_ns, part = int(every.max()), recording
    else:
        report, topics = episode.sync_report, episode.sync_report["topics"].values()
        begin_ns = report["begin_ns"]
        first_ns = begin_ns + round(1e9 * min(topic["starts_s"] for topic in topics))
        last_ns = begin_ns + round(1e9 * (report["duration_s"] + max(topic["ends_s"] for topic in topics)))
        part = recording if episode.whole else recording.between(first_ns, last_ns + 1)[0]

    def seconds(time_ns: Any) -> Any:
        return (np.asarray(time_ns, np.int64) - begin_ns) / 1e9

    streams = [stream for stream in streams_of(part, settings) if len(stream.time_ns)]
    times_ns = {stream.name: stream.time_ns for stream in streams}
    images_ns = {topic: np.sort(part.camera_time_ns[camera]) for camera, topic in settings.camera_topics.items()}
    times_ns |= {topic: t for topic, t in images_ns.items() if len(t)}
    gap_s = {topic: _gap_s(t, settings) for topic, t in times_ns.items()}
    span_s = (float(seconds(first_ns)), float(seconds(last_ns)))
    marks, used_s, curves = [], [], {}
    for topic, t in times_ns.items():
        marks += _gaps(topic, seconds(t), span_s, gap_s[topic])
    for stream in streams:
        marks += _jumps(stream, seconds(stream.time_ns), settings)
        for column, state in enumerate(stream.states):
            curves[state] = _curve(state, seconds(stream.time_ns), stream.path[:, column], gap_s[stream.name], settings)
    for camera, found in recording.picture_faults.items():
        for kind, (count, first, last) in found.items():
            if first_ns <= last and first <= last_ns:
                marks.append(Mark("pictures", float(seconds(first)), float(seconds(last)), camera, f"{count} {kind}"))
    if episode is not None:
        time_s = seconds(episode.time_ns)
        marks += _rests(episode, time_s)
        used_s = [(float(time_s[a]), float(time_s[b - 1]) + 1 / settings.fps) for a, b in episode.segments]
    pictures = {camera: _spread(of_camera, first_ns, last_ns) for camera, of_camera in kept.items()}
    drawing = Drawing(
        [curves[state] for state in sorted(curves)],
        [_topic_curve(topic, t, first_ns, last_ns, settings.fps) for topic, t in times_ns.items()],
        used_s,
        {camera: _strip(of_camera) for camera, of_camera in pictures.items() if any(p is not None for p in of_camera)},
    )
    scenes = {camera: _scene(of_camera) for camera, of_camera in pictures.items()}
    marks, more = _longest(marks)
    return Look(
        name, begin_ns, span_s, marks, more,
        {
            of.name: {"median_hz": round(of.median_hz, 2), "worst_offset_ms": round(of.worst_offset_ms, 1)}
            for of in drawing.topics
        },
        {curve.name: [round(curve.low, 4), round(curve.high, 4)] for curve in drawing.curves},
        drawing, {camera: scene for camera, scene in scenes.items() if scene is not None},
    )  # fmt: skip


# -- curves -------------------------------------------------------------------------------------------------------


def _gap_s(times_ns: np.ndarray, settings: BagSettings) -> float:
    """What is a gap of a topic: longer than a frame may be away from its messages, and than is usual for it."""
    usual_s = float(np.median(np.diff(times_ns))) / 1e9 if len(times_ns) > 1 else 0.0
    return max(2e-3 * settings.max_offset_ms, 3 * usual_s)


def _curve(state: int, x_s: np.ndarray, y: np.ndarray, gap_s: float, settings: BagSettings) -> Curve:
    stretch = np.cumsum(np.diff(x_s, prepend=x_s[0]) > gap_s)  # between two gaps
    kept = envelope(x_s, y, CURVE_BINS)
    breaks = np.diff(stretch[kept], prepend=-1) != 0
    name, unit = settings.state_names[state], settings.units[state]
    return Curve(name, unit, float(y.min()), float(y.max()), x_s[kept], y[kept], breaks)


def _topic_curve(topic: str, times_ns: np.ndarray, first_ns: int, last_ns: int, fps: float) -> TopicCurve:
    span_s = max(1, last_ns - first_ns) / 1e9
    parts = int(np.clip(len(times_ns) // 4, 1, RATE_BINS))  # with some four messages each
    counts, _ = np.histogram((times_ns - first_ns) / 1e9, parts, (0, span_s))
    ticks = int(np.clip(span_s * fps, OFFSET_BINS, MOST_TICKS))
    ticks_ns = first_ns + np.linspace(0, last_ns - first_ns, ticks).astype(np.int64)
    offset_ms = np.abs(times_ns[nearest_index(times_ns, ticks_ns)] - ticks_ns) / 1e6
    starts = np.linspace(0, len(ticks_ns), OFFSET_BINS, endpoint=False).astype(int)
    median_hz = 1e9 / max(1.0, float(np.median(np.diff(times_ns)))) if len(times_ns) > 1 else 0.0
    worst_ms = float(np.diff(times_ns).max()) / 2e6 if len(times_ns) > 1 else 0.0
    return TopicCurve(topic, median_hz, counts / (span_s / parts), np.maximum.reduceat(offset_ms, starts), worst_ms)


# -- marks --------------------------------------------------------------------------------------------------------


def _gaps(topic: str, x_s: np.ndarray, span_s: tuple[float, float], gap_s: float) -> Iterator[Mark]:
    """Where a topic, with messages at (N,) x_s, says nothing though the recording runs."""
    first, last = float(x_s[0]), float(x_s[-1])
    if first - span_s[0] > EDGE_S:
        yield Mark("gap", span_s[0], first, topic, f"starts {first - span_s[0]:.1f} s late")
    if span_s[1] - last > EDGE_S:
        yield Mark("gap", last, span_s[1], topic, f"ends {span_s[1] - last:.1f} s early")
    for i in np.flatnonzero(np.diff(x_s) > gap_s):
        yield Mark("gap", float(x_s[i]), float(x_s[i + 1]), topic, f"nothing for {x_s[i + 1] - x_s[i]:.2f} s")


def _jumps(stream: Any, x_s: np.ndarray, settings: BagSettings) -> Iterator[Mark]:
    """Where a UR joint turns faster than any UR can, and whether its driver had repeated itself before."""
    arm = np.flatnonzero(settings.revolute[stream.states])
    if not len(arm) or len(x_s) < 2 or np.abs(stream.value[:, arm]).max() > MAX_UR_RAD:  # those are not in rad
        return
    steps_rad = np.diff(stream.path[:, arm], axis=0)
    elapsed_s = np.maximum(np.diff(x_s), (x_s[-1] - x_s[0]) / (len(x_s) - 1))
    changes = np.flatnonzero((steps_rad != 0).any(axis=1))
    for i in np.flatnonzero(np.abs(steps_rad).max(axis=1) / elapsed_s > MAX_UR_RAD_PER_S):
        joint = int(np.abs(steps_rad[i]).argmax())
        what = f"{steps_rad[i, joint]:+.2f} rad"
        since = int(np.searchsorted(changes, i)) - 1  # the change before this one
        repeated_s = float(x_s[i] - x_s[changes[since] + 1 if since >= 0 else 0])
        if repeated_s >= REPEATED_S:
            what += f" after {repeated_s:.2f} s of the same message"
            yield Mark("hang", float(x_s[i]) - repeated_s, float(x_s[i]), stream.name, "sends the same message")
        yield Mark("jump", float(x_s[i]), float(x_s[i + 1]), settings.joint_names[stream.states[arm[joint]]], what)


def _rests(episode: Episode, x_s: np.ndarray) -> Iterator[Mark]:
    """Where no joint moves: at the start, at the end, and amid the motion."""
    still = np.append(~moves(episode)[:-1], False).view(np.int8)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], still, [0])))).reshape(-1, 2)
    for first, stop in edges:
        length_s = float(x_s[stop] - x_s[first])
        if first == 0 or stop == len(x_s) - 1:
            if length_s >= REST_S:
                yield Mark("rest", float(x_s[first]), float(x_s[stop]), "", f"rests {length_s:.1f} s")
        elif length_s >= STALL_S:
            yield Mark("stall", float(x_s[first]), float(x_s[stop]), "", f"stands still for {length_s:.1f} s")


def _longest(marks: Sequence[Mark]) -> tuple[list[Mark], dict[str, int]]:
    """At most MARKS of each kind, the longest, in order of time; and how many more of each there are."""
    kept: list[Mark] = []
    more: dict[str, int] = {}
    for kind in {mark.kind: None for mark in marks}:
        of_kind = sorted((mark for mark in marks if mark.kind == kind), key=lambda mark: mark.from_s - mark.to_s)
        kept += of_kind[:MARKS]
        if len(of_kind) > MARKS:
            more[kind] = len(of_kind) - MARKS
    return sorted(kept, key=lambda mark: (mark.from_s, mark.where)), more


# -- pictures -----------------------------------------------------------------------------------------------------


def _spread(kept: Sequence[tuple[int, np.ndarray]], first_ns: int, last_ns: int) -> list[np.ndarray | None]:
    """For each of THUMBNAILS equal parts of the time the picture nearest to its middle; None where there is none."""
    part_ns = max(1, last_ns + 1 - first_ns) / THUMBNAILS
    nearest: list[np.ndarray | None] = [None] * THUMBNAILS
    away_ns = [float("inf")] * THUMBNAILS
    for time_ns, small in kept:
        part, within_ns = divmod(time_ns - first_ns, part_ns)
        if 0 <= part < THUMBNAILS and abs(within_ns - part_ns / 2) < away_ns[int(part)]:
            nearest[int(part)], away_ns[int(part)] = small, abs(within_ns - part_ns / 2)
    return nearest


def _strip(pictures: Sequence[np.ndarray | None]) -> np.ndarray:
    """(H, THUMBNAILS x THUMBNAIL_WIDTH, 3) uint8: the pictures side by side, light grey where there is none."""
    none = np.full_like(next(picture for picture in pictures if picture is not None), 225)
    tiles = [none if picture is None else picture for picture in pictures]
    return np.hstack([np.pad(tile[:, 1:-1], ((0, 0), (1, 1), (0, 0)), constant_values=255) for tile in tiles])


def _scene(pictures: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """(12, 16) float32: the mean grey picture, in which what moves is faint."""
    grey = [
        cv2.resize(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), SCENE, interpolation=cv2.INTER_AREA)
        for picture in pictures
        if picture is not None
    ]
    return np.stack(grey).mean(axis=0, dtype=np.float32) if grey else None
