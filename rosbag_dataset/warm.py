"""Episodes as they were cut, kept on disk: a start with the same bags and settings makes none of them again.

Beside the entries of the frame cache lies, for all bags of a start together,

    episodes-KEY/       KEY stands for the entries, every setting, sidecars and the code: nothing here is ever stale
        COLUMN.bin      the episodes' arrays, those of one name one after the other: (N, ...) for N frames in all
        episodes.json   columns with their types and shapes; of each episode everything else, but `source`, and
        reports.json    sync reports; and what was left out
        meta.json       the entries' names, for pruning.py; it was last used at this file's time of change

All processes of a node map the same files, so that they take memory once, and only while nobody else needs it; a
loader's worker is sent names, not arrays.

Knows: names and layout of these files, which fields of an episode are as long as the recording.
Must not know: how episodes come about, which bags there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .bags import Bag
from .cache import find_entry, flush, locked, save, use
from .cutting import LeftOut
from .settings import BagSettings
from .sidecar import sidecar_path
from .synchronisation import Episode

PREFIX = "episodes-"
COLUMNS = ("time_ns", "path_rad", "recorded", "target")  # and image_index.CAMERA
NOT_OF_THE_DATA = ("bag_dir", "cache_dir")  # settings: the same bags elsewhere are the same bags

Made = Iterable[tuple[list[Episode], list[LeftOut]]]  # bag after bag: its episodes, and what is left out of it


@functools.cache
def _code() -> str:
    """Stands for what makes episodes of entries: this package's code, and the libraries that round."""
    digest = hashlib.sha256(f"{np.__version__} {platform.machine()}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def kept_key(bags: Sequence[Bag], keys: dict[str, str], settings: BagSettings) -> str:
    """The name under which the episodes of these bags are kept; `keys` are those of their entries, by bag name."""
    parts: list[Any] = [_code(), [bag.name for bag in bags]]
    for field in dataclasses.fields(BagSettings):
        if field.name not in NOT_OF_THE_DATA:
            parts.append([field.name, repr(getattr(settings, field.name))])  # of mappings with their order
    for bag in bags:
        entry = find_entry(keys[bag.name], settings)
        parts.append([keys[bag.name], entry and [entry.name, _stamp(entry)], bag.part_of])
        if settings.episodes == "file":
            parts.append(sidecar_path(bag).read_bytes().hex())
    return PREFIX + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _stamp(entry: Path) -> list[Any]:
    """What tells an entry from one that was damaged or made again: its files, of meta.json the content."""
    stamp: list[Any] = []
    with contextlib.suppress(OSError):
        stamp.append((entry / "meta.json").read_text())  # its time says when it was used
        for file in sorted(os.scandir(entry), key=lambda file: file.name):
            if file.name != "meta.json" and ".moments" not in file.name:
                stamp.append([file.name, file.stat().st_size, file.stat().st_mtime_ns])
    return stamp


def kept_episodes(
    cache_dir: Path, key: Callable[[], str], entries: Sequence[str], make: Callable[[], Made]
) -> tuple[list[Episode], list[LeftOut]]:
    """The episodes that are kept under a key, or those of `make`, which are kept from now on.

    Where they cannot be kept, on a disk that is full or read only, that is said, and they stay in memory.

    Args:
        cache_dir: the frame cache.
        key: kept_key() of what is there now; `make` may build entries again.
        entries: the names of all entries that they are of.
        make: makes them, when it is called and one by one.

    Raises:
        What `make` raises.
    """
    use(cache_dir)
    name = key()
    if (found := _read(cache_dir / name)) is not None:
        return found
    building = cache_dir / f".{name}.{os.getpid()}"
    try:
        with locked(cache_dir, name, "these episodes"):
            if (found := _read(cache_dir / name)) is not None:
                return found
            shutil.rmtree(building, ignore_errors=True)
            try:
                building.mkdir()
                left_out = _write(building, entries, make())
                if left_out is not None:
                    return [], left_out
                folder = cache_dir / key()
                if (found := _read(folder)) is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    building.rename(folder)
                    found = _read(folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)
        if found is not None:
            return found
        why = "they cannot be read again"
    except OSError as error:
        why = error.strerror or str(error)
    print(
        f"warning: data.cache_dir: {cache_dir}: cannot keep the synchronised episodes there ({why}); they stay in "
        "memory, and the next start makes them again",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    made = list(make())
    return [e for episodes, _ in made for e in episodes], [left for _, left_out in made for left in left_out]


def _columns_of(episode: Episode) -> dict[str, np.ndarray]:
    """An episode's arrays that are as long as it is, by their names here."""
    columns = {name: getattr(episode, name) for name in COLUMNS if getattr(episode, name) is not None}
    return columns | {f"image_index.{camera}": index for camera, index in episode.image_index.items()}


def _with_columns(columns: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields of an Episode that its arrays fill."""
    images = {name.removeprefix("image_index."): a for name, a in columns.items() if name.startswith("image_index.")}
    return {name: columns.get(name) for name in COLUMNS} | {"image_index": images}


def _write(folder: Path, entries: Sequence[str], made: Made) -> list[LeftOut] | None:
    """Write all that is made; -> None, or what was left out if there is nothing else."""
    facts: list[dict[str, Any]] = []
    reports: list[dict[str, Any]] = []
    all_left_out: list[LeftOut] = []
    types: dict[str, tuple[str, tuple[int, ...]]] = {}  # column -> dtype, shape of a frame's row
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for episodes, left_out in made:
            all_left_out += left_out
            for episode in episodes:
                for name, column in _columns_of(episode).items():
                    if name not in files:
                        files[name] = stack.enter_context((folder / f"{name}.bin").open("wb"))
                        types[name] = column.dtype.str, column.shape[1:]
                    files[name].write(np.ascontiguousarray(column).data.cast("B"))
                fields = episode.__dict__.keys() - {*_with_columns({}), "sync_report", "kept", "entry", "source"}
                as_json = {name: getattr(episode, name) for name in sorted(fields)}
                as_json = {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in as_json.items()}
                assert episode.entry is not None
                facts.append(as_json | {"entry": episode.entry.name, "frames": len(episode.time_ns)})
                reports.append(episode.sync_report)
    if not facts:
        return all_left_out
    save(folder / "episodes.json", json.dumps({"columns": types, "episodes": facts}).encode())
    save(folder / "reports.json", json.dumps({"reports": reports, "left_out": all_left_out}).encode())
    meta = {"bag": f"({len(facts)} episodes of {len(entries)} bags)", "entries": list(entries)}
    save(folder / "meta.json", json.dumps(meta).encode())
    for file in folder.iterdir():
        flush(file)
    return None


class _Kept:
    """A folder of kept episodes, open."""

    def __init__(self, folder: Path) -> None:
        content = json.loads((folder / "episodes.json").read_text())
        self.facts: list[dict[str, Any]] = content["episodes"]
        self.starts = np.cumsum([0, *(fact["frames"] for fact in self.facts)]).tolist()
        self.columns: dict[str, np.ndarray] = {}
        for name, (dtype, row) in content["columns"].items():
            rows = np.memmap(folder / f"{name}.bin", dtype, "r", shape=(self.starts[-1], *row))
            self.columns[name] = np.asarray(rows)  # its parts are then plain arrays

    def arrays(self, number: int) -> dict[str, Any]:
        """The fields of an episode that its arrays fill."""
        frames = slice(*self.starts[number : number + 2])
        return _with_columns({name: column[frames] for name, column in self.columns.items()})


_open = functools.lru_cache(maxsize=8)(_Kept)  # in a worker, which is sent many episodes of one folder


def _read(folder: Path) -> tuple[list[Episode], list[LeftOut]] | None:
    """The episodes in a folder, and what was left out; None if there is no such folder, or it is not whole."""
    try:
        meta, more = (json.loads((folder / name).read_text()) for name in ("meta.json", "reports.json"))
        kept = _Kept(folder)
        episodes = []
        for number, (fact, report) in enumerate(zip(kept.facts, more["reports"], strict=True)):
            shapes = {n: {c: tuple(s) for c, s in fact[n].items()} for n in ("image_shape", "source_shape")}
            arrays = {
                "segments": np.array(fact["segments"], np.int64).reshape(-1, 2),
                "reference_rad": np.array(fact["reference_rad"], np.float64),
                "wrapped": np.array(fact["wrapped"], bool),
                "acted": np.array(fact["acted"], np.int64),
            }
            place = {"entry": folder.parent / fact["entry"], "sync_report": report, "kept": (folder, number)}
            fields: dict[str, Any] = fact | shapes | arrays | place | kept.arrays(number)
            del fields["frames"]
            episodes.append(Episode(**fields))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for path in (folder, *(folder.parent / name for name in meta["entries"])):
        with contextlib.suppress(OSError):  # a cache that is read only
            os.utime(path / "meta.json")
    return episodes, more["left_out"]


# -- what a loader's worker is sent -------------------------------------------------------------------------------


def put_away(episode: Episode) -> Episode | dict[str, Any]:
    """An episode without what is long and lies on disk, to be sent to another process; see taken_out()."""
    if episode.kept is None:
        return episode
    return {n: v for n, v in episode.__dict__.items() if n not in _with_columns({})} | {"sync_report": {}}


def taken_out(away: Episode | dict[str, Any]) -> Episode:
    """The episode that was put_away(), with its arrays; its sync report stays where it was."""
    if isinstance(away, Episode):
        return away
    folder, number = away["kept"]
    return Episode(**(away | _open(folder).arrays(number)))
