"""A look at a folder of bags before training: topics, rates, gaps, what would be dropped. Nothing is written.

    python -m rosbag_dataset DIR                    # topics, rates, gaps
    python -m rosbag_dataset DIR --verify           # the same, and decode every image
    python -m rosbag_dataset DIR --config my.yaml   # with the topics and joints of your config

Knows: how sync reports look as a table, the command line, config.yaml in the folder that holds this package.
Must not know: the cache: each bag is read as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from .bags import Bag, find_bags
from .episodes import check_same_size, mark_copy
from .errors import BagError
from .reading import read_bag
from .settings import BagSettings, check_settings, settings_from
from .statistics import angle_references
from .storage import open_storage, topics_of
from .synchronisation import Episode, refer_angles, synchronise

MUCH_PADDING = 0.5  # of the actions in chunks: an episode three chunks long has a sixth, one as long as a chunk half
CONFIG = Path(__file__).parents[1] / "config.yaml"  # every setting with its default


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
    for report in sync_reports:
        if report["joints_never_moved"]:
            lines.append(f"note: {report['episode']}: never moved: {', '.join(report['joints_never_moved'])}")
        if report["states_never_changed"]:
            lines.append(f"note: {report['episode']}: never changed: {', '.join(report['states_never_changed'])}")
        if report.get("copy_of"):
            lines.append(
                f"note: {report['episode']} is a copy of {report['copy_of']}: both are kept on the same side of the "
                "training/validation split; delete one"
            )
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
    if ignored := sum(report["ignored_joint_messages"] for report in sync_reports):
        count = sum(report["ignored_joint_messages"] > 0 for report in sync_reports)
        lines.append(
            f"note: {ignored} messages of data.joint_topic, in {count} of {len(sync_reports)} episodes, have none of "
            "data.joint_names and were ignored"
        )
    crossing = sorted({name for report in sync_reports for name in report.get("joints_across_the_seam", ())})
    for name in crossing:
        count = sum(name in report["joints_across_the_seam"] for report in sync_reports)
        lines.append(
            f"note: {name} turns so far that its angles overlap, in {count} of {len(sync_reports)} episodes: its state "
            "jumps by a whole turn there, and the policy cannot tell the turns apart"
        )
    return "\n".join(lines)


def data_notes(episodes: Sequence[Episode], chunk_size: int, settings: BagSettings) -> Iterator[str]:
    """What a person should know of all episodes together, one line each; `chunk_size` is the policy's."""
    yield from resize_notes(episodes, settings)
    yield from padding_notes(episodes, chunk_size, settings)


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
    whole = np.minimum(
        lengths, chunk_size
    )  # a segment's samples have 1, 2, ... `whole` actions, then a full chunk each
    actions = whole * (whole + 1) // 2 + (lengths - whole) * chunk_size
    if not lengths.sum() or (padding := 1 - actions.sum() / (lengths.sum() * chunk_size)) <= MUCH_PADDING:
        return
    report = max((episode.sync_report for episode in episodes), key=lambda report: report["segments"])
    topic, slowest = min(report["topics"].items(), key=lambda item: item[1]["rate_hz"])
    needed_ms, interval_ms = report["max_offset_ms_that_keeps_95_percent"], 1000 / max(1e-3, slowest["rate_hz"])
    if needed_ms <= settings.max_offset_ms:
        help = f"lower model.chunk_size to about {max(1, int(np.median(lengths)))}, or record longer episodes"
    elif needed_ms <= interval_ms:  # not gaps, but every message: half its interval away from the one before
        help = f"data.max_offset_ms: {needed_ms} instead of {settings.max_offset_ms:g} would keep 95% of the frames"
    else:
        help = "the topics have gaps: record them again, with a QoS and a disk that lose nothing"
    yield (
        f"{padding:.0%} of the actions in chunks are padding, from which nothing is learned: "
        f"{sum(len(episode.segments) for episode in episodes)} segments of {int(np.median(lengths)) + 1} frames in the "
        f"median, chunks of {chunk_size} (model.chunk_size); {report['episode']} has {report['segments']} segments, "
        f"and its {topic} comes every {interval_ms:.0f} ms; {help}"
    )


