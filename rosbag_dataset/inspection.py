"""A look at a folder of bags before training: topics, rates, gaps, what would be dropped. Only reports are written.

    python -m rosbag_dataset DIR                    # topics, rates, gaps
    python -m rosbag_dataset DIR --verify           # the same, and decode every image
    python -m rosbag_dataset DIR --config my.yaml   # with the topics and joints of your config
    python -m rosbag_dataset DIR --override data.fps=10
    python -m rosbag_dataset DIR --html report.html --json report.json      # what is wrong with which episode, drawn

Knows: the command line, config.yaml in the folder that holds this package.
Must not know: the cache: each bag is read as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from .bags import Bag, find_bags
from .config import read_config, setting
from .cutting import LeftOut, cut, left_out_notes
from .episodes import check_same_size, mark_copy, nothing_left
from .errors import BagError
from .findings import judge
from .html_report import Drawings, page_parts
from .looking import Looker
from .reading import ImageSink, Recording, read_bag
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
    bags: Sequence[Bag],
    settings: BagSettings,
    verify: bool = False,
    show_topics: bool = False,
    looker: Looker | None = None,
) -> tuple[list[Episode], list[dict[str, str]], list[LeftOut]]:
    """The bags as episodes, without writing anything.

    Returns:
        (episodes; what is wrong with bags that have none, as "bag" and "why"; the episodes that are left out of bags).

    Args:
        bags: from find_bags().
        settings: topics, joints, rate.
        verify: also decode every image.
        show_topics: print each bag's name, topics and errors.
        looker: is shown every recording that can be read and, if it wants them, their pictures.
    """
    episodes: list[Episode] = []
    problems: list[dict[str, str]] = []
    left_out: list[LeftOut] = []
    first_with: dict[str, str] = {}  # hash of a recording -> name of the first bag that holds it
    sizes = [sum(file.stat().st_size for file in bag.files if file.is_file()) for bag in bags]
    quiet = not sys.stderr.isatty()
    with tqdm(total=sum(sizes), desc="reading bags", unit="B", unit_scale=True, disable=quiet) as bar:
        for bag, size in zip(bags, sizes, strict=True):
            if show_topics:
                print(f"{bag.name}")
            recording, parts, progress = None, [], _Progress(bar, size)
            try:
                recording = _read(bag, settings, verify, show_topics, looker, progress)
                parts, without = cut(bag, recording, settings)
                left_out += without
                recorded = recording.sha256()
                for episode in parts:
                    if episodes:
                        check_same_size(bag.name, episode.image_shape, episodes[0].name, episodes[0].image_shape)
                    episode.recording_hash = recorded
                    mark_copy(episode, first_with)
                    episodes.append(episode)
            except BagError as error:
                parts = []
                problems.append({"bag": bag.name, "why": str(error)})
                if show_topics:
                    print(f"    error: {error}")
            if looker and recording:
                looker.add(bag, recording, parts)
            progress.finish()
    if episodes:
        references = angle_references(episodes)
        for episode in episodes:
            refer_angles(episode, references, settings)
    return episodes, problems, left_out


class _Progress:
    """One bag's part of a bar that counts the bytes of files; messages may have more, where files are compressed."""

    def __init__(self, bar: tqdm, size: int) -> None:
        self._bar, self._left = bar, size

    def message(self, _images: int, size: int) -> None:
        size = min(size, self._left)
        self._left -= size
        self._bar.update(size)

    def finish(self) -> None:
        self._bar.update(self._left)


