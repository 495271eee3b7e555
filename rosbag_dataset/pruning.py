"""What a frame cache holds, and removing what is not wanted any more.

    python -m rosbag_dataset cache CACHE_DIR                                  # each entry's bag, size and last use
    python -m rosbag_dataset cache CACHE_DIR --bags my_bags --config my.yaml  # and whether a bag of these needs it
    python -m rosbag_dataset cache CACHE_DIR --prune --max-gb 200 --dry-run   # what would be removed to keep 200 GB

Nothing is removed while any program uses the cache: cache.py holds a lock for as long as such a program runs.

Knows: the command line, which entries go and why, in which order files and locks may be removed.
Must not know: what is inside an entry but its bag's name.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .bags import find_bags
from .cache import IN_USE, cache_key, entry_keys
from .errors import NO_LOCKS, BagError
from .inspection import settings_of
from .storage import storage_errors
from .warm import PREFIX

KEY = "(?:" + PREFIX + ")?[0-9a-f]{24}"  # what cache_key() and kept_key() return
GB, DAY_S = 1_000_000_000, 86_400


@dataclass
class Entry:
    """A folder in the cache."""

    path: Path
    key: str
    bag: str | None  # None: half made by a process that was killed, or damaged
    size: int  # bytes
    used_s: float  # when it was last used, in s since 1970
    needs: set[str]  # itself; of episodes that are kept: the entries that they are of
    why: str = ""  # why it goes, or "" if it stays


def find_entries(cache_dir: Path) -> list[Entry]:
    """All entries and half-made ones, the least recently used first; what else lies there is not ours.

    Raises:
        OSError: the folder cannot be read.
    """
    found = []
    for path in sorted(cache_dir.iterdir()):
        match = re.fullmatch(rf"({KEY})|\.({KEY})\.\d+", path.name)
        if not match or not path.is_dir() or path.is_symlink():
            continue
        bag, used_s, needs = None, path.stat().st_mtime, {path.name}
        if match[1]:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                meta = json.loads((path / "meta.json").read_text())
                bag, needs = str(meta["bag"]), set(meta.get("entries", needs))
                used_s = (path / "meta.json").stat().st_mtime
        files = [file for file in path.rglob("*") if file.is_file()]
        ours = (".rgb", ".places", ".npy", ".json", ".bin")
        if bag is None and match[1] and any(file.suffix not in ours for file in files):
            continue  # a folder of somebody else's
        size = sum(file.stat().st_size for file in files)
        found.append(Entry(path, match[1] or match[2], bag, size, used_s, needs))
    return sorted(found, key=lambda entry: entry.used_s)


def keys_needed(bag_dirs: Sequence[Path], configs: Sequence[Path]) -> set[str]:
    """The keys of all entries that a training with one of these configs on one of these folders would read.

    Raises:
        BagError: a folder, a bag or a config cannot be read, so that nobody can tell.
    """
    keys = set()
    for bag_dir in bag_dirs:
        bags = find_bags(bag_dir)
        for bag in bags:
            with storage_errors(bag, bag.path):
                content_hash = bag.content_hash()
            for config in configs or [None]:
                settings = settings_of(bag_dir, config)[0]
                keys |= {*entry_keys(cache_key(bag, content_hash, settings), settings.frames)}
    return keys


def choose(entries: list[Entry], needed: set[str] | None, older_than_days: float | None, max_gb: float | None) -> None:
    """Write into each entry's `why` why it goes: half made, not needed, too old, or the oldest beyond a size.

    Episodes that are kept go with the first of their entries: they would never be found again.
    """
    now_s = time.time()
    for entry in entries:
        days = (now_s - entry.used_s) / DAY_S
        if entry.bag is None:
            entry.why = "half made or damaged"
        elif needed is not None and not entry.needs <= needed:
            entry.why = "no bag needs it"
        elif older_than_days is not None and days > older_than_days:
            entry.why = f"last used {days:.0f} days ago"
    total = sum(entry.size for entry in entries if not entry.why)
    for entry in entries:  # the least recently used first
        if max_gb is not None and total > max_gb * GB and not entry.why:
            entry.why = f"beyond {max_gb:g} GB"
            total -= entry.size
    staying = {entry.key for entry in entries if not entry.why}
    for entry in entries:
        if not entry.why and not entry.needs <= staying:
            entry.why = "episodes of entries that go, or are gone"


@contextlib.contextmanager
def _alone(file: Path) -> Generator[bool]:
    """Whether nobody else holds the lock; if so it is ours inside. The file is made where it is absent.

    Raises:
        OSError: nothing can be locked there, or the file cannot be opened.
    """
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            yield False
        else:
            yield True


def remove(entry: Entry) -> bool:
    """Remove an entry and its lock file, if no process is building it; -> whether it did.

    It gets the name of a half-made one first, so that nobody takes what is left for whole if this process is killed.
    Its lock file goes while it is held. That is safe only while IN_USE is held alone: a builder that has opened the
    file, but not locked it yet, would hold a lock that nobody else sees.
    """
    lock = entry.path.with_name(f"{entry.key}.lock")
    with _alone(lock) as ours:
        if not ours:
            return False
        leftover = entry.path.with_name(f".{entry.key}.{os.getpid()}")
        if entry.path != leftover:
            shutil.rmtree(leftover, ignore_errors=True)
            entry.path.rename(leftover)
        shutil.rmtree(leftover)
        if not entry.path.with_name(entry.key).exists():
            lock.unlink(missing_ok=True)
    return True


def remove_locks(cache_dir: Path) -> int:
    """Remove lock files whose entry is not there, and that nobody holds; -> how many."""
    count = 0
    for lock in cache_dir.glob("*.lock"):
        if re.fullmatch(KEY, lock.stem) and not lock.with_name(lock.stem).exists():
            with _alone(lock) as ours:
                if ours:
                    lock.unlink()
                    count += 1
    return count


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m rosbag_dataset cache`. Exit code 0, or 1 with one line about what stands in the way."""
    parser = argparse.ArgumentParser(
        prog="python -m rosbag_dataset cache", description="Look at a frame cache, and remove entries from it."
    )
    parser.add_argument("cache_dir", type=Path, help="the cache: data.cache_dir of a config")
    parser.add_argument("--bags", type=Path, nargs="+", default=[], help="folders of bags: who needs which entry")
    parser.add_argument(
        "--config", type=Path, nargs="+", default=[], help="configs that are used with them (default: config.yaml)"
    )
    parser.add_argument(
        "--prune", action="store_true", help="remove what the options below name, and what is half made"
    )
    parser.add_argument("--unneeded", action="store_true", help="entries that no bag of --bags needs with --config")
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="entries that were not used for so long")
    parser.add_argument(
        "--max-gb", type=float, metavar="GB", help="the least recently used, until the rest is this small"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    args = parser.parse_args(argv)
    chosen = args.unneeded or args.older_than is not None or args.max_gb is not None
    if (chosen or args.dry_run) and not args.prune:
        parser.error("--unneeded, --older-than, --max-gb and --dry-run say what --prune does; add --prune")
    if args.unneeded and not args.bags:
        parser.error("--unneeded needs --bags DIR: the bags that may still need an entry")
    if args.config and not args.bags:
        parser.error("--config needs --bags DIR: the bags that it is used with")
    for name, value in (("--older-than", args.older_than), ("--max-gb", args.max_gb)):
        if value is not None and not 0 <= value < float("inf"):
            parser.error(f"{name} is {value:g}, expected 0 or more")
    try:
        return _run(args)
    except BagError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno in NO_LOCKS:
            what = "it cannot be locked, so that nobody can tell whether a program uses it; remove folders by hand"
            print(f"error: {args.cache_dir}: {error.strerror}: {what}", file=sys.stderr)
        else:
            print(f"error: {error.filename or args.cache_dir}: {error.strerror or error}", file=sys.stderr)
    return 1


def _run(args: argparse.Namespace) -> int:
    if not args.cache_dir.is_dir():
        found = "a file" if args.cache_dir.exists() else "nothing"
        raise BagError(f"{args.cache_dir}: expected the folder of a frame cache (data.cache_dir), found {found} there")
    needed = keys_needed(args.bags, args.config) if args.bags else None
    if not args.prune or args.dry_run:
        entries = find_entries(args.cache_dir)
        if args.prune:
            choose(entries, needed if args.unneeded else None, args.older_than, args.max_gb)
        _show(entries, needed)
        if args.prune:
            _sum_up("would remove", entries, 0)
        else:
            print(f"{len(entries)} entries, {sum(entry.size for entry in entries) / GB:.3f} GB")
        if (args.cache_dir / IN_USE).exists():  # looking makes no file
            with _alone(args.cache_dir / IN_USE) as ours:
                if not ours:
                    print("in use: a training or an evaluation runs with this cache, and nothing can be removed now")
        return 0
    with _alone(args.cache_dir / IN_USE) as ours:
        if not ours:
            raise BagError(
                f"{args.cache_dir}: a program that uses it is running (a training or an evaluation); nothing was "
                "removed; run this again when it has ended"
            )
        entries = find_entries(args.cache_dir)
        choose(entries, needed if args.unneeded else None, args.older_than, args.max_gb)
        for entry in entries:
            if entry.why and not remove(entry):
                print(f"{entry.path.name} stays: a process is building it")
                entry.why = ""
        _show([entry for entry in entries if entry.why], needed)
        _sum_up("removed", entries, remove_locks(args.cache_dir))
    return 0


def _show(entries: list[Entry], needed: set[str] | None) -> None:
    rows = [("entry", "GB", "last used", "needed", "bag")]
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used_s))
        wanted = "?" if needed is None else "yes" if entry.needs <= needed else "no"
        bag = "(half made or damaged)" if entry.bag is None else entry.bag
        goes = f"  -> {entry.why}" if entry.why and entry.bag is not None else ""
        rows.append((entry.path.name, f"{entry.size / GB:.3f}", used, wanted, bag + goes))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]))


def _sum_up(verb: str, entries: list[Entry], locks: int) -> None:
    goes, stays = [e for e in entries if e.why], [e for e in entries if not e.why]
    size = sum(entry.size for entry in goes)
    extra = f", and {locks} lock files" if locks else ""
    print(
        f"{verb} {len(goes)} of {len(entries)} entries, {size} bytes ({size / GB:.3f} GB){extra}; "
        f"{len(stays)} stay, {sum(entry.size for entry in stays) / GB:.3f} GB"
    )
