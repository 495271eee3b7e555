"""A look at a folder of bags before training: topics, rates, gaps, what would be dropped. Nothing is written.

    python -m rosbag_dataset DIR                    # topics, rates, gaps
    python -m rosbag_dataset DIR --verify           # the same, and decode every image
    python -m rosbag_dataset DIR --config my.yaml   # with the topics and joints of your config

Knows: the command line, config.yaml in the folder that holds this package.
Must not know: the cache: each bag is read as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from .bags import Bag, find_bags
from .episodes import check_same_size, mark_copy
from .errors import BagError
from .reading import read_bag
from .reports import sync_table
from .settings import CHOICES, BagSettings, Rule, command_rules, setting_rules, settings_from, state_rules
from .statistics import angle_references
from .storage import open_storage, topics_of
from .synchronisation import Episode, refer_angles, synchronise

CONFIG = Path(__file__).parents[1] / "config.yaml"  # every setting with its default


def inspect_bags(
    bags: Sequence[Bag], settings: BagSettings, verify: bool = False, show_topics: bool = False
) -> tuple[list[Episode], list[dict[str, str]]]:
    """The bags as episodes, without writing anything: -> (episodes, what is wrong with the others: "bag" and "why").

    Args:
        bags: from find_bags().
        settings: topics, joints, rate.
        verify: also decode every image.
        show_topics: print each bag's name, topics and errors.
    """
    episodes: list[Episode] = []
    problems: list[dict[str, str]] = []
    first_with: dict[str, str] = {}  # hash of a recording -> name of the first bag that holds it
    for bag in tqdm(bags, desc="reading bags", unit="bag", disable=not sys.stderr.isatty()):
        if show_topics:
            print(f"{bag.name}")
        try:
            episode = _inspect_bag(bag, settings, verify, show_topics)
            if episodes:
                check_same_size(bag.name, episode.image_shape, episodes[0].name, episodes[0].image_shape)
            mark_copy(episode, first_with)
            episodes.append(episode)
        except BagError as error:
            problems.append({"bag": bag.name, "why": str(error)})
            if show_topics:
                print(f"    error: {error}")
    if episodes:
        references = angle_references(episodes)
        for episode in episodes:
            refer_angles(episode, references, settings)
    return episodes, problems


def _inspect_bag(bag: Bag, settings: BagSettings, verify: bool, show_topics: bool) -> Episode:
    if show_topics:
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
    episodes, problems = inspect_bags(bags, settings, args.verify, show_topics=True)
    reports = [episode.sync_report for episode in episodes]
    if episodes:
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


def check_settings(settings: BagSettings, where: str) -> None:
    """What the trainer demands of these settings, for a config, `where`, that only bags are read with.

    Raises:
        BagError: the first key that cannot be used, what was found and what is expected.
    """
    chosen = {name: getattr(settings, name) for name in CHOICES}
    section = dict.fromkeys(CHOICES, "data") | {"action_mode": "conventions"}
    rules: list[Rule] = [
        (math.inf > settings.fps >= 0.1, "data.fps", settings.fps, "at least 0.1"),
        (math.inf > settings.max_offset_ms >= 0, "data.max_offset_ms", settings.max_offset_ms, "at least 0"),
        *(
            (value in CHOICES[name], f"{section[name]}.{name}", value, f"one of {', '.join(CHOICES[name])}")
            for name, value in chosen.items()
        ),
        *setting_rules(
            settings.joint_names, settings.joint_sign, settings.apply_joint_sign,
            settings.image_resize, settings.camera_topics, settings.min_used_share,
        ),
        *state_rules(
            settings.joint_names, settings.joint_topic, {n: field.text for n, field in settings.state_topics.items()},
            settings.observed_only, settings.state_units, settings.camera_topics,
        ),
        *command_rules(
            settings.joint_names, settings.joint_topic, {n: field.text for n, field in settings.state_topics.items()},
            settings.observed_only, settings.action_source,
            {n: field.text for n, field in settings.command_topics.items()}, settings.command_max_age_ms,
            settings.camera_topics,
        ),
    ]  # fmt: skip
    for holds, key, found, expected in rules:
        if not holds:
            raise BagError(f"{where}: {key}: found {found}, expected {expected}")
