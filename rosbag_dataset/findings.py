"""What is wrong with episodes, and which is unlike the others: facts, the worst first, each with what to do about it.

Knows: sync reports (synchronisation.py), looks (looking.py), what a UR10e can do (ur10e.py), when a figure is worth a
sentence.
Must not know: bags, HTML, the command line.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ur10e import JOINT_NAMES, SPEED_LIMIT_RAD_S, link_frames

from .looking import Look
from .reports import NOTED_LATE_MS
from .settings import BagSettings
from .synchronisation import Episode, wrap_to_pi

Report = Mapping[str, Any]  # an episode's sync report

# kind -> (how bad, what it is called). "refused": cannot be trained on. "mend": teaches the policy something wrong.
# "look": a person should decide. Of one badness those that come first are worse.
KINDS = {
    "refused": ("refused", "cannot be trained on"),
    "jumps": ("mend", "joints that jump"),
    "pictures": ("mend", "pictures that show no scene"),
    "late": ("mend", "a camera that is late"),
    "dropped": ("mend", "frames that were dropped"),
    "video": ("mend", "video without a picture"),
    "copy": ("mend", "recorded or stored twice"),
    "no action": ("mend", "no frame with an action"),
    "twin": ("look", "nearly the same as another"),
    "unlike": ("look", "unlike the others"),
    "stall": ("look", "the arm stands still amid its motion"),
    "fast": ("look", "steps that no UR10e makes"),
    "unused": ("look", "recorded, but not used"),
    "repeated": ("look", "pictures that are shown again"),
    "rest": ("look", "rest at the start"),
    "never moved": ("look", "joints that never move"),
}
BADNESS = ("refused", "mend", "look")

MUCH_DROPPED, MUCH_UNUSED, MUCH_REPEATED = 0.05, 0.2, 0.25  # shares of frames, or of the recorded time
LONG_REST_S = 1.0
GOES_FAR_RAD = 0.1
# Messages that come late or out of order make a joint look faster than it is, by half as much again.
FAST = 1.5
COMMON = 0.5  # what more than this share of at least FEW episodes have is the set-up, and said once
FEW = 5  # less cannot say what is usual
# How many typical deviations away from the median is unlike: of numbers that are spread evenly none is by more than 2,
# of those with a bell curve one in ten million by 8. Deviations are the median one, and at least so much:
UNLIKE = 8.0
LEAST_RAD, LEAST_M, LEAST_GREY, LEAST_LOG, LEAST_SHARE = 0.03, 0.02, 3.0, 0.05, 0.05
TWIN_RAD, TWIN_LENGTH, PATH_POINTS = 0.01, 0.02, 24  # people repeat a motion to within some tenths of a rad
RUNNING = 8  # recordings that may run at one time, each compared with all others
FLANGE_POINTS = 200  # of each episode's path in space


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    episode: str  # "" for what most of them have
    kind: str
    sentence: str  # what was found, and what to do

    @property
    def badness(self) -> str:
        """One of BADNESS."""
        return KINDS[self.kind][0]


def judge(
    episodes: Sequence[Episode], problems: Sequence[Mapping[str, str]], looks: Sequence[Look], settings: BagSettings
) -> dict[str, Any]:
    """All that a report says beyond sync reports.

    Args:
        episodes: those that can be trained on, as inspection.inspect_bags() gives them.
        problems: of bags that cannot, "bag" and "why".
        looks: from Looker; of what could not be read there is none.
        settings: those that the episodes were read with.

    Returns:
        "overview": figures over all episodes; "findings": in order, the worst first; "order": the names of episodes and
        refused bags in the order of the page; "looks": name -> what is to be seen of it.
    """
    by_name = {look.name: look for look in looks}
    flanges = {episode.name: _flange_m(episode, settings) for episode in episodes}
    found = [Finding(p["bag"], "refused", p["why"].removeprefix(f"{p['bag']}: ")) for p in problems]
    for episode in episodes:
        found += _of_episode(episode.sync_report, by_name.get(episode.name), settings)
    found += _never_moved(episodes, settings)
    found += _twins(episodes)
    unlike, farthest = _unlike(episodes, by_name, flanges, settings)
    found += unlike
    found = _said_once(found, len(episodes))
    kinds = list(KINDS)
    found.sort(key=lambda finding: (kinds.index(finding.kind), finding.episode))
    names = [*(p["bag"] for p in problems), *(episode.name for episode in episodes)]
    return {
        "overview": _overview(episodes, problems, flanges, farthest, settings),
        "findings": [dataclasses.asdict(finding) | {"badness": finding.badness} for finding in found],
        "order": _worst_first(names, found),
        "looks": {
            name: (look.facts() if (look := by_name.get(name)) else {}) | facts
            for name, facts in [
                *((p["bag"], {}) for p in problems),
                *((e.name, _poses(e, flanges[e.name], settings)) for e in episodes),
            ]
        },
    }


def _worst_first(names: Sequence[str], found: Sequence[Finding]) -> list[str]:
    """By how much was found of the worst badness, then of the next, then by name."""
    count = Counter((finding.episode, finding.badness) for finding in found)
    return sorted(names, key=lambda name: ([-count[name, badness] for badness in BADNESS], name))


def _said_once(found: Sequence[Finding], episodes: int) -> list[Finding]:
    """What most episodes have is about the cell or the settings: said once, by the example of the first."""
    with_kind = {kind: list({f.episode: None for f in found if f.kind == kind}) for kind in KINDS}
    common = {
        kind
        for kind, names in with_kind.items()
        if episodes >= FEW and len(names) > COMMON * episodes and kind not in ("refused", "copy", "twin", "unlike")
    }
    kept = [finding for finding in found if finding.kind not in common]
    for kind in common:
        names, first = with_kind[kind], next(f for f in found if f.kind == kind)
        said = f"in {len(names)} of {episodes} episodes, so that it is the set-up; for example {first.episode}: "
        kept.append(Finding("", kind, said + first.sentence))
    return kept


# -- one episode --------------------------------------------------------------------------------------------------


def _of_episode(report: Report, look: Look | None, settings: BagSettings) -> Iterator[Finding]:
    """What its sync report and its look say of an episode by itself."""
    name, frames, dropped = report["episode"], report["frames"], report["dropped"]
    marks = look.marks if look else []

    def finding(kind: str, sentence: str) -> Finding:
        return Finding(name, kind, sentence)

    step = report["fastest_joint_step"]
    limit = _speed_limit(step["joint"]) if step else 0.0
    if report["joint_jumps"]:
        jump = max((m for m in marks if m.kind == "jump"), key=lambda m: abs(float(m.what.split()[0])), default=None)
        what = f"{jump.where} by {jump.what} at {jump.to_s:.2f} s" if jump else f"{step['joint']} at {step['at_s']} s"
        yield finding("jumps", (
            f"the joints jump {_times(report['joint_jumps'])}: {what} ({step['rad_per_s']:.0f} rad/s; a UR10e makes "
            f"{limit:.1f} at most); {_count(report['dropped_at_joint_jumps'], 'frame')} cut out there, and what was "
            f"before may be old; record it again, and see who else publishes: ros2 topic info -v {settings.joint_topic}"
        ))  # fmt: skip
    elif step and step["rad_per_s"] > FAST * limit:
        yield finding("fast", (
            f"{step['joint']} seems to turn by {step['rad_per_s']:.1f} rad/s at {step['at_s']:.2f} s (a UR10e makes "
            f"{limit:.1f} at most): joint messages are lost or late there; look at the load of the recording machine"
        ))  # fmt: skip
    for faulty in [m for m in marks if m.kind == "pictures"]:  # those of a part of a recording lie in its time
        count, kind = faulty.what.split()
        moves = " while the arm moves" * (kind == "frozen")
        yield finding("pictures", (
            f"camera {faulty.where}: {_count(int(count), 'picture')} {kind}{moves}, {faulty.from_s:.1f} to "
            f"{faulty.to_s:.1f} s: a policy learns from them to act blindly; record it again, or keep what is good of "
            "it with data.episodes: file"
        ))  # fmt: skip
    for camera, late_ms in report["late_ms"].items():
        if abs(late_ms) > NOTED_LATE_MS:
            yield finding("late", (
                f"camera {camera}: by header stamps its pictures are {abs(late_ms):.0f} ms "
                f"{'older' if late_ms > 0 else 'newer'} than the joints that were received with them; set "
                "data.time_source: header, which pairs them by their stamps, if one clock made both"
            ))  # fmt: skip
    if dropped > MUCH_DROPPED * (frames + dropped):
        needed_ms = report["max_offset_ms_that_keeps_95_percent"]
        interval_ms = 1000 / max(1e-3, min(topic["rate_hz"] for topic in report["topics"].values()))
        gaps = sorted((m for m in marks if m.kind == "gap"), key=lambda m: m.from_s - m.to_s)
        if settings.max_offset_ms < needed_ms <= interval_ms:
            cure = f"set data.max_offset_ms: {needed_ms}, which keeps 95 % of the frames: a topic comes that seldom"
        elif gaps:
            cure = f"{gaps[0].where} {gaps[0].what} at {gaps[0].from_s:.1f} s; record it again, with a QoS and a disk "
            cure += "that lose nothing"
        else:
            cure = "see data.max_offset_ms, and which topics have gaps"
        yield finding("dropped", (
            f"{dropped} of {frames + dropped} frames ({dropped / (frames + dropped):.0%}) lack a sample of some topic "
            f"and were dropped, which leaves {_count(report['segments'], 'piece')}; {cure}"
        ))  # fmt: skip
    for camera, packets in report["dropped_packets"].items():
        yield finding("video", (
            f"camera {camera}: {packets['before_keyframe']} messages before the first keyframe and "
            f"{packets['later']} later ones give no picture; record a keyframe every second, with a reliable QoS"
        ))  # fmt: skip
    if report.get("copy_of"):
        yield finding("copy", f"holds the same recording as {report['copy_of']}; delete one of them")
    if frames == report["frames_without_action"]:
        yield finding("no action", "no frame has an action, so that nothing is learned from it; leave it out")
    for stall in [m for m in marks if m.kind == "stall"][:3]:
        yield finding("stall", (
            f"the arm {stall.what} amid its motion, from {stall.from_s:.1f} to {stall.to_s:.1f} s: a policy that sees "
            "an arm at rest learns to rest; record it again, or cut it there with data.episodes: still"
        ))  # fmt: skip
    unused = 1 - report["used_s"] / max(1e-9, report["recorded_s"])
    if unused > MUCH_UNUSED and dropped <= MUCH_DROPPED * (frames + dropped):
        edges = [f"{m.where} {m.what}" for m in marks if m.kind == "gap" and ("late" in m.what or "early" in m.what)]
        yield finding("unused", (
            f"{report['used_s']:.1f} of {report['recorded_s']:.1f} s that were recorded are used: "
            f"{', '.join(edges) or 'topics overlap no longer'}; start the recorder when all topics are there"
        ))  # fmt: skip
    for camera, repeated in report["repeated_images"].items():
        if repeated > MUCH_REPEATED * frames:
            hz = report["topics"][settings.camera_topics[camera]]["rate_hz"]
            yield finding("repeated", (
                f"camera {camera}: {repeated} of {frames} frames show the picture of the frame before, because it "
                f"comes at {hz:.1f} Hz; set data.fps: {max(1, round(hz))} instead of {settings.fps:g}"
            ))  # fmt: skip
    if settings.trim_still_s is None and report["rest_at_start_s"] > LONG_REST_S:
        yield finding("rest", (
            f"the arm rests for {report['rest_at_start_s']:.1f} s before it moves, and a policy learns to rest, too; "
            "data.trim_still_s: 0.2 cuts that off"
        ))  # fmt: skip


def _never_moved(episodes: Sequence[Episode], settings: BagSettings) -> Iterator[Finding]:
    """Joints that stand still in one episode and go far in most."""
    if not episodes:
        return
    usual_rad = np.median([np.ptp(episode.path_rad, axis=0) for episode in episodes], axis=0)
    far = {name for name, rad in zip(settings.joint_names, usual_rad, strict=False) if rad > GOES_FAR_RAD}
    for episode in episodes:
        if still := [name for name in episode.sync_report["joints_never_moved"] if name in far]:
            sentence = f"{', '.join(still)} never moves, and does in most episodes; is this the same task?"
            yield Finding(episode.name, "never moved", sentence)


def _speed_limit(joint: str) -> float:
    """What a UR10e's joint makes at most, in rad/s."""
    known = [limit for name, limit in zip(JOINT_NAMES, SPEED_LIMIT_RAD_S, strict=True) if joint.endswith(name)]
    return float(known[0] if known else SPEED_LIMIT_RAD_S.max())


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


