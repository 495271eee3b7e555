"""Bags as a dataset that others train on: LeRobot's format v3.0.

    python -m rosbag_dataset export --format lerobot-v3 BAGS OUT                       # videos in H.264
    python -m rosbag_dataset export --format lerobot-v3 BAGS OUT --images              # pictures as they are, larger
    python -m rosbag_dataset export --format lerobot-v3 BAGS OUT --config my.yaml --task "pick the block"

Each segment of a recording, or of an episode of it, becomes an episode of the dataset: frames that were dropped lie in
none. Frames are those that a training has, from the same frame cache. Actions are positions ("absolute"), which is what
LeRobot's users expect, unless `--override conventions.action_mode=delta` says otherwise.

It can be stopped, and run again to go on. Until it is done OUT has no meta/info.json, without which nobody takes it for
a dataset; OUT/.export holds the plan and what is done of it.

Knows: the command line, what becomes an episode and lies in which file, what an interrupted run left.
Must not know: how a dataset is laid out (lerobot_v3.py).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import shutil
import signal
import sys
from collections.abc import Generator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .cache import save, whole
from .cutting import left_out_notes
from .decoding import available_cores, count, in_processes, start_worker
from .episodes import load_episodes
from .errors import NO_LOCKS, BagError, SetupError
from .inspection import CONFIG, check_settings, settings_of
from .settings import BagSettings
from .statistics import angle_references
from .synchronisation import Episode, refer_angles

if TYPE_CHECKING:
    from .lerobot_v3 import Dataset, Part

VERSION = 1  # of the plan: raise it when the same bags and settings give another dataset
WORK, JOB, LOCK = ".export", "job.json", "lock"
DONE = "meta/export.json"  # the job of a dataset that is whole: what it was made of
# A file is what one process writes at a time, and what a stop may cost. Not longer than this, because LeRobot compares
# times in float32, which from 1024 s on is coarser than its tolerance.
MAX_FILE_FRAMES, MIN_FILE_FRAMES, MAX_FILE_S = 5000, 500, 900.0
MAX_TABLE_BYTES = 200 << 20  # of pixels in a file that is a table of pictures


@dataclass(frozen=True)
class Segment:
    """Frames of an episode that become an episode of the dataset."""

    episode: int  # which of the episodes
    start: int
    stop: int
    task: str

    @property
    def frames(self) -> int:
        """How many."""
        return self.stop - self.start


def segments_of(episodes: Sequence[Episode], task: str) -> tuple[list[Segment], int]:
    """What becomes an episode of the dataset, in order.

    Args:
        episodes: from load_episodes().
        task: of those whose sidecar says none.

    Returns:
        (segments, each without the frames that have no action; how many segments have none at all, and are left out).
    """
    segments: list[Segment] = []
    without = 0
    for number, episode in enumerate(episodes):
        said = episode.sync_report.get("cut", {}).get("task", task)
        for start, stop in episode.segments.tolist():
            if start < stop - episode.ahead:
                segments.append(Segment(number, start, stop - episode.ahead, said))
            else:
                without += 1
    return segments, without


def divide_into_files(segments: Sequence[Segment], most: int) -> list[int]:
    """How many segments, in order, lie in each file: at most `most` frames, or one segment that is longer."""
    counts: list[int] = []
    frames = most
    for segment in segments:
        if frames + segment.frames > most:
            counts.append(0)
            frames = 0
        counts[-1] += 1
        frames += segment.frames
    return counts


def export(
    settings: BagSettings, out: Path, codec: str | None, task: str, workers: int = 0, progress: bool = True
) -> str:
    """Write the dataset, or go on with it.

    Args:
        settings: which bags, and how they are read.
        out: the dataset's folder: absent, empty, or begun by the same export.
        codec: one of lerobot_v3.ENCODERS; None: pictures.
        task: of episodes of which no sidecar says one.
        workers: processes; 0 is one per core.
        progress: show a progress bar.

    Returns:
        What to say at the end.

    Raises:
        BagError: bags that cannot be read, a folder that holds something else, a full disk; one line.
    """
    from . import lerobot_v3  # pyarrow and av, which nothing else here needs

    _check_out(out)
    episodes, left_out = load_episodes(settings, progress=progress)
    for note in left_out_notes(left_out):
        print(f"note: {note}", flush=True)
    references = angle_references(episodes)
    for episode in episodes:
        refer_angles(episode, references, settings)
    segments, without = segments_of(episodes, task)
    if not segments:
        raise BagError(
            f"{settings.bag_dir}: no episode has two frames in a row, so that there is no action; see "
            "data.max_offset_ms"
        )
    cameras = episodes[0].image_shape
    odd = [camera for camera, size in cameras.items() if codec and (size[0] % 2 or size[1] % 2)]
    if odd:
        height, width = cameras[odd[0]]
        raise BagError(
            f"images of {odd[0]} are {height}x{width} (HxW), and a video's height and width are even; give --images, "
            "or conventions.image_resize"
        )
    tasks = list(dict.fromkeys(segment.task for segment in segments))
    dataset = lerobot_v3.Dataset(
        out, settings.fps, codec, cameras, settings.state_names, settings.units,
        tuple(settings.acted.tolist()), settings.action_mode, tuple(tasks),
    )  # fmt: skip
    workers = workers or available_cores()
    with _begun(out, _job(dataset, episodes, segments, workers)) as job:
        if job is None:
            return f"{out} is whole already: an export of the same bags with the same settings"
        files = _parts(job["files"], segments, episodes, tasks)
        rows = _write_files(dataset, files, out / WORK, workers, progress)
        _save(out / DONE, job)
        lerobot_v3.write_meta(dataset, rows)
        shutil.rmtree(out / WORK, ignore_errors=True)
    return _end(dataset, episodes, segments, without, len(files))


def _end(dataset: Dataset, episodes: Sequence[Episode], segments: Sequence[Segment], without: int, files: int) -> str:
    """The last lines: what is there, and what is not."""
    frames, kept = sum(segment.frames for segment in segments), sum(len(e.time_ns) for e in episodes)
    dropped = sum(episode.sync_report["dropped"] for episode in episodes)
    lines = [
        f"{len(segments)} episodes, {frames} frames, in {files} files: {dataset.root}",
        f"  from {len(episodes)} episodes of the bags; {dropped} frames were dropped (see python -m rosbag_dataset), "
        f"and {kept - frames} left out that have no action",
        f"  actions are {_MEANING[dataset.action_mode]} (conventions.action_mode: {dataset.action_mode})",
    ]
    if without:
        lines.append(f"  {without} segments of a single frame have no action, and are left out")
    if "" in dataset.tasks:
        lines.append("  no task is said of some or all: --task TEXT, or `task` in episodes.yaml")
    return "\n".join(lines)


_MEANING = {"absolute": "the positions where the arm goes, as LeRobot's users expect", "delta": "changes per frame"}


# -- the folder, and what an interrupted run left in it -------------------------------------------------------------


def _check_out(out: Path) -> None:
    """Refuse, before an hour of decoding, a folder that holds something else. Raises SetupError."""
    if out.exists() and not out.is_dir():
        raise SetupError(f"{out}: expected a folder, found a file there; name another one")
    found = sorted(path.name for path in out.iterdir()) if out.exists() else []
    ours = any((out / name).exists() for name in (DONE, f"{WORK}/{JOB}")) or found == [WORK]
    if found and not ours:
        raise SetupError(
            f"{out}: expected an empty folder, or one that an export has begun, found {', '.join(found[:5])} in it; "
            "name another one"
        )


def _job(dataset: Dataset, episodes: Sequence[Episode], segments: Sequence[Segment], workers: int) -> dict[str, Any]:
    """What is to be done. All but "files" must be the same for a rerun to go on."""
    frames = sum(segment.frames for segment in segments)
    most = min(MAX_FILE_FRAMES, max(MIN_FILE_FRAMES, -(-frames // (2 * workers))), int(MAX_FILE_S * dataset.fps))
    if dataset.codec is None:
        most = min(most, max(1, MAX_TABLE_BYTES // sum(3 * h * w for h, w in dataset.cameras.values())))
    return {
        "version": VERSION,
        "format": "lerobot-v3",
        "pictures": dataset.codec or "images",
        "fps": dataset.fps,
        "cameras": {camera: list(size) for camera, size in dataset.cameras.items()},
        "states": list(dataset.names),
        "units": list(dataset.units),
        "acted": list(dataset.acted),
        "action_mode": dataset.action_mode,
        # Wherever they are read: a dataset that was begun with frames in the bags goes on with a copy.
        "frames decoded as": sorted({e.source.key if e.source else e.entry.name for e in episodes if e.entry}),
        "episodes": [
            {"name": episode.name, "content": episode.content_hash, "numbers": _hash(episode)} for episode in episodes
        ],
        "segments": [[s.episode, s.start, s.stop, s.task] for s in segments],
        "files": divide_into_files(segments, max(1, most)),
    }


def _hash(episode: Episode) -> str:
    """Of an episode's states and actions: the same bags with other settings may give others."""
    return hashlib.sha256(episode.state.tobytes() + episode.action.tobytes()).hexdigest()


