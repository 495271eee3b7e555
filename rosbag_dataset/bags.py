"""Which recordings a folder holds: their names, their files, and a hash of their bytes.

Knows: how rosbag2 lays a recording out in a folder, and what metadata.yaml says of it.
Must not know: what is inside a storage file (storage.py), topics, the cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import BagError

# libyaml, ten times as fast, where PyYAML was built with it: metadata.yaml files were most of a warm start.
FAST_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


# How old a file's last change must be for its size and times to tell it from a later one: file systems keep times in
# steps of up to 2 s.
SETTLED_NS = 2_000_000_000
STORAGE_ENDINGS = (".db3", ".mcap", ".db3.zstd", ".mcap.zstd")


@dataclass(frozen=True)
class Bag:
    """One recording: a folder with metadata.yaml and its storage files, or a bare storage file.

    Opened by storage.open_storage().
    """

    name: str  # path relative to bag_dir: its name everywhere, and that of its only episode
    path: Path
    files: tuple[Path, ...]
    claimed: dict[str, int] | None  # topic -> message count according to metadata.yaml; None where there is none
    compression: str  # "", "file" or "message"
    problem: str = ""  # why this cannot be a usable bag, found before opening it
    # Of what is no bag, but read as one (lerobot_dataset/recordings.py): in place of reading.read_bag(); and name and
    # hash of the recording that it is a part of, if that is known: its parts are on one side of the split.
    reader: Callable[..., Any] | None = None
    part_of: tuple[str, str] | None = None

    def content_hash(self) -> str:
        """SHA-256 of the recording's bytes, in hex: what the cache and a resumed run know a bag by.

        It covers metadata.yaml, and of each storage file its size and the first and last MiB: enough to notice a bag
        that was recorded anew, and quick. Copies of a recording are found by Recording.sha256() instead.

        Raises:
            OSError: a file cannot be read.
        """
        digest = hashlib.sha256()
        metadata = self.path / "metadata.yaml"
        if self.claimed is not None:
            digest.update(metadata.read_bytes())
        for file in self.files:
            size = file.stat().st_size
            digest.update(str(size).encode())
            with file.open("rb") as stream:
                digest.update(stream.read(1 << 20))
                stream.seek(max(0, size - (1 << 20)))
                digest.update(stream.read(1 << 20))
        return digest.hexdigest()


class KnownBags:
    """What earlier starts found out about bags: they are not parsed and hashed again while their files are the same.

    Files are the same while name, size, inode and the times of their last changes are; of these nobody sets the time of
    the last change of the inode (ctime).

    Args:
        file: where it is kept, or None: nothing is remembered.
    """

    VERSION = 1

    def __init__(self, file: Path | None = None) -> None:
        self._file, self._asked_for, self._new = file, {}, False
        self._known: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(OSError, ValueError, AttributeError):
            content = json.loads(file.read_text()) if file else {}
            self._known = content.get("bags", {}) if content.get("version") == self.VERSION else {}

    def about(self, path: Path, files: Sequence[Path]) -> dict[str, Any]:
        """What is known of `files`, which belong to the bag at `path`: a dict, to read from and to add to."""
        try:
            stats = sorted((file.name, file.stat()) for file in files)
        except OSError:  # said by who opens it
            return {}
        stamp = [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in stats]
        name = f"{os.path.abspath(path)} {len(files)}"
        known = self._known.get(name)
        if known is None or known["stamp"] != stamp:
            known = {"stamp": stamp}
            if max((max(s.st_mtime_ns, s.st_ctime_ns) for _, s in stats), default=0) > time.time_ns() - SETTLED_NS:
                return known
            self._known[name], self._new = known, True
        self._asked_for[name] = known
        return known

    def content_hash(self, bag: Bag) -> str:
        """Bag.content_hash(). Raises OSError: a file cannot be read."""
        if bag.reader is not None:  # its files are those of other recordings, too
            return bag.content_hash()
        about = self.about(bag.path, [*bag.files, *([bag.path / "metadata.yaml"] if bag.claimed is not None else [])])
        if "sha256" not in about:
            about["sha256"] = bag.content_hash()
        return about["sha256"]

    def save(self) -> None:
        """Remember it all for the next start, if the disk lets us; it is what saves time, and no more."""
        if not self._new or self._file is None:
            return
        everything = self._known | self._asked_for
        if len(everything) > 4 * len(self._asked_for) + 10_000:  # of folders of bags that are long gone
            everything = self._asked_for
        partial = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps({"version": self.VERSION, "bags": everything}))
            os.replace(partial, self._file)
        except OSError:
            partial.unlink(missing_ok=True)


def find_bags(bag_dir: Path, known: KnownBags | None = None) -> list[Bag]:
    """All bags below `bag_dir`, sorted by name: folders with a metadata.yaml, and bare storage files (also .zstd).

    Below a bag there may be others: a metadata.yaml that was left in a folder of bags does not hide them. Hidden names
    are passed over (unfinished downloads start with a dot). ROS 1 `.bag` files are returned with their `problem` set,
    so that they are reported and not silently ignored.

    Raises:
        BagError: the folder does not exist or holds no bag.
    """
    if not bag_dir.is_dir():
        found = "a file" if bag_dir.exists() else "nothing"
        raise BagError(
            f"data.bag_dir: {bag_dir}: expected a folder of ROS 2 bags, found {found} there; "
            "set data.bag_dir in the config or with --override data.bag_dir=PATH"
        )
    bags: list[Bag] = []
    seen: set[Path] = set()
    for folder, folders, files in os.walk(bag_dir, followlinks=True):
        path = Path(folder)
        real = path.resolve()
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        if "metadata.yaml" in files:
            bags.append(_bag_folder(path, _episode_name(path, bag_dir), known or KnownBags()))
            continue
        for file in sorted(f for f in files if not f.startswith(".")):
            if file.endswith(STORAGE_ENDINGS):
                name = _episode_name(path / file, bag_dir)
                bags.append(Bag(name, path / file, (path / file,), None, ""))
            elif file.endswith(".bag"):
                old, new = (shlex.quote(str(p)) for p in (path / file, (path / file).with_suffix("")))
                problem = f"is a ROS 1 bag file; convert it first: rosbags-convert --src {old} --dst {new}"
                bags.append(Bag(_episode_name(path / file, bag_dir), path / file, (path / file,), None, "", problem))
    if not bags:
        raise BagError(
            f"data.bag_dir: {bag_dir}: found no ROS 2 bag in it or below; expected folders with metadata.yaml and "
            ".db3 or .mcap files; check the path, or record sample bags with: python -m sim.record --out sample_bags"
        )
    if len({bag.name for bag in bags}) < len(bags):  # bag_dir is one, and so is a folder in it that is called the same
        bags = [dataclasses.replace(bag, name=".") if bag.path == bag_dir else bag for bag in bags]
    return sorted(bags, key=lambda bag: bag.name)


def lfs_pointer(head: bytes) -> str:
    """What to say of a file that begins with `head`, if git has only its name in the large file storage; else ""."""
    if not head.startswith(b"version https://git-lfs.github.com/spec/"):
        return ""
    size = re.search(rb"^size (\d{1,20})$", head, re.MULTILINE)
    large = f" of {size[1].decode()} bytes" if size else ""
    return f"is a git-lfs pointer, not the file{large} that it stands for; get that with: git lfs pull"


def _episode_name(path: Path, bag_dir: Path) -> str:
    relative = path.relative_to(bag_dir)
    return relative.as_posix() if relative.parts else bag_dir.resolve().name


class PlainLoader(FAST_YAML):
    """Without merge keys (<<), which nobody needs here: some lines of them multiply to gigabytes."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge nothing; a merge key is then an error of YAML's."""


