"""A folder of bags to episodes, from the cache where it has them, and their split into training and validation.

Knows: the order of the steps, what to do about a bad bag (data.on_bad_bag), which bags are copies of each other.
Must not know: how any single step is done; how a recording is cut into episodes (cutting.py).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from .bags import Bag, KnownBags, find_bags
from .cache import KNOWN, cache_key, find_entry, open_entry
from .cutting import LeftOut, cut
from .decoding import build_entries
from .errors import BagError, SetupError
from .images import height_by_width
from .in_place import choose, source_of
from .settings import BagSettings
from .sidecar import read_sidecar
from .storage import storage_errors
from .synchronisation import Episode
from .warm import kept_episodes, kept_key

Shapes = dict[str, tuple[int, int]]  # camera -> (H, W)


def load_episodes(
    settings: BagSettings,
    workers: int = 0,
    progress: bool = True,
    find: Callable[[Path], list[Bag]] | None = None,
) -> tuple[list[Episode], list[LeftOut]]:
    """All episodes below `bag_dir`, from the cache where it has them, else decoded first (in parallel over bags).

    Args:
        settings: where and how.
        workers: processes that decode bags; 0 means what keeps the cores busy, at most one per bag.
        progress: show a progress bar while decoding.
        find: what finds the recordings in `bag_dir`; None: find_bags().

    Returns:
        (episodes sorted by name; what is left out: skipped bags, with on_bad_bag "skip", as {"bag", "why"}, episodes
         cut from a bag, marked as failures or too short, as {"bag", "episode", "why"}).

    Raises:
        BagError: no bags, or a bad one with on_bad_bag "error"; no episode is left.
    """
    known = KnownBags(settings.cache_dir / KNOWN)
    bags = find(settings.bag_dir) if find else find_bags(settings.bag_dir, known)
    stop_early = settings.on_bad_bag != "skip"
    hashes: dict[str, str] = {}
    keys: dict[str, str] = {}
    failed: dict[str, BagError] = {}
    for bag in bags:
        try:
            if settings.episodes == "file":  # a faulty sidecar is said before an hour of decoding
                read_sidecar(bag)
            with storage_errors(bag, bag.path):
                hashes[bag.name] = known.content_hash(bag)
            keys[bag.name] = cache_key(bag, hashes[bag.name], settings)
        except BagError as error:
            failed[bag.name] = error
    todo = [bag for bag in bags if bag.name in keys and find_entry(keys[bag.name], settings) is None]
    in_place = True
    if not (failed and stop_early):
        in_place, why = choose(todo, settings)
        if why and progress:
            print(why, file=sys.stderr, flush=True)
        bad, not_in_place = build_entries(todo, keys, settings, in_place, workers, progress, stop_early)
        failed |= {b.name: e for b, e in bad}
        if 0 < len(not_in_place) < len(todo) and progress:
            which = f"{len(not_in_place)} of {len(todo)} new bags"
            print(f"frames: {which} are in the cache: {not_in_place[0]}", file=sys.stderr, flush=True)
    known.save()
    for error in failed.values():
        if stop_early or isinstance(error, SetupError):
            raise error  # bags before this one may have been left undone
    good = {bag.name: bag for bag in bags if bag.name not in failed}

    def make() -> Iterator[tuple[list[Episode], list[LeftOut]]]:
        bar = tqdm(
            good.values(), desc="synchronising bags", unit="bag", disable=not progress, delay=2.0,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )  # fmt: skip
        first: Episode | None = None
        first_with: dict[str, str] = {}  # hash of a recording -> name of the first bag that holds it
        for bag in bar:
            try:
                parts, left_out = _episodes_of(bag, keys[bag.name], hashes[bag.name], settings, in_place, first)
            except BagError as error:
                if stop_early or isinstance(error, SetupError):
                    raise
                parts, left_out = [], [{"bag": bag.name, "why": str(error)}]
            for episode in parts:
                mark_copy(episode, first_with)
                episode.bag, episode.recording_hash = bag.part_of or (episode.bag, episode.recording_hash)
                first = first or episode
            yield parts, left_out

    if good:
        entries = [e.name for bag in good if (e := find_entry(keys[bag], settings)) is not None]
        found = kept_episodes(settings.cache_dir, lambda: kept_key([*good.values()], keys, settings), entries, make)
    else:
        found = [], []
    episodes, skipped = found[0], [{"bag": name, "why": str(error)} for name, error in failed.items()] + found[1]
    for episode in episodes:
        bag = good.get(episode.bag)
        if bag is not None and bag.reader is None and episode.entry != settings.cache_dir / keys[bag.name]:
            episode.source = source_of(bag, settings, keys[bag.name])  # its pictures lie where the bag is now
    place = {bag.name: number for number, bag in enumerate(bags)}
    skipped.sort(key=lambda left_out: place[left_out["bag"]])
    for left_out in skipped:
        if "episode" not in left_out:
            print(f"skipped bag {left_out['why']}", file=sys.stderr, flush=True)
    if not episodes:
        raise BagError(nothing_left(settings.bag_dir, len(bags), skipped))
    return episodes, skipped


def _episodes_of(
    bag: Bag, key: str, content_hash: str, settings: BagSettings, in_place: bool, first: Episode | None
) -> tuple[list[Episode], list[LeftOut]]:
    """A bag's episodes, from its entry, and what is left out; `first` is one of an earlier bag, whose sizes count.

    Raises:
        BagError: the bag cannot be used.
    """
    entry, recording = open_entry(bag, key, settings, in_place)
    parts, left_out = cut(bag, recording, settings)
    if first is not None:
        check_same_size(bag.name, recording.image_shape, first.name, first.image_shape)
    recorded = recording.sha256()
    for episode in parts:
        episode.entry, episode.content_hash, episode.recording_hash = entry, content_hash, recorded
        if not episode.whole:  # a resumed run compares these: another end is another episode
            episode.content_hash += f" {episode.time_ns[0]}..{episode.time_ns[-1]}"
    return parts, left_out


def nothing_left(bag_dir: Path, bags: int, skipped: Sequence[LeftOut]) -> str:
    """What to say when of so many bags no episode is left."""
    first = skipped[0]
    if all("episode" not in entry for entry in skipped):
        return f"data.bag_dir: {bag_dir}: all {bags} bags were skipped; the first: {first['why']}"
    why = f"{first['episode']}: {first['why']}" if "episode" in first else first["why"]
    return f"data.bag_dir: {bag_dir}: no episode is left of {bags} bags, {len(skipped)} were left out; the first: {why}"


def check_same_size(name: str, shapes: Shapes, first_name: str, first_shapes: Shapes) -> None:
    """An episode's images have the sizes of the first episode's, camera by camera: a batch holds images of one size.

    Raises:
        BagError: they have not.
    """
    for camera in shapes:
        if camera in first_shapes and shapes[camera] != first_shapes[camera]:
            raise BagError(
                f"{name}: images of {camera} are {height_by_width(shapes[camera])}, those of {first_name} are "
                f"{height_by_width(first_shapes[camera])} (HxW); set conventions.image_resize: [H, W] to bring all to "
                "one size"
            )


def mark_copy(episode: Episode, first_with: dict[str, str]) -> None:
    """Say in an episode's sync report which earlier bag holds the same recording; `first_with` gains what is new."""
    first = first_with.setdefault(episode.recording_hash, episode.bag)
    episode.sync_report["copy_of"] = "" if first == episode.bag else first


