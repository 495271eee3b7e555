"""A look at a folder of bags before training: topics, rates, gaps, what would be dropped. Nothing is written.

    python -m rosbag_dataset DIR                    # topics, rates, gaps
    python -m rosbag_dataset DIR --verify           # the same, and decode every image
    python -m rosbag_dataset DIR --config my.yaml   # with the topics and joints of your config
    python -m rosbag_dataset DIR --override data.fps=10

Knows: the command line, config.yaml in the folder that holds this package.
Must not know: the cache: each bag is read as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from .bags import Bag, find_bags
from .config import read_config, setting
from .cutting import LeftOut, cut, left_out_notes
from .episodes import check_same_size, mark_copy, nothing_left
from .errors import BagError
from .reading import read_bag
from .reports import data_notes, sync_table
from .settings import (
    CHOICES,
    BagSettings,
    Rule,
    command_rules,
    episode_rules,
    setting_rules,
    settings_from,
    state_rules,
)
from .statistics import angle_references
from .storage import open_storage, topics_of
from .synchronisation import Episode, refer_angles

# The types of BagSettings, as a config has them.
KINDS_OF = {
    "Path": "str",
    "tuple[str, ...]": "list[str]",
    "tuple[float, ...]": "list[float]",
    "tuple[int, int] | None": "list[int] | None",
    "dict[str, str]": "dict[str, str] | None",
    "dict[str, TopicField]": "dict[str, str] | None",
}
ANYTHING = "None | bool | int | float | str | list[str] | dict[str, str]"
CONFIG = Path(__file__).parents[1] / "config.yaml"  # every setting with its default


def inspect_bags(
    bags: Sequence[Bag], settings: BagSettings, verify: bool = False, show_topics: bool = False
) -> tuple[list[Episode], list[dict[str, str]], list[LeftOut]]:
    """The bags as episodes, without writing anything.

    Returns:
        (episodes; what is wrong with bags that have none, as "bag" and "why"; the episodes that are left out of bags).

    Args:
        bags: from find_bags().
        settings: topics, joints, rate.
        verify: also decode every image.
        show_topics: print each bag's name, topics and errors.
    """
    episodes: list[Episode] = []
    problems: list[dict[str, str]] = []
    left_out: list[LeftOut] = []
    first_with: dict[str, str] = {}  # hash of a recording -> name of the first bag that holds it
    for bag in tqdm(bags, desc="reading bags", unit="bag", disable=not sys.stderr.isatty()):
        if show_topics:
            print(f"{bag.name}")
        try:
            parts, without = _inspect_bag(bag, settings, verify, show_topics)
            left_out += without
            for episode in parts:
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
    return episodes, problems, left_out


def _inspect_bag(
    bag: Bag, settings: BagSettings, verify: bool, show_topics: bool
) -> tuple[list[Episode], list[LeftOut]]:
    """One bag's episodes, and what is left out, as cut() gives them."""
    if show_topics:
        with contextlib.ExitStack() as stack:
            topics = topics_of(open_storage(bag, stack))
        for topic, (types, count) in sorted(topics.items()):
            print(f"    {topic}  {'/'.join(sorted(types))}  {count}")
    recording = read_bag(bag, settings, (lambda camera, image: None) if verify else None)
    episodes, left_out = cut(bag, recording, settings)
    recorded = recording.sha256()
    for episode in episodes:
        episode.recording_hash = recorded
    return episodes, left_out


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m rosbag_dataset`. Exit code 0 when every bag can be trained on, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m rosbag_dataset",
        description="Look at a folder of ROS 2 bags.",
        epilog="`python -m rosbag_dataset cache CACHE_DIR` looks at a frame cache instead, and prunes it.",
    )
    parser.add_argument("bag_dir", type=Path, help="folder that is searched for bags (./cache if it is called cache)")
    parser.add_argument("--config", type=Path, help="a training config whose data and conventions sections to use")
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE", help="as train.py's; repeatable"
    )
    parser.add_argument("--verify", action="store_true", help="also decode every image")
    parser.add_argument("--json", type=Path, help="write the report there as well")
    args = parser.parse_args(argv)
    try:
        settings, chunk_size = settings_of(args.bag_dir, args.config, args.override)
        check_settings(settings, f"{args.config or CONFIG}{' with --override' * bool(args.override)}")
        bags = find_bags(args.bag_dir)
    except BagError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    episodes, problems, left_out = inspect_bags(bags, settings, args.verify, show_topics=True)
    reports = [episode.sync_report for episode in episodes]
    if episodes:
        print("\n" + sync_table(reports))
        for line in data_notes(episodes, chunk_size, settings):
            print(f"note: {line}")
    for note in left_out_notes(left_out):
        print(f"note: {note}")
    for problem in problems:
        print(f"error: {problem['why']}", file=sys.stderr)
    if not episodes and not problems:
        print(f"error: {nothing_left(args.bag_dir, len(bags), left_out)}", file=sys.stderr)
    if args.json:
        try:
            args.json.write_text(json.dumps({"episodes": reports, "bad": problems, "left_out": left_out}, indent=2))
        except OSError as exc:
            print(f"error: --json: {args.json}: {exc.strerror}", file=sys.stderr)
            return 1
    return 1 if problems or not episodes else 0


def settings_of(bag_dir: Path, config: Path | None, overrides: Sequence[str] = ()) -> tuple[BagSettings, int]:
    """What a training with that config and these overrides would read bags with, and its model.chunk_size.

    Raises:
        SettingError: a file cannot be read as a config, has an unknown key, or a value of a wrong type.
    """
    cfg = read_config(_schema(), CONFIG)  # its values are the defaults
    read_config(cfg, config or CONFIG, overrides)
    folders = {"bag_dir": bag_dir, "cache_dir": Path()}
    settings = settings_from(vars(cfg.data) | vars(cfg.conventions) | folders)
    return settings, cfg.model.chunk_size


def _schema() -> Any:
    """A schema of the keys in config.yaml, without values.

    The trainer's own stands in train.py, out of reach. This one has the types of what bags are read with, and of
    model.chunk_size; all others may hold anything: they are known, and not used here.
    """
    kinds = {f.name: KINDS_OF.get(str(f.type), str(f.type)) for f in dataclasses.fields(BagSettings)}
    kinds |= {"camera_topic": "str", "camera_topics": "dict[str, str] | None", "chunk_size": "int"}
    sections: list[Any] = []
    for name, values in yaml.safe_load(CONFIG.read_text()).items():
        used = kinds if name in ("data", "conventions", "model") else {}
        keys = [(key, used.get(key, ANYTHING), setting(None, f"see {CONFIG.name}")) for key in values]
        sections.append((name, Any, dataclasses.field(default_factory=dataclasses.make_dataclass(name, keys))))
    return dataclasses.make_dataclass("Config", sections)()


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
        (math.inf > settings.episode_pause_s >= 0.1, "data.episode_pause_s", settings.episode_pause_s, "at least 0.1"),
        (math.inf > (settings.trim_still_s or 0) >= 0, "data.trim_still_s", settings.trim_still_s, "at least 0"),
        (math.inf > settings.min_episode_s >= 0, "data.min_episode_s", settings.min_episode_s, "at least 0"),
        *episode_rules(settings),
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
