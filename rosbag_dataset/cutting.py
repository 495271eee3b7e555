"""One recording into its episodes: where they begin and end, how they are called, what is left out (data.episodes).

    bag      the whole recording is one episode, and is called as the bag is
    gaps     the recorder was paused for longer than data.episode_pause_s: no message on any topic that is read
    still    the arm rested for longer than that; an episode begins with the motion, and ends with that much of the rest
    marker   from a start on data.episode_marker_topic to the stop after it
    file     from start_s to stop_s of each entry in the bag's sidecar (sidecar.py)

An episode that is a part of a recording becomes one as if it had been recorded alone: its report is about itself, and
no action and no chunk goes beyond it. It is called BAG@SECONDSs, by when in the recording it begins, so that it keeps
its name when another one is cut differently. Pixels stay where they are: a bag has one cache entry, however it is cut.

Knows: what separates episodes, rests at their start, which of them are left out.
Must not know: how a recording gets onto the time grid (synchronisation.py), what a sidecar looks like, the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .bags import Bag
from .errors import BagError
from .reading import Recording
from .settings import BagSettings
from .sidecar import read_sidecar
from .synchronisation import STILL_RAD_PER_S, Episode, synchronise

MARKED_FAILURE = "its sidecar says success: false"
# Rests are worth a line when this share of all frames, at the start of episodes, would be cut off; or when later rests
# are this share.
MUCH_AT_START, MUCH_STILL = 0.05, 0.25
SUGGESTED_TRIM_S = 0.2

LeftOut = dict[str, str]  # "bag", "episode", "why"


@dataclass(frozen=True)
class Span:
    """Where an episode lies in a recording, in ns of its clock."""

    start_ns: int  # what it is called by: when its motion, marker, entry or first message was
    begin_ns: int  # it shows what was recorded from here on
    end_ns: int  # and before this
    labels: dict[str, Any] = field(default_factory=dict)


def cut(
    bag: Bag, recording: Recording, settings: BagSettings, angle_reference_rad: np.ndarray | None = None
) -> tuple[list[Episode], list[LeftOut]]:
    """Synchronise a recording and cut it into its episodes.

    Args:
        bag: where it is from.
        recording: its times and joints, from read_bag() or load_entry().
        settings: what separates episodes, what is cut off and left out, and all that synchronise() needs.
        angle_reference_rad: (J,) as in refer_angles(); None is 0 for every joint.

    Returns:
        (episodes in order of time, none where all are left out; those that are, each with the reason).

    Raises:
        BagError: the recording as a whole cannot be used, or has no episode in it; a faulty sidecar.
    """
    # Pauses between episodes are no loss: there data.min_used_share is a matter of each part.
    as_one = settings if settings.episodes == "bag" else dataclasses.replace(settings, min_used_share=0.0)
    whole = synchronise(bag.name, recording, as_one, angle_reference_rad)
    whole.bag = bag.name
    first_ns, last_ns = _extent_ns(recording)
    if settings.episodes == "bag":
        spans = [Span(first_ns, first_ns, last_ns + 1)]
    elif settings.episodes == "gaps":
        spans = _between_pauses(recording, settings)
    elif settings.episodes == "still":
        spans = _between_rests(whole, settings)
    elif settings.episodes == "marker":
        spans = _between_markers(recording, bag.name, settings)
    else:
        spans = _from_sidecar(bag, first_ns, last_ns, settings)
    inside = int(_is_inside(whole.time_ns, spans).sum())
    episodes: list[Episode] = []
    left_out: list[LeftOut] = []
    for span in spans:
        part_of_bag = settings.episodes != "bag"
        start_s = (span.start_ns - first_ns) / 1e9
        name = f"{bag.name}@{start_s:09.3f}s" if part_of_bag else bag.name
        try:
            if span.labels.get("success") is False and not settings.keep_failures:
                raise BagError(MARKED_FAILURE)
            episode = _part(name, whole, recording, span, settings, angle_reference_rad) if part_of_bag else whole
            if settings.trim_still_s is not None:
                episode = _trimmed(episode, whole, recording, span, settings, angle_reference_rad)
            if (length_s := episode.sync_report["duration_s"]) < settings.min_episode_s:
                raise BagError(f"{length_s:g} s long, shorter than data.min_episode_s {settings.min_episode_s:g}")
        except BagError as error:
            left_out.append({"bag": bag.name, "episode": name, "why": str(error).removeprefix(f"{name}: ")})
            continue
        if part_of_bag:
            episode.sync_report["cut"] = {
                "bag": bag.name,
                "start_s": round(start_s, 3),
                "episodes_in_bag": len(spans),
                "frames_of_bag": len(whole.time_ns),
                "frames_between": len(whole.time_ns) - inside,
                **span.labels,
            }
        episodes.append(episode)
    if episodes:  # these have no time, or are counted for all of it, and count once
        for counted in ("ignored_joint_messages", "ignored_messages", "dropped_packets", "picture_faults"):
            episodes[0].sync_report[counted] = whole.sync_report[counted]
    return episodes, left_out


def cut_settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """Those keys of a config's `data` section that decide where episodes begin and end, with their values."""
    own = {"gaps": ["episode_pause_s"], "still": ["episode_pause_s"], "marker": ["episode_marker_topic"]}
    return {name: data[name] for name in ("episodes", *own.get(data["episodes"], []), "trim_still_s")}