def _read(
    bag: Bag, settings: BagSettings, verify: bool, show_topics: bool, looker: Looker | None, progress: _Progress
) -> Recording:
    """One bag, whose topics are printed first if that is wanted."""
    if show_topics:
        with contextlib.ExitStack() as stack:
            topics = topics_of(open_storage(bag, stack))
        for topic, (types, count) in sorted(topics.items()):
            print(f"    {topic}  {'/'.join(sorted(types))}  {count}")
    verified: ImageSink = lambda camera, image: None  # noqa: E731
    sink = looker.image if looker and looker.pictures else verified if verify else None
    return read_bag(bag, settings, sink, progress.message, on_open=looker.begin if looker else None)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m rosbag_dataset`. Exit code 0 when every bag can be trained on, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="python -m rosbag_dataset",
        description="Look at a folder of ROS 2 bags.",
        epilog="`python -m rosbag_dataset cache CACHE_DIR` looks at a frame cache instead, and prunes it; `export` "
        "writes bags as a LeRobot dataset.",
    )
    parser.add_argument("bag_dir", type=Path, help="folder that is searched for bags (./cache if it is called cache)")
    parser.add_argument("--config", type=Path, help="a training config whose data and conventions sections to use")
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE", help="as train.py's; repeatable"
    )
    parser.add_argument("--verify", action="store_true", help="also decode every image")
    parser.add_argument(
        "--html", type=Path, help="write a page with pictures and curves of each episode there; decodes every image"
    )
    parser.add_argument("--json", type=Path, help="write the report there as data")
    args = parser.parse_args(argv)
    try:
        for option, path in (("--html", args.html), ("--json", args.json)):
            if path and not path.parent.is_dir():  # said before all bags are read
                raise BagError(f"{option}: {path}: No such file or directory: {path.parent}; make that folder first")
        settings, chunk_size = settings_of(args.bag_dir, args.config, args.override)
        check_settings(settings, f"{args.config or CONFIG}{' with --override' * bool(args.override)}")
        bags = find_bags(args.bag_dir)
    except BagError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    drawings = Drawings(settings) if args.html else None
    looker = Looker(settings, bool(args.html), drawings.add if drawings else None) if args.html or args.json else None
    episodes, problems, left_out = inspect_bags(bags, settings, args.verify, True, looker)
    reports = [episode.sync_report for episode in episodes]
    notes = [*(data_notes(episodes, chunk_size, settings) if episodes else ()), *left_out_notes(left_out)]
    if episodes:
        print("\n" + sync_table(reports))
    for note in notes:
        print(f"note: {note}")
    for problem in problems:
        print(f"error: {problem['why']}", file=sys.stderr)
    if not episodes and not problems:
        print(f"error: {nothing_left(args.bag_dir, len(bags), left_out)}", file=sys.stderr)
    if looker:
        report: dict[str, Any] = {"episodes": reports, "bad": problems, "left_out": left_out, "notes": notes}
        report |= {"settings": _said(args, settings)} | judge(episodes, problems, looker.looks, settings)
        try:
            if args.json:
                _write(args.json, "--json", [json.dumps(report, indent=2)])
            if drawings:
                _write(args.html, "--html", page_parts(report, drawings))
                found = len({finding["episode"] for finding in report["findings"]} - {""})
                print(
                    f"open {args.html}: something was found of {found} of {len(report['order'])} episodes, worst first"
                )
        except BagError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 1 if problems or not episodes else 0


def _said(args: argparse.Namespace, settings: BagSettings) -> dict[str, Any]:
    """What was asked for, for a report."""
    return {
        "bag_dir": str(args.bag_dir),
        "config": str(args.config or CONFIG.name),
        "overrides": args.override,
        "fps": settings.fps,
        "max_offset_ms": settings.max_offset_ms,
        "pictures_decoded": bool(args.verify or args.html),
        "created": f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %z}",
    }


def _write(path: Path, option: str, texts: Iterable[str]) -> None:
    """A file that is there as a whole or not at all.

    Raises:
        BagError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(texts)
        os.replace(partial, path)
    except OSError as exc:
        raise BagError(f"{option}: {path}: {exc.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def settings_of(bag_dir: Path, config: Path | None, overrides: Sequence[str] = ()) -> tuple[BagSettings, int]:
    """What a training with that config and these overrides would read bags with, and its model.chunk_size.

    Raises:
        SettingError: a file cannot be read as a config, has an unknown key, or a value of a wrong type.
    """
    cfg = read_config(_schema(), CONFIG)  # its values are the defaults
    read_config(cfg, config or CONFIG, overrides)
    folders = {"bag_dir": bag_dir, "cache_dir": Path(cfg.data.cache_dir)}
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
        keys = [
            (key, used.get(key, ANYTHING), setting(None, f"see {CONFIG.name}", path=key == "cache_dir"))
            for key in values
        ]
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