@contextlib.contextmanager
def _begun(out: Path, job: dict[str, Any]) -> Generator[dict[str, Any] | None]:
    """While inside, nobody else exports into `out`; yields the job to go on with, None if it is done.

    Raises:
        SetupError: what was begun there is another job; another process is at it.
    """
    try:
        (out / WORK).mkdir(parents=True, exist_ok=True)
        with (out / WORK / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise SetupError(f"{out}: another export is writing there; wait for it, or name another") from None
            whole = (out / DONE).exists() and (out / "meta" / "info.json").exists()
            begun = out / (DONE if whole else f"{WORK}/{JOB}")
            was = _load(begun) if begun.exists() else None
            if whole:  # nothing of ours stays beside it
                shutil.rmtree(out / WORK, ignore_errors=True)
            if was is not None:
                changed = [key for key in job if key != "files" and was.get(key) != json.loads(json.dumps(job[key]))]
                if changed:
                    raise SetupError(
                        f"{out}: holds {'an' if whole else 'a part of an'} export of other bags or with other settings "
                        f"({', '.join(changed)}); name another folder, or remove this one"
                    )
            if whole:
                yield None
                return
            for leftover in out.rglob(".file-*"):  # of processes that were killed
                leftover.unlink(missing_ok=True)
            if was is None:
                _save(begun, job)
            yield was or job
    except OSError as error:
        raise SetupError(f"{error.filename or out}: {error.strerror or error}") from error


def _load(path: Path) -> Any:
    """Read what _save() wrote. Raises SetupError."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise SetupError(f"{path}: is damaged ({error}); remove the dataset's folder, and start again") from None


def _save(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    with whole(path) as partial:
        save(partial, json.dumps(content).encode())


# -- files, several at once -----------------------------------------------------------------------------------------


def _parts(
    counts: Sequence[int], segments: Sequence[Segment], episodes: Sequence[Episode], tasks: Sequence[str]
) -> list[list[Part]]:
    """For each file its parts."""
    from .lerobot_v3 import Part

    files: list[list[Part]] = []
    number = first_row = 0
    for count_ in counts:
        parts = []
        for segment in segments[number : number + count_]:
            task = tasks.index(segment.task)
            parts.append(Part(episodes[segment.episode], segment.start, segment.stop, number, first_row, task))
            number, first_row = number + 1, first_row + segment.frames
        files.append(parts)
    return files


def _write_files(
    dataset: Dataset, files: Sequence[Sequence[Part]], work: Path, workers: int, progress: bool
) -> list[dict[str, Any]]:
    """Write all files that are not there yet; -> the rows of meta/episodes, of all."""
    records = [work / f"{number:06d}.json" for number in range(len(files))]
    todo = [number for number, record in enumerate(records) if not record.exists()]
    cameras = len(dataset.cameras)
    done = sum(p.stop - p.start for n, parts in enumerate(files) if n not in todo for p in parts) * cameras
    total = sum(p.stop - p.start for parts in files for p in parts) * cameras
    if done:
        print(f"going on: {len(files) - len(todo)} of {len(files)} files are there", flush=True)

    def show(frames: int, _size: int) -> None:
        bar.update(done + frames - bar.n)

    def take(_task: tuple[int], error: BagError | None) -> bool:
        if error is not None:
            raise error
        return False

    with tqdm(
        total=total, initial=done, desc=f"writing {len(files)} files", unit="frame", disable=not progress,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    ) as bar:  # fmt: skip
        try:
            tasks = [(number,) for number in todo]
            in_processes(_write_one, tasks, workers, show, take, start=_start, shared=(dataset, files, records))
        except BrokenProcessPool:
            raise SetupError(
                "a process that writes the dataset was killed, most likely for want of memory; free some and run the "
                "same again: files that are finished stay"
            ) from None
    return [row for record in records for row in _load(record)]


_work: tuple[Any, ...] = ()  # of a process that writes: dataset, files, records


def _start(counters: Any, *work: Any) -> None:
    global _work
    _work = work
    start_worker(counters)


def _write_one(number: int) -> BagError | None:
    from .lerobot_v3 import write_file

    dataset, files, records = _work
    try:
        _save(records[number], write_file(dataset, number, files[number], count))
    except BagError as error:
        return type(error)(str(error))  # without its cause, which may not survive the trip between processes
    except OSError as error:
        return SetupError(f"{error.filename or dataset.root}: {error.strerror or error}")
    return None


# -- the command ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Entry of `python -m rosbag_dataset export`. Exit code 0; 1 with one line; 130 when it was stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m rosbag_dataset export", description="Write bags as a dataset for LeRobot."
    )
    parser.add_argument("--format", choices=["lerobot-v3"], required=True, help="of the dataset")
    parser.add_argument("bag_dir", type=Path, metavar="BAGS", help="folder that is searched for bags")
    parser.add_argument("out", type=Path, metavar="OUT", help="the dataset's folder; begun by an export, it goes on")
    parser.add_argument("--config", type=Path, help="a training config whose data and conventions sections to use")
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE", help="as train.py's; repeatable"
    )
    parser.add_argument("--task", default="", help="what the robot does, of episodes whose sidecar does not say it")
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument("--codec", choices=["h264", "av1"], default="h264", help="of the videos (default: h264)")
    pictures.add_argument("--images", action="store_true", help="keep pictures exactly (PNG), without videos")
    args = parser.parse_args(argv)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: one line, and run it again
    try:
        # Before what the user says: the trainer's default, delta, is not what LeRobot's users expect.
        overrides = ["conventions.action_mode=absolute", *args.override]
        settings, _ = settings_of(args.bag_dir, args.config, overrides)
        where = f"{args.config or CONFIG}{' with --override' * bool(args.override)}"
        check_settings(settings, where)
        for wrong, key, found, expected in (
            (settings.action_mode == "relative", "conventions.action_mode", "relative", "absolute or delta: relative "
             "actions depend on where a chunk begins, and a dataset has one action a frame"),
            (settings.apply_joint_sign, "conventions.apply_joint_sign", "true", "false: a dataset has the robot's own "
             "signs"),
        ):  # fmt: skip
            if wrong:
                raise SetupError(f"{where}: {key}: found {found}, expected {expected}")
        print(export(settings, args.out, None if args.images else args.codec, args.task))
        return 0
    except BagError as error:
        print(f"error: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        print(
            f"error: {error.name} is not installed, which the export needs: uv pip install pyarrow av", file=sys.stderr
        )
    except KeyboardInterrupt:
        print(f"\nstopped; run the same again to go on in {args.out}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 1