# -- one beside the others ----------------------------------------------------------------------------------------


def _twins(episodes: Sequence[Episode]) -> Iterator[Finding]:
    """Episodes that show the same moments as another one, or nearly the same motion.

    Compared in full are those of nearly the same length and the same start: few, where people recorded.
    """
    if not episodes:
        return
    joints = episodes[0].joints
    paths = np.stack([_path(episode)[:, :joints] for episode in episodes])  # (N, PATH_POINTS, J)
    lengths_s = np.array([(episode.time_ns[-1] - episode.time_ns[0]) / 1e9 for episode in episodes])
    order = np.argsort(lengths_s, kind="stable")
    sorted_s = lengths_s[order]
    same_moments = list(_same_moments(episodes))
    yield from same_moments
    said = {finding.episode for finding in same_moments}
    for position, i in enumerate(order):
        until = np.searchsorted(sorted_s, lengths_s[i] * (1 + TWIN_LENGTH), side="right")
        others = order[position + 1 : until]
        starts_near = (np.abs(wrap_to_pi(paths[others, 0] - paths[i, 0])) < TWIN_RAD).all(axis=1)
        for other in others[starts_near]:
            apart_rad = float(np.abs(wrap_to_pi(paths[other] - paths[i])).max())
            first, second = sorted((episodes[i], episodes[other]), key=lambda episode: episode.name)
            if apart_rad < TWIN_RAD and not _copies(first, second) and second.name not in said:
                said.add(second.name)
                yield Finding(second.name, "twin", (
                    f"moves as {first.name} does, to within {max(apart_rad, 1e-4):.4f} rad at every moment: people "
                    "never repeat themselves so closely; keep one if the scene is the same, too, or the split may put "
                    "them on different sides"
                ))  # fmt: skip


