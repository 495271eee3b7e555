"""Sync reports as text: a table of all episodes, and lines that a person should read.

Knows: what is in a sync report (synchronisation.py makes it).
Must not know: bags, the cache, the command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .cutting import rest_notes
from .settings import BagSettings
from .synchronisation import Episode

NOTED_LATE_MS = 50  # a frame and a half of a camera at 30 Hz
MUCH_PADDING = 0.5  # of the actions in chunks: an episode three chunks long has a sixth, one as long as a chunk half


def sync_table(sync_reports: Sequence[dict[str, Any]], limit: int = 40) -> str:
    """Episodes' sync reports as text: one row an episode (the first `limit`), then what a person should know of all."""
    rows = [
        (
            "episode",
            "recorded s",
            "used s",
            "frames",
            "dropped",
            "segm.",
            "repeated",
            "unused",
            "camera Hz",
            "joint Hz",
            "worst ms",
            "still",
        )
    ]
    for report in sync_reports[:limit]:
        topics = list(report["topics"].values())  # the joints' and other states' (of each stream), then the cameras'
        joints, cameras = topics[: -len(report["unused_images"])], topics[-len(report["unused_images"]) :]
        rows.append((
            report["episode"], f"{report['recorded_s']:.1f}", f"{report['used_s']:.1f}", str(report["frames"]),
            str(report["dropped"]),
            str(report["segments"]), str(sum(report["repeated_images"].values())),
            str(sum(report["unused_images"].values())), "/".join(f"{c['rate_hz']:.1f}" for c in cameras),
            "/".join(f"{j['rate_hz']:.1f}" for j in joints), "/".join(f"{t['offset_ms_worst']:.0f}" for t in topics),
            f"{report['still_share']:.0%}",
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    if len(sync_reports) > limit:
        lines.append(f"... and {len(sync_reports) - limit} more episodes")
    frames, dropped = sum(r["frames"] for r in sync_reports), sum(r["dropped"] for r in sync_reports)
    segments = sum(r["segments"] for r in sync_reports)
    lines.append(f"{len(sync_reports)} episodes, {frames} frames kept, {dropped} dropped, {segments} segments")
    lines += [f"note: {note}" for note in _cut_notes(sync_reports)]
    copies: set[str] = set()  # bags of which it was said
    for report in sync_reports:
        if report["joints_never_moved"]:
            lines.append(f"note: {report['episode']}: never moved: {', '.join(report['joints_never_moved'])}")
        if report["dropped_without_command"]:
            lines.append(
                f"note: {report['episode']}: {report['dropped_without_command']} frames dropped without a command, or "
                "with one older than data.command_max_age_ms"
            )
        if report["states_never_changed"]:
            lines.append(f"note: {report['episode']}: never changed: {', '.join(report['states_never_changed'])}")
        if report["frames"] == report["frames_without_action"]:
            lines.append(f"note: {report['episode']}: no frame has an action, and it is never held out")
        bag = report.get("cut", {}).get("bag", report["episode"])
        if report.get("copy_of") and bag not in copies:
            copies.add(bag)
            lines.append(
                f"note: {bag} is a copy of {report['copy_of']}: both are kept on the same side of the "
                "training/validation split; delete one"
            )
        for camera, found in report["picture_faults"].items():
            kinds = ", ".join(
                f"{fault['count']} {kind}{' while the arm moves' * (kind == 'frozen')} ({fault['first_s']:.1f} to "
                f"{fault['last_s']:.1f} s)"
                for kind, fault in found.items()
            )
            lines.append(f"note: {report['episode']}: pictures of camera {camera}: {kinds}")
        for camera, dropped in report.get("dropped_packets", {}).items():
            lines.append(
                f"note: {report['episode']}: video of camera {camera}: dropped {dropped['before_keyframe']} messages "
                f"before the first keyframe, {dropped['later']} later ones without a picture that can be right"
            )
        if report["dropped_in_joint_gaps"]:
            lines.append(
                f"note: {report['episode']}: {report['dropped_in_joint_gaps']} frames dropped in gaps of the joints "
                "longer than twice data.max_offset_ms"
            )
        if report["dropped_in_state_gaps"]:
            lines.append(
                f"note: {report['episode']}: {report['dropped_in_state_gaps']} frames dropped in gaps of "
                "data.state_topics longer than twice data.max_offset_ms"
            )
        if report["joint_jumps"]:
            step = report["fastest_joint_step"]
            lines.append(
                f"note: {report['episode']}: cut at {report['joint_jumps']} jumps of the joints ({step['joint']} by "
                f"{step['rad']:.3f} rad at {step['at_s']:.3f} s, {step['rad_per_s']:.0f} rad/s), "
                f"{report['dropped_at_joint_jumps']} frames dropped"
            )
    lags = [r["commands"]["joints_lag_s"] for r in sync_reports if r["commands"].get("joints_lag_s") is not None]
    if lags:
        lines.append(
            f"the joints lag their commands by {np.median(lags):.3f} s (median of {len(lags)} episodes; "
            f"{min(lags):.3f} to {max(lags):.3f} s)"
        )
    for camera in sorted({camera for report in sync_reports for camera in report["late_ms"]}):
        late_ms = [report["late_ms"][camera] for report in sync_reports if camera in report["late_ms"]]
        noted_ms = [ms for ms in late_ms if abs(ms) > NOTED_LATE_MS]
        if noted_ms:
            most_ms = max(noted_ms, key=abs)
            lines.append(
                f"note: camera {camera}: by header stamps, its pictures are up to {abs(most_ms):.0f} ms "
                f"{'older' if most_ms > 0 else 'newer'} than the joints that were received with them (a median), in "
                f"{len(noted_ms)} of {len(sync_reports)} episodes; data.time_source: header pairs them by their stamps"
            )
    if ignored := sum(report["ignored_joint_messages"] for report in sync_reports):
        count = sum(report["ignored_joint_messages"] > 0 for report in sync_reports)
        lines.append(
            f"note: {ignored} messages of data.joint_topic, in {count} of {len(sync_reports)} episodes, have none of "
            "data.joint_names and were ignored"
        )
    for key in sorted({key for report in sync_reports for key in report["ignored_messages"]}):
        of = [report["ignored_messages"][key] for report in sync_reports if key in report["ignored_messages"]]
        lines.append(
            f"note: {sum(of)} messages of the topic of {key}, in {len(of)} of {len(sync_reports)} episodes, do not say "
            "it and were ignored"
        )
    crossing = sorted({name for report in sync_reports for name in report.get("joints_across_the_seam", ())})
    for name in crossing:
        count = sum(name in report["joints_across_the_seam"] for report in sync_reports)
        lines.append(
            f"note: {name} turns so far that its angles overlap, in {count} of {len(sync_reports)} episodes: its state "
            "jumps by a whole turn there, and the policy cannot tell the turns apart"
        )
    return "\n".join(lines)


def _cut_notes(sync_reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Say how many episodes came out of each bag that was cut, what lies between them, and what was cut off."""
    first_of_bag = {report["cut"]["bag"]: report["cut"] for report in sync_reports if "cut" in report}
    for bag, facts in first_of_bag.items():
        frames, between = facts["frames_of_bag"], facts["frames_between"]
        yield f"{bag}: {facts['episodes_in_bag']} episodes; {between} of its {frames} frames lie between them"
    for report in sync_reports:
        if report.get("cut", {}).get("never_stopped"):
            yield f"{report['episode']}: its marker never stops, it lasts to the end of the recording"
    trimmed = [report["trimmed_at_start"] for report in sync_reports if report.get("trimmed_at_start")]
    if trimmed:
        yield (
            f"{sum(trimmed)} frames of rest were cut off at the start of {len(trimmed)} of {len(sync_reports)} "
            "episodes (data.trim_still_s)"
        )


def data_notes(episodes: Sequence[Episode], chunk_size: int, settings: BagSettings) -> Iterator[str]:
    """What a person should know of all episodes together, one line each; `chunk_size` is the policy's."""
    yield from resize_notes(episodes, settings)
    yield from padding_notes(episodes, chunk_size, settings)
    yield from rest_notes(episodes, settings)


def resize_notes(episodes: Sequence[Episode], settings: BagSettings) -> Iterator[str]:
    """Say when resizing changes the aspect ratio: the picture the network sees is then squeezed."""
    if settings.image_resize is None:
        return
    new_height, new_width = settings.image_resize
    for camera, (height, width) in sorted({item for e in episodes for item in e.source_shape.items()}):
        if abs(new_width / new_height / (width / height) - 1) > 0.01:
            yield (
                f"conventions.image_resize {new_height}x{new_width} changes the aspect ratio of camera {camera} "
                f"({height}x{width}, HxW): the picture is squeezed, in training and on the robot alike"
            )


def padding_notes(episodes: Sequence[Episode], chunk_size: int, settings: BagSettings) -> Iterator[str]:
    """Say when most of the actions in chunks are padding, because segments are shorter than a chunk, and what helps."""
    lengths = np.concatenate([np.diff(episode.segments).ravel() for episode in episodes]) - 1  # in actions
    # A segment's samples have 1, 2, ... actions before them, and from a chunk on a full chunk each.
    whole = np.minimum(lengths, chunk_size)
    actions = whole * (whole + 1) // 2 + (lengths - whole) * chunk_size
    if not lengths.sum() or (padding := 1 - actions.sum() / (lengths.sum() * chunk_size)) <= MUCH_PADDING:
        return
    report = max((episode.sync_report for episode in episodes), key=lambda report: report["segments"])
    topic, slowest = min(report["topics"].items(), key=lambda item: item[1]["rate_hz"])
    needed_ms, interval_ms = report["max_offset_ms_that_keeps_95_percent"], 1000 / max(1e-3, slowest["rate_hz"])
    if needed_ms <= settings.max_offset_ms:
        cure = f"lower model.chunk_size to about {max(1, int(np.median(lengths)))}, or record longer episodes"
    elif needed_ms <= interval_ms:  # not gaps, but every message: half its interval away from the one before
        cure = f"data.max_offset_ms: {needed_ms} instead of {settings.max_offset_ms:g} would keep 95% of the frames"
    else:
        cure = "the topics have gaps: record them again, with a QoS and a disk that lose nothing"
    yield (
        f"{padding:.0%} of the actions in chunks are padding, from which nothing is learned: "
        f"{sum(len(episode.segments) for episode in episodes)} segments of {int(np.median(lengths)) + 1} frames in the "
        f"median, chunks of {chunk_size} (model.chunk_size); {report['episode']} has {report['segments']} segments, "
        f"and its {topic} comes every {interval_ms:.0f} ms; {cure}"
    )