def load_yaml(text: str, loader: type[Any] = PlainLoader) -> Any:
    """yaml.load, after a look at a text that could be deep enough to crash libyaml; rosbag2 writes six levels.

    A text with few brackets, dashes and question marks cannot be deep; walking through the events costs half as much as
    loading does, and is left out for it.

    Raises:
        ValueError: it is more than 100 levels deep.
        yaml.YAMLError: it is no YAML, or has merge keys.
    """
    if sum(map(text.count, "[{-?")) > 1000:
        depth = 0
        for event in yaml.parse(text, Loader=FAST_YAML):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 100:
                raise ValueError("it is more than 100 levels deep")
    return yaml.load(text, Loader=loader)


def _bag_folder(path: Path, name: str, known: KnownBags) -> Bag:
    """The bag in a folder with a metadata.yaml; what is wrong with it goes into the bag's `problem`.

    metadata.yaml is read with tolerance: only the list of files and the message counts are taken from it, and the
    storage files are opened directly. A rosbag2 folder that is read through its metadata yields nothing when a QoS
    profile or a file name differs.
    """
    present = sorted(p for p in path.iterdir() if not p.name.startswith(".") and p.name.endswith(STORAGE_ENDINGS))
    about = known.about(path, [*present, path / "metadata.yaml"])
    if "files" in about:
        return Bag(name, path, tuple(path / file for file in about["files"]), about["claimed"], about["compression"])
    remove = "" if present else f", or remove it if {name} is no recording: no .db3 or .mcap file is beside it"
    try:
        text = (path / "metadata.yaml").read_text()
        if pointer := lfs_pointer(text.encode()):
            return Bag(name, path, tuple(present), {}, "", f"metadata.yaml {pointer}")
        info = load_yaml(text)["rosbag2_bagfile_information"]
        listed = [path / Path(p).name for p in info["relative_file_paths"]]
        mode = str(info.get("compression_mode") or "").lower()
        claimed: dict[str, int] = {}
        for entry in info["topics_with_message_count"]:
            topic = entry["topic_metadata"]["name"]
            claimed[topic] = claimed.get(topic, 0) + int(entry["message_count"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, RecursionError, OSError) as exc:
        reason = " ".join(str(exc).split())
        problem = (
            f"metadata.yaml is not a rosbag2 metadata file ({type(exc).__name__}: {reason}); "
            f"rewrite it with: ros2 bag reindex {shlex.quote(str(path))}{remove}"
        )
        return Bag(name, path, tuple(present), {}, "", problem)
    missing = [p.name for p in listed if not p.exists()]
    if missing and len(present) != len(listed):  # the same number of files under other names: renamed, fine
        found = [p.name for p in present]
        problem = f"metadata.yaml lists {', '.join(missing)}, which is not there (found {found}); copy it again{remove}"
        return Bag(name, path, tuple(present), claimed, "", problem)
    files = tuple(present if missing else listed)
    problem = "" if files else "metadata.yaml lists no storage file"
    if not problem:
        compression = mode if mode in ("file", "message") else ""
        about |= {"files": [file.name for file in files], "claimed": claimed, "compression": compression}
    return Bag(name, path, files, claimed, mode if mode in ("file", "message") else "", problem)