def _copies(first: Episode, second: Episode) -> bool:
    """Whether they are of copies of a recording, which its sync report says already."""
    return first.bag != second.bag and first.recording_hash == second.recording_hash


def _same_moments(episodes: Sequence[Episode]) -> Iterator[Finding]:
    """Bags of which two recorders, or a cut and its whole, have the same moments."""
    running: list[Episode] = []
    for episode in sorted(episodes, key=lambda e: int(e.time_ns[0])):
        running = [other for other in running if other.time_ns[-1] > episode.time_ns[0]][-RUNNING:]
        for other in running:
            begin, end = episode.time_ns[0], min(episode.time_ns[-1], other.time_ns[-1])
            if other.bag == episode.bag or _copies(other, episode) or end - begin < 10**9:
                continue
            at_ns = np.linspace(int(begin), int(end), PATH_POINTS).astype(np.int64)
            apart_rad = np.abs(wrap_to_pi(_at(episode, at_ns) - _at(other, at_ns)))[:, : episode.joints].max()
            if apart_rad < TWIN_RAD:
                yield Finding(episode.name, "copy", (
                    f"shows {(end - begin) / 1e9:.1f} s that {other.name} shows, too: one was cut from the other, or "
                    "two recorders ran; keep one, or the split may put them on different sides"
                ))  # fmt: skip
                break
        running.append(episode)


