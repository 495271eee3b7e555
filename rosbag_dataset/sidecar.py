"""A sidecar: the file beside a recording in which a person wrote where its episodes are (data.episodes: file).

    BAG/episodes.yaml       for a folder, in it
    NAME.episodes.yaml      for a bare NAME.db3 or NAME.mcap, beside it

holds a list such as

    - {start_s: 3.0, stop_s: 21.5, task: pick the block}
    - {start_s: 30.2, stop_s: 44.0, success: false, note: it slipped}

in seconds since the recording's first message of a topic that is read. `success` is true where it is left out.

Knows: names, keys and types of these files.
Must not know: what is done with the episodes (cutting.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .bags import Bag, PlainLoader, load_yaml
from .errors import BagError

SIDECAR = "episodes.yaml"
MAX_BYTES = 1 << 20  # ten thousand episodes; loading takes a hundred times as much memory
LABELS = {"success": (bool, "true or false"), "task": (str, "text"), "note": (str, "text")}  # key -> type, in words


@dataclass(frozen=True)
class Entry:
    """One episode of a sidecar."""

    where: str  # the file and which of its entries, for errors
    start_s: float
    stop_s: float
    labels: dict[str, Any] = field(default_factory=dict)  # success, task, note: what is given of them


class _Loader(PlainLoader):
    """A key that is given twice is refused: the last one would count without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=True)
        if len(mapping) < len(node.value):
            raise ValueError(f"a key is given twice in {mapping}")
        return mapping


def sidecar_path(bag: Bag) -> Path:
    """Where the sidecar of a bag is, or would be."""
    return bag.path / SIDECAR if bag.path.is_dir() else bag.path.with_name(f"{bag.path.stem}.{SIDECAR}")


def read_sidecar(bag: Bag) -> list[Entry]:
    """The episodes that a bag's sidecar names, in order of time; at least one, and none overlaps another.

    Raises:
        BagError: it is not there, or faulty: the file, which of its entries, what was found, what was expected.
    """
    path = sidecar_path(bag)
    where = f"{bag.name}: {path}"
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise BagError(f"{where}: {size} bytes, expected at most {MAX_BYTES}: a list of episodes")
        content = load_yaml(path.read_text(), _Loader)
    except FileNotFoundError:
        raise BagError(
            f"{where}: not there; data.episodes: file expects a list of start_s and stop_s in it; write one, leave the "
            "bag out with data.on_bad_bag: skip, or set data.episodes: bag"
        ) from None
    except OSError as exc:
        raise BagError(f"{where}: {exc.strerror or exc}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise BagError(f"{where}: not valid YAML ({' '.join(str(exc).split())[:200]})") from None
    if not isinstance(content, list) or not content:
        raise BagError(f"{where}: found {content!r:.60}, expected a list of entries with start_s and stop_s each")
    entries = [_entry(f"{where}, entry {number}", values) for number, values in enumerate(content, 1)]
    entries.sort(key=lambda entry: entry.start_s)
    for before, after in zip(entries, entries[1:], strict=False):
        if after.start_s < before.stop_s:
            raise BagError(
                f"{after.where}: overlaps {before.where.rsplit(', ')[-1]}: it starts at {after.start_s:g} s, the other "
                f"one stops at {before.stop_s:g} s; expected one after the other"
            )
    return entries


def _entry(where: str, values: Any) -> Entry:
    if not isinstance(values, dict):
        raise BagError(f"{where}: found {values!r:.60}, expected start_s and stop_s, and success, task, note if known")
    known = ("start_s", "stop_s", *LABELS)
    if unknown := [str(key) for key in values if key not in known]:
        raise BagError(f"{where}: unknown key {', '.join(unknown)}; the keys are {', '.join(known)}")
    seconds = []
    for key in ("start_s", "stop_s"):
        value = values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise BagError(f"{where}: {key}: found {value!r:.60}, expected seconds since the recording's first message")
        seconds.append(float(value))
    start_s, stop_s = seconds
    if not start_s < stop_s:
        raise BagError(f"{where}: start_s {start_s:g} is not before stop_s {stop_s:g}")
    labels = {key: value for key, value in values.items() if key in LABELS and value is not None}
    for key, value in labels.items():
        kind, expected = LABELS[key]
        if not isinstance(value, kind):
            raise BagError(f"{where}: {key}: found {value!r:.60}, expected {expected}")
    return Entry(where, start_s, stop_s, labels)