# -- where episodes are -------------------------------------------------------------------------------------------


def _times_ns(recording: Recording) -> np.ndarray:
    """When anything at all was recorded, sorted."""
    return np.sort(np.concatenate([recording.joint_time_ns, *recording.camera_time_ns.values()]))


def _extent_ns(recording: Recording) -> tuple[int, int]:
    """When the first and the last message were recorded."""
    times = (recording.joint_time_ns, *recording.camera_time_ns.values())
    return int(min(t.min() for t in times)), int(max(t.max() for t in times))


def _between_pauses(recording: Recording, settings: BagSettings) -> list[Span]:
    times = _times_ns(recording)
    before = np.flatnonzero(np.diff(times) > settings.episode_pause_s * 1e9)
    first, last = times[np.append(0, before + 1)], times[np.append(before, len(times) - 1)]
    return [Span(int(a), int(a), int(b) + 1) for a, b in zip(first, last, strict=True)]


def _between_rests(whole: Episode, settings: BagSettings) -> list[Span]:
    """From where a motion begins to where the rest behind it has lasted for episode_pause_s, or less if it is shorter.

    A rest at the very start belongs to no episode, however short: so the limit changes no episode's start.
    """
    pause_ns, half_frame_ns = round(settings.episode_pause_s * 1e9), round(0.5e9 / settings.fps)
    moving = np.flatnonzero(moves(whole))
    if not len(moving):
        raise BagError(
            f"{whole.name}: no joint is ever as fast as {STILL_RAD_PER_S:g} rad/s: all of it is one rest; set "
            "data.episodes: bag, or leave it out with data.on_bad_bag: skip"
        )
    begins, ends = whole.time_ns[moving], whole.time_ns[moving + 1]
    before = np.flatnonzero(begins[1:] - ends[:-1] > pause_ns)
    first, last = begins[np.append(0, before + 1)], ends[np.append(before, len(ends) - 1)]
    spans: list[Span] = []
    for start, motion_end in zip(first.tolist(), last.tolist(), strict=True):
        begin = max(start - half_frame_ns, spans[-1].end_ns if spans else 0)  # with the image that frame showed
        spans.append(Span(start, begin, motion_end + pause_ns + 1))
    return spans


def _between_markers(recording: Recording, name: str, settings: BagSettings) -> list[Span]:
    """Each change of the marker ends an episode, and begins one unless it is a stop; repeating it changes nothing."""
    order = np.argsort(recording.marker_time_ns, kind="stable")
    times, values = recording.marker_time_ns[order], recording.marker[order]
    changes = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
    first_ns, last_ns = _extent_ns(recording)
    times = np.clip(times, first_ns, last_ns + 1)
    ends = np.append(times[changes[1:]], last_ns + 1)  # one that never stops lasts to the end
    spans = [Span(int(times[i]), int(times[i]), int(end)) for i, end in zip(changes, ends, strict=True) if values[i]]
    if values[-1]:
        spans[-1].labels["never_stopped"] = True
    if not spans:
        raise BagError(
            f"{name}: none of the {len(values)} messages on {settings.episode_marker_topic} starts an episode; "
            "expected true, start, or a number other than 0; see data.episode_marker_topic"
        )
    return spans


def _from_sidecar(bag: Bag, first_ns: int, last_ns: int, settings: BagSettings) -> list[Span]:
    length_s = (last_ns - first_ns) / 1e9
    spans: list[Span] = []
    for entry in read_sidecar(bag):
        if entry.stop_s > length_s + 1 / settings.fps:  # a frame more is rounding
            raise BagError(
                f"{entry.where}: stop_s {entry.stop_s:g} is outside the recording, which is {length_s:.3f} s long"
            )
        start, stop = (first_ns + round(seconds * 1e9) for seconds in (entry.start_s, entry.stop_s))
        spans.append(Span(start, start, stop, entry.labels))
    return spans