def divide(episodes: Sequence[Episode], held_out: Container[str]) -> tuple[list[Episode], list[Episode]]:
    """-> (training, validation): those whose names are in `held_out` are the latter; each in order."""
    return [e for e in episodes if e.name not in held_out], [e for e in episodes if e.name in held_out]


def split_episodes(
    episodes: Sequence[Episode], val_fraction: float, seed: int, hold_out: str = "bag"
) -> tuple[list[Episode], list[Episode]]:
    """Hold out whole recordings, or with `hold_out` "episode" whole episodes: -> (training, validation), each in order.

    Each recording has a number in [0, 1) that depends on the seed and on what was recorded alone, and is held out if
    that is below `val_fraction`. So recordings that are added later move none to the other side, and copies of the
    same one stay together: none leaks into validation. Of five or more recordings at least one is held out when
    `val_fraction` > 0 (the one with the lowest number), and one is always left to train on.

    Episodes that were cut from one recording are on one side, unless `hold_out` is "episode" or it is the only
    recording. Each then has a number of its own, by when in the recording it begins; of three or more episodes of the
    only recording at least one is held out. An episode without an action is never held out: it measures nothing.
    """

    def number(group: str) -> float:
        return int.from_bytes(hashlib.sha256(f"{seed} {group}".encode()).digest()[:7], "big") / 2**56

    group_of = {e.name: e.recording_hash or e.name for e in episodes}
    only_one = len(set(group_of.values())) == 1
    if only_one or hold_out == "episode":
        group_of = _groups_by_episode(episodes)
    groups = sorted({group_of[e.name] for e in episodes if e.has_action}, key=number)
    count = sum(number(group) < val_fraction for group in groups)
    if val_fraction > 0 and len(groups) >= (3 if only_one else 5):
        count = max(1, count)
    chosen = set(groups[: min(count, len(groups) - 1)])
    return divide(episodes, {name for name, group in group_of.items() if group in chosen})


def _groups_by_episode(episodes: Sequence[Episode]) -> dict[str, str]:
    """Episode name -> what is held out with it: itself, and what overlaps it in a copy that was cut differently."""
    group_of: dict[str, str] = {}
    latest: dict[str, tuple[str, int]] = {}  # recording -> (its latest group, until when that lasts)
    for episode in sorted(episodes, key=lambda e: int(e.time_ns[0])):
        recording = episode.recording_hash or episode.name
        group, until_ns = latest.get(recording, ("", -1))
        if episode.time_ns[0] > until_ns:
            group = recording + episode.name.removeprefix(episode.bag or episode.name)
        group_of[episode.name] = group
        latest[recording] = group, max(until_ns, int(episode.time_ns[-1]))
    return group_of