def _at(episode: Episode, at_ns: np.ndarray) -> np.ndarray:
    """(K, S): where its states are at some times."""
    elapsed, wanted = (episode.time_ns - at_ns[0]).astype(np.float64), (at_ns - at_ns[0]).astype(np.float64)
    return np.stack([np.interp(wanted, elapsed, column) for column in episode.path_rad.T], axis=1)


def _path(episode: Episode) -> np.ndarray:
    """(PATH_POINTS, S): its states at equal parts of its time."""
    return _at(episode, np.linspace(int(episode.time_ns[0]), int(episode.time_ns[-1]), PATH_POINTS).astype(np.int64))


def _unlike(
    episodes: Sequence[Episode], looks: Mapping[str, Look], flanges: Mapping[str, np.ndarray | None],
    settings: BagSettings,
) -> tuple[list[Finding], dict[str, Any] | None]:  # fmt: skip
    """Episodes that are far from what is usual, each with all in which it is; and the one that is farthest.

    Far is counted in median deviations from the median, which a few odd episodes do not move.
    """
    if len(episodes) < FEW:
        return [], None
    far: dict[str, list[tuple[float, str]]] = {episode.name: [] for episode in episodes}

    def compare(names: Sequence[str], values: np.ndarray, least: float, text: str, **words: Any) -> None:
        """Values (N,) of episodes; `least` is what counts as their typical deviation at the least."""
        if len(names) < FEW:
            return
        usual = float(np.median(values))
        away = np.abs(values - usual)
        score = away / max(float(np.median(away)), least)
        for name, value, of in zip(names, values.tolist(), score.tolist(), strict=True):
            far[name].append((of, text.format(found=value, usual=usual, times=np.exp(value - usual), **words)))

    names = [episode.name for episode in episodes]
    lengths_s = np.array([episode.sync_report["duration_s"] for episode in episodes])
    compare(names, np.log(np.maximum(lengths_s, 1e-3)), LEAST_LOG, "lasts {times:.2f} times as long")
    for when, index in (("starts", 0), ("ends", -1)):
        poses = np.stack([episode.path_rad[index] for episode in episodes])
        for j, (state, unit) in enumerate(zip(settings.state_names, settings.units, strict=True)):
            values, least = poses[:, j], LEAST_RAD
            if settings.revolute[j]:
                values = values[0] + wrap_to_pi(values - values[0])  # all on the turn of one of them
            elif unit != "rad":
                least = max(1e-9, LEAST_SHARE * float(np.ptp(values)))
            text = "{when} with {state} at {found:.2f} {unit} instead of some {usual:.2f}"
            compare(names, values, least, text, when=when, state=state, unit=unit)
    in_space = {name: flange for name, flange in flanges.items() if flange is not None}
    for of in (np.min, np.max):
        for axis, letter in enumerate("xyz"):
            values = np.array([of(flange[:, axis]) for flange in in_space.values()])
            text = "moves the flange to {axis} = {found:.2f} m, where others go to {usual:.2f}"
            compare(list(in_space), values, LEAST_M, text, axis=letter)
    for camera in settings.camera_topics:
        seen = {name: looks[name].scenes[camera] for name in names if name in looks and camera in looks[name].scenes}
        if seen:
            scenes = np.stack(list(seen.values()))
            away = np.abs(scenes - np.median(scenes, axis=0)).mean(axis=(1, 2))
            text = "has another view by camera {camera}, {found:.0f} grey levels from the usual one (moved? the light?)"
            compare(list(seen), away, LEAST_GREY, text, camera=camera)
    findings = []
    for name, differences in far.items():
        differences.sort(key=lambda item: -item[0])
        said = [text for score, text in differences if score > UNLIKE][:3]
        if said:
            findings.append(Finding(name, "unlike", f"{'; '.join(said)}; watch it, and leave it out if it is no "
                                                    "demonstration of this task"))  # fmt: skip
    name = max(far, key=lambda name: far[name][0][0])
    score, text = far[name][0]
    return findings, {"episode": name, "score": round(score, 1), "limit": UNLIKE, "by": text}