def inspect_bag(bag: Bag, settings: BagSettings, verify: bool) -> Episode:
    """Print one bag's topics and return it as an episode, without writing anything; `verify` decodes every image.

    Raises:
        BagError: as read_bag() and synchronise().
    """
    with contextlib.ExitStack() as stack:
        topics = topics_of(open_storage(bag, stack))
    for topic, (types, count) in sorted(topics.items()):
        print(f"    {topic}  {'/'.join(sorted(types))}  {count}")
    recording = read_bag(bag, settings, (lambda camera, image: None) if verify else None)
    episode = synchronise(bag.name, recording, settings)
    episode.recording_hash = recording.sha256()
    return episode


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m rosbag_dataset`. Exit code 0 when every bag can be trained on, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m rosbag_dataset",
        description="Look at a folder of ROS 2 bags.",
        epilog="`python -m rosbag_dataset cache CACHE_DIR` looks at a frame cache instead, and prunes it.",
    )
    parser.add_argument("bag_dir", type=Path, help="folder that is searched for bags (./cache if it is called cache)")
    parser.add_argument("--config", type=Path, help="a training config whose data and conventions sections to use")
    parser.add_argument("--verify", action="store_true", help="also decode every image")
    parser.add_argument("--json", type=Path, help="write the report there as well")
    args = parser.parse_args(argv)
    try:
        settings = settings_of(args.bag_dir, args.config)
        check_settings(settings, str(args.config or CONFIG))
        bags = find_bags(args.bag_dir)
    except BagError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    episodes: list[Episode] = []
    problems, first_with = [], {}  # the latter: hash of a recording -> name of the first bag that holds it
    for bag in tqdm(bags, desc="reading bags", unit="bag", disable=not sys.stderr.isatty()):
        print(f"{bag.name}")
        try:
            episode = inspect_bag(bag, settings, args.verify)
            if episodes:
                check_same_size(bag.name, episode.image_shape, episodes[0].name, episodes[0].image_shape)
            mark_copy(episode, first_with)
            episodes.append(episode)
        except BagError as error:
            problems.append({"bag": bag.name, "why": str(error)})
            print(f"    error: {error}")
    reports = [episode.sync_report for episode in episodes]
    if episodes:
        references = angle_references(episodes)
        for episode in episodes:
            refer_angles(episode, references, settings)
        print("\n" + sync_table(reports))
    for problem in problems:
        print(f"error: {problem['why']}", file=sys.stderr)
    if args.json:
        try:
            args.json.write_text(json.dumps({"episodes": reports, "bad": problems}, indent=2))
        except OSError as exc:
            print(f"error: --json: {args.json}: {exc.strerror}", file=sys.stderr)
            return 1
    return 1 if problems else 0


def settings_of(bag_dir: Path, config: Path | None) -> BagSettings:
    """The data and conventions sections of config.yaml, overlaid with those of `config`.

    Raises:
        BagError: a file cannot be read as a config, has an unknown key, or a value of a wrong type.
    """
    merged: dict[str, Any] = {}
    known: dict[str, Any] = {}
    unknown: list[str] = []
    for path in (CONFIG, config):
        if path is None:
            continue
        try:
            content = yaml.safe_load(path.read_text()) or {}
            for section in ("data", "conventions"):
                values = content.get(section) or {}
                known[section] = known.get(section, values.keys())  # config.yaml, the first, has every key
                unknown += [f"{section}.{key}" for key in values if key not in known[section]]
                merged |= values
        except (OSError, yaml.YAMLError, AttributeError, TypeError) as exc:
            raise BagError(f"{path}: cannot be read as a config ({' '.join(str(exc).split())})") from None
    if unknown:
        raise BagError(f"{config}: unknown key {', '.join(unknown)}; the keys are those of {CONFIG.name}")
    return settings_from(merged | {"bag_dir": bag_dir, "cache_dir": Path()})