def _is_inside(time_ns: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """(T,) bool: whether a time is in one of the spans, which are in order and do not overlap."""
    begins, ends = (np.array([getattr(span, side) for span in spans]) for side in ("begin_ns", "end_ns"))
    span = np.searchsorted(begins, time_ns, side="right") - 1
    return (span >= 0) & (time_ns < ends[span])


# -- what they hold -----------------------------------------------------------------------------------------------


def moves(episode: Episode) -> np.ndarray:
    """(T,) bool: the frames from which to their next some joint turns at STILL_RAD_PER_S or more; never the last."""
    elapsed_s = np.diff(episode.time_ns) / 1e9
    speed = np.abs(np.diff(episode.path_rad[:, : episode.joints], axis=0)).max(axis=1, initial=0.0) / elapsed_s
    return np.append(speed >= STILL_RAD_PER_S, False)


def _part(
    name: str, whole: Episode, recording: Recording, span: Span, settings: BagSettings, reference: np.ndarray | None
) -> Episode:
    """What lies in a span, as an episode that shows the whole recording's stored images.

    Raises:
        BagError: that is none: no sample of some joint or camera, no frame, no motion.
    """
    part, images = recording.between(span.begin_ns, span.end_ns)
    empty = [settings.camera_topics[camera] for camera, stored in images.items() if not len(stored)]
    columns = zip(settings.joint_names, part.joint_rad.T, strict=True)
    empty += [joint for joint, column in columns if np.isnan(column).all()]
    empty += [state for state, samples in part.states.items() if not len(samples.time_ns)]
    if empty:
        raise BagError(f"{name}: no message of {', '.join(empty)} in it")
    episode = synchronise(name, part, settings, reference)
    episode.image_index = {camera: images[camera][i] for camera, i in episode.image_index.items()}
    episode.stored_images, episode.bag, episode.whole = whole.stored_images, whole.bag, False
    return episode


def _trimmed(
    episode: Episode, whole: Episode, recording: Recording, span: Span, settings: BagSettings,
    reference: np.ndarray | None,
) -> Episode:  # fmt: skip
    """The episode with at most trim_still_s of rest at its start, to within a frame; its end stays."""
    assert settings.trim_still_s is not None
    moving = np.flatnonzero(moves(episode))
    wanted_ns = episode.time_ns[moving[0] if len(moving) else 0] - round(settings.trim_still_s * 1e9)
    first = int(np.searchsorted(episode.time_ns, wanted_ns))
    if first > 0:
        begin_ns = int(episode.time_ns[first]) - round(0.5e9 / settings.fps)  # with the image that frame showed
        shorter = _part(episode.name, whole, recording, Span(span.start_ns, begin_ns, span.end_ns), settings, reference)
        frames = len(episode.time_ns) - len(shorter.time_ns)
        episode = shorter
    episode.sync_report["trimmed_at_start"] = frames if first > 0 else 0
    return episode


# -- what a person should know ------------------------------------------------------------------------------------


def rest_notes(episodes: Sequence[Episode], settings: BagSettings) -> Iterator[str]:
    """Say how much of all frames shows an arm at rest, where that is much and nothing is done about it."""
    moving = [moves(episode) for episode in episodes]
    frames, still = sum(map(len, moving)), sum(int((~m).sum()) for m in moving)
    rests = [int(m.argmax()) if m.any() else len(m) for m in moving]  # frames at the start
    kept = round(SUGGESTED_TRIM_S * settings.fps)
    gain = sum(max(0, rest - kept) for rest in rests)
    advice = []
    if settings.trim_still_s is None and gain / frames >= MUCH_AT_START:
        advice.append(f"data.trim_still_s: {SUGGESTED_TRIM_S:g} would cut off {gain} of these {sum(rests)}")
    if settings.episodes != "still" and (still - sum(rests)) / frames >= MUCH_STILL:
        advice.append("data.episodes: still cuts at rests longer than data.episode_pause_s")
    if advice:
        yield (
            f"{100 * still / frames:.0f} % of all frames are still, {100 * sum(rests) / frames:.0f} % ({sum(rests)} "
            f"frames) at the start of their episode; a policy that sees an arm at rest learns to rest: "
            f"{'; '.join(advice)}"
        )


def left_out_notes(left_out: Sequence[LeftOut]) -> Iterator[str]:
    """Say which episodes are left out, and why; failures in one line. Whole bags, which have no "episode", are not."""
    episodes = [entry for entry in left_out if "episode" in entry]
    if failures := [entry["episode"] for entry in episodes if entry["why"] == MARKED_FAILURE]:
        yield (
            f"left out {len(failures)} episodes that their sidecars mark as failures (success: false): "
            f"{', '.join(failures)}; data.keep_failures: true keeps them"
        )
    for entry in episodes:
        if entry["why"] != MARKED_FAILURE:
            yield f"left out {entry['episode']}: {entry['why']}"