# -- figures ------------------------------------------------------------------------------------------------------


def _flange_m(episode: Episode, settings: BagSettings) -> np.ndarray | None:
    """(K, 3): the flange's path in the robot's base frame, for a UR10e's kinematics; None without all six joints."""
    found = [[i for i, name in enumerate(settings.joint_names) if name.endswith(joint)] for joint in JOINT_NAMES]
    if not all(found):
        return None
    columns = np.array([of[0] for of in found])
    at = np.unique(np.linspace(0, len(episode.time_ns) - 1, FLANGE_POINTS).astype(int))
    q_rad = episode.path_rad[at][:, columns]
    if settings.apply_joint_sign:
        q_rad = q_rad * np.array(settings.joint_sign)[columns]
    return link_frames(q_rad)[..., 6, :3, 3]


def _poses(episode: Episode, flange_m: np.ndarray | None, settings: BagSettings) -> dict[str, Any]:
    """Where an episode starts and ends, and how far it goes."""
    facts: dict[str, Any] = {
        when: {n: round(float(v), 4) for n, v in zip(settings.state_names, _state(episode, index), strict=True)}
        for when, index in (("start", 0), ("end", -1))
    }
    if flange_m is not None:
        facts["flange_start_m"], facts["flange_end_m"] = (_metres(flange_m[index]) for index in (0, -1))
        facts["flange_path_m"] = round(float(np.linalg.norm(np.diff(flange_m, axis=0), axis=1).sum()), 3)
        facts["flange_m"] = [_metres(point) for point in flange_m[:: max(1, len(flange_m) // 40)]]
    return facts


def _state(episode: Episode, frame: int) -> np.ndarray:
    """(S,) float32: an episode's state at a frame, as a training sees it."""
    return episode.states(frame).astype(np.float32)


def _metres(point: np.ndarray) -> list[float]:
    return [round(float(value), 3) for value in point]


def _overview(
    episodes: Sequence[Episode], problems: Sequence[Any], flanges: Mapping[str, np.ndarray | None],
    farthest: dict[str, Any] | None, settings: BagSettings,
) -> dict[str, Any]:  # fmt: skip
    """Figures over all episodes."""
    reports = [episode.sync_report for episode in episodes]
    overview: dict[str, Any] = {"episodes": len(episodes), "refused": len(problems)}
    if not episodes:
        return overview
    lengths_s = [report["duration_s"] for report in reports]
    recorded_s = sum(report["recorded_s"] for report in reports)  # of each at least a frame
    ranges = np.array([(state.min(axis=0), state.max(axis=0)) for state in (e.state for e in episodes)])
    starts, ends = (np.array([_state(episode, frame) for episode in episodes]) for frame in (0, -1))
    figures = {
        "least": ranges[:, 0].min(axis=0), "most": ranges[:, 1].max(axis=0),
        "start_median": np.median(starts, axis=0), "end_median": np.median(ends, axis=0),
    }  # fmt: skip
    states = [
        {"name": name, "unit": unit} | {figure: round(float(values[j]), 4) for figure, values in figures.items()}
        for j, (name, unit) in enumerate(zip(settings.state_names, settings.units, strict=True))
    ]
    known = [flange for flange in flanges.values() if flange is not None]
    return overview | {
        "recorded_s": round(recorded_s, 3),
        "used_s": round(sum(report["used_s"] for report in reports), 3),
        "frames": sum(report["frames"] for report in reports),
        "dropped": sum(report["dropped"] for report in reports),
        "still_share": round(sum(r["still_share"] * r["recorded_s"] for r in reports) / recorded_s, 3),
        "duration_s": {"least": min(lengths_s), "median": float(np.median(lengths_s)), "most": max(lengths_s)},
        "states": states,
        "workspace_m": {
            side: _metres(of([of(flange, axis=0) for flange in known], axis=0))
            for side, of in (("least", np.min), ("most", np.max))
        }
        if known
        else None,
        "farthest": farthest,
    }
