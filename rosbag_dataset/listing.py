"""What has to arrive where the recordings are uploaded to: every file of them, with its size.

    python -m rosbag_dataset list DIR > DIR/bags.txt      # SIZE, a tab, and the path below DIR, a line

An upload can leave files out and say nothing. osmo/train-entrypoint.sh compares what arrived with this list, which it
looks for beside the recordings.

Knows: the command line.
Must not know: what a recording holds.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .bags import Bag, find_bags
from .errors import BagError


def list_files(bags: Sequence[Bag], bag_dir: Path) -> list[tuple[int, str]]:
    """Size in bytes and path below `bag_dir` of each file of these bags, by path.

    Raises:
        BagError: a bag lacks files, or one has a name that a line cannot hold.
    """
    found: dict[str, int] = {}
    for bag in bags:
        for file in _files(bag):
            if not file.is_file():
                raise BagError(f"{bag.name}: {file.name} is not there; copy the recording again, or remove it")
            found[file.relative_to(bag_dir).as_posix()] = file.stat().st_size
    for name in found:
        if "\n" in name:
            raise BagError(f"{name!r}: a line break in a recording's name; rename it")
    return [(found[name], name) for name in sorted(found)]


def _files(bag: Bag) -> Iterator[Path]:
    if bag.claimed is not None:
        yield bag.path / "metadata.yaml"
    yield from bag.files


def linked_folders(bag_dir: Path) -> list[Path]:
    """Links to folders below `bag_dir`, by path."""
    return sorted(
        path for root, folders, _ in os.walk(bag_dir) for name in folders if (path := Path(root, name)).is_symlink()
    )


def main(argv: Sequence[str]) -> int:
    """Entry of `python -m rosbag_dataset list`. Exit code 0, or 1 with one line about what stands in the way."""
    parser = argparse.ArgumentParser(
        prog="python -m rosbag_dataset list",
        description="List the files of a folder of bags, for the place that they are uploaded to: > DIR/bags.txt",
    )
    parser.add_argument("bag_dir", type=Path, help="folder of bags")
    args = parser.parse_args(argv)
    try:
        for size, name in list_files(find_bags(args.bag_dir), args.bag_dir):
            print(f"{size}\t{name}")
    except BagError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for link in linked_folders(args.bag_dir):
        print(f"note: {link} is a link, which OSMO does not upload: put a copy in its place", file=sys.stderr)
    return 0
