"""Episodes as a LeRobot dataset, format v3.0, without lerobot: pyarrow writes the tables and av the videos.

    meta/info.json                 fps, features (with units, and what actions are); written last
    meta/stats.json                of all frames
    meta/tasks.parquet             each task's text and number
    meta/episodes/...              of each episode where it lies, its length, its task, its statistics, its recording
    data/chunk-000/file-000.parquet                                rows of several episodes, one row group each
    videos/observation.images.CAMERA/chunk-000/file-000.mp4        the frames of the same episodes

A dataset's file N is a table and a video per camera of the same episodes; they are made together, and by themselves.

Knows: this layout, LeRobot's statistics, codecs.
Must not know: the command line, settings, which episodes there are, what was interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .cache import whole
from .errors import DISK_FULL, SetupError
from .samples import open_pixels
from .settings import action_unit
from .synchronisation import Episode

ROBOT_TYPE = "ur10e"
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH, VIDEO_PATH = f"data/{FILE}.parquet", "videos/{video_key}/" + FILE + ".mp4"
FILES_PER_CHUNK = 1000  # this and the two sizes are LeRobot's own, for those who append to the dataset
DATA_MB, VIDEO_MB = 100, 200
# name -> (ffmpeg's encoder, its options). A key frame every other frame, as LeRobot has it: training seeks to frames at
# random. No B frames, behind which LeRobot's seek may land. One thread: files are what is made in parallel.
ENCODERS = {
    "av1": ("libsvtav1", {"g": "2", "crf": "30", "preset": "12", "svtav1-params": "lp=1"}),
    "h264": ("libx264", {"g": "2", "crf": "23", "preset": "veryfast", "bf": "0", "threads": "1"}),
}
pa.array(np.zeros(0))  # the first one loads pandas, where that is installed: once, and not in each process that writes
MAX_ROW_GROUP_BYTES = 256 << 20  # of pictures in a table: what is kept in memory until it is written
# LeRobot's RunningQuantileStats and sampling of pictures.
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
BINS, BIN_MARGIN = 5000, 1e-10
LEAST_SAMPLES, MOST_SAMPLES, SAMPLES_POWER = 100, 10_000, 0.75
LARGE_PIXELS, SMALL_PIXELS = 300, 150  # pictures from the first on are thinned out for statistics, to about the second

Stats = dict[str, dict[str, np.ndarray]]  # feature -> min, max, mean, std, count and quantiles -> an array


@dataclass(frozen=True)
class Dataset:
    """What all files of a dataset share.

    Attributes:
        root: its folder.
        fps: frames per second.
        codec: one of ENCODERS, or None for pictures (PNG) in the tables.
        cameras: camera -> (H, W).
        names: of the S states.
        units: of the S states, "" where nobody has said.
        acted: which of the states are in the action, A of them.
        action_mode: "absolute" (where an action leads) or "delta" (how far from the frame's state).
        tasks: their texts; a number of a task is its place here.
    """

    root: Path
    fps: float
    codec: str | None
    cameras: dict[str, tuple[int, int]]
    names: tuple[str, ...]
    units: tuple[str, ...]
    acted: tuple[int, ...]
    action_mode: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """The frames start <= t < stop of an episode of ours, all with an action: an episode of the dataset."""

    episode: Episode
    start: int
    stop: int
    number: int  # of the dataset's episode
    first_row: int  # number of its first frame in the dataset
    task: int  # number of its task


# -- a file: a table, and a video per camera ------------------------------------------------------------------------


def write_file(
    dataset: Dataset, number: int, parts: Sequence[Part], count: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """Write file `number` of the dataset, whole or not at all.

    Args:
        dataset: where, and what all its files share.
        number: of the file, from 0 on.
        parts: the episodes in it, in order.
        count: called as count(frames, bytes of pixels) for progress.

    Returns:
        A row of meta/episodes for each part, with numbers, texts and lists.

    Raises:
        SetupError: a full disk, pictures that the codec cannot have.
    """
    chunk, file = divmod(number, FILES_PER_CHUNK)
    place = {"chunk_index": chunk, "file_index": file}
    rows, stats = [], []
    first_s = 0.0
    for part in parts:
        length = part.stop - part.start
        to_s = first_s + length / dataset.fps
        row: dict[str, Any] = {
            "episode_index": part.number, "tasks": [dataset.tasks[part.task]], "length": length,
            "dataset_from_index": part.first_row, "dataset_to_index": part.first_row + length,
            "source/bag": part.episode.bag, "source/recording": part.episode.recording_hash,
            "source/episode": part.episode.name, "source/first_frame": part.start,
        }  # fmt: skip
        row |= {f"data/{name}": value for name, value in place.items()}
        if dataset.codec:
            for camera in dataset.cameras:
                where = {**place, "from_timestamp": first_s, "to_timestamp": to_s}
                row |= {f"videos/{IMAGES}{camera}/{name}": value for name, value in where.items()}
        rows.append(row)
        stats.append({key: vector_stats(column) for key, column in _columns(dataset, part).items()})
        first_s = to_s
    try:
        if dataset.codec:
            for camera in dataset.cameras:
                path = dataset.root / VIDEO_PATH.format(video_key=IMAGES + camera, **place)
                with whole(path) as partial:
                    seen = _write_video(dataset, camera, partial, parts, count)
                for of_part, levels in zip(stats, seen, strict=True):
                    of_part[IMAGES + camera] = levels
        with whole(dataset.root / DATA_PATH.format(**place)) as partial:
            seen = _write_table(dataset, partial, parts, count)
        for of_part, levels in zip(stats, seen, strict=True):
            of_part |= levels
    except (av.FFmpegError, pa.ArrowException, OSError) as error:
        reason = f"{getattr(error, 'strerror', None) or error}"
        if getattr(error, "errno", None) in DISK_FULL:
            raise SetupError(f"{dataset.root}: the disk is full; free some space, and run the same again") from error
        raise SetupError(f"{dataset.root}: file {number} of the dataset cannot be written ({reason})") from error
    for row, of_part in zip(rows, stats, strict=True):
        for feature, values in of_part.items():
            row |= {f"stats/{feature}/{name}": value.tolist() for name, value in values.items()}
    return rows


def _columns(dataset: Dataset, part: Part) -> dict[str, np.ndarray]:
    """A part's columns but for pictures: (n, S) and (n, A) float32, and (n,) of LeRobot's own."""
    length = part.stop - part.start
    frame = np.arange(length)
    return {
        STATE: part.episode.states(slice(part.start, part.stop)).astype(np.float32),
        ACTION: part.episode.first_actions(part.start, part.stop).astype(np.float32),
        "timestamp": (frame / dataset.fps).astype(np.float32),
        "frame_index": frame,
        "episode_index": np.full(length, part.number),
        "index": part.first_row + frame,
        "task_index": np.full(length, part.task),
    }


def _pictures(part: Part, camera: str, count: Callable[[int, int], None]) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 of each of a part's frames, from the frame cache."""
    stored, index = open_pixels(part.episode, camera), part.episode.image_index[camera]
    for t in range(part.start, part.stop):
        picture = np.ascontiguousarray(stored[index[t]])
        yield picture
        count(1, picture.nbytes)


def _write_video(
    dataset: Dataset, camera: str, path: Path, parts: Sequence[Part], count: Callable[[int, int], None]
) -> list[dict[str, np.ndarray]]:
    """One video of all parts; -> each part's statistics of pixels."""
    assert dataset.codec is not None
    encoder, options = ENCODERS[dataset.codec]
    rate = Fraction(dataset.fps).limit_denominator(10**6)
    stats: list[dict[str, np.ndarray]] = []
    # The encoder of AV1 writes a page about itself for each file, unless it is told not to before it is loaded.
    os.environ.setdefault("SVT_LOG", "1")
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as target:
        stream: Any = target.add_stream(encoder, rate, options=options)
        stream.height, stream.width = dataset.cameras[camera]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", 1 / rate
        shown = 0
        for part in parts:
            levels = _Levels(part.stop - part.start)
            for picture in _pictures(part, camera, count):
                levels.see(picture)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = shown, 1 / rate
                target.mux(stream.encode(frame))
                shown += 1
            stats.append(levels.stats())
        target.mux(stream.encode())
    return stats


def _write_table(dataset: Dataset, path: Path, parts: Sequence[Part], count: Callable[[int, int], None]) -> list[Stats]:
    """The table of all parts, with the pictures if there are no videos; -> each part's statistics of these."""
    stats: list[Stats] = []
    with pq.ParquetWriter(path, _schema(dataset), compression="snappy") as writer:
        for part in parts:
            columns = {key: _arrow(values) for key, values in _columns(dataset, part).items()}
            if dataset.codec:
                writer.write_table(pa.table(columns, schema=writer.schema))
                stats.append({})
                continue
            seen = {camera: _Levels(part.stop - part.start) for camera in dataset.cameras}
            streams = {camera: _pictures(part, camera, count) for camera in dataset.cameras}
            encoded: dict[str, list[bytes]] = {camera: [] for camera in dataset.cameras}
            first, size = 0, 0
            for t in range(part.stop - part.start):
                for camera, stream in streams.items():
                    picture = next(stream)
                    seen[camera].see(picture)
                    encoded[camera].append(cv2.imencode(".png", picture[..., ::-1])[1].tobytes())
                    size += len(encoded[camera][-1])
                if size > MAX_ROW_GROUP_BYTES or t + 1 == part.stop - part.start:
                    group = {key: values.slice(first, t + 1 - first) for key, values in columns.items()}
                    for camera, pictures in encoded.items():
                        group[IMAGES + camera] = pa.array([{"bytes": data, "path": None} for data in pictures], PICTURE)
                        pictures.clear()
                    writer.write_table(pa.table(group, schema=writer.schema))
                    first, size = t + 1, 0
            for stream in streams.values():
                next(stream, None)  # counts the last picture
            stats.append({IMAGES + camera: levels.stats() for camera, levels in seen.items()})
    return stats


PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as the package datasets stores an Image
_ROW_TYPES = {
    "timestamp": pa.float32(),
    **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), pa.int64()),
}


def _schema(dataset: Dataset) -> pa.Schema:
    vectors = {STATE: len(dataset.names), ACTION: len(dataset.acted)}
    types: dict[str, Any] = {
        key: pa.list_(pa.float32(), size) if size > 1 else pa.float32() for key, size in vectors.items()
    }
    if not dataset.codec:
        types |= {IMAGES + camera: PICTURE for camera in dataset.cameras}
    return pa.schema(list((types | _ROW_TYPES).items()))


def _arrow(values: np.ndarray) -> pa.Array:
    """(n,) or (n, k): a column. LeRobot keeps a vector of one number as that number."""
    flat = pa.array(np.ascontiguousarray(values).ravel())
    return (
        flat if values.ndim == 1 or values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    )


# -- statistics, as LeRobot computes them ---------------------------------------------------------------------------


def vector_stats(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Of (n, k) or (n,) numbers, (k,) or (1,) each: min, max, mean, std, quantiles; and count, (1,)."""
    columns = rows.reshape(len(rows), -1).astype(np.float64)
    each = [_weighted_stats(column, np.ones(len(columns))) for column in columns.T]
    stats = {name: np.array([of_column[name] for of_column in each]) for name in each[0]}
    return stats | {"count": np.array([len(rows)])}


def _weighted_stats(values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Of (n,) numbers that are there (n,) times each. A quantile is that of a histogram, interpolated in its bin."""
    total = weights.sum()
    mean = float((values * weights).sum() / total)
    low, high = float(values[weights > 0].min()), float(values[weights > 0].max())
    std = float(np.sqrt((((values - mean) ** 2) * weights).sum() / total))
    stats = {"min": low, "max": high, "mean": mean, "std": std}
    if total < 2:
        return stats | dict.fromkeys(QUANTILES, mean)
    edges = np.linspace(low - BIN_MARGIN, high + BIN_MARGIN, BINS + 1)
    inside, _ = np.histogram(values, edges, weights=weights)
    reached = np.cumsum(inside)
    for name, share in QUANTILES.items():
        bin_ = int(np.searchsorted(reached, share * total))
        if bin_ == 0:
            stats[name] = float(edges[0])
        elif bin_ >= BINS:
            stats[name] = float(edges[-1])
        else:
            fraction = (share * total - reached[bin_ - 1]) / inside[bin_]
            stats[name] = float(edges[bin_] + fraction * (edges[bin_ + 1] - edges[bin_]))
    return stats


class _Levels:
    """How often each level of each colour is in a part's pictures: those of some frames, thinned out if large."""

    def __init__(self, length: int) -> None:
        samples = max(min(length, LEAST_SAMPLES), min(int(length**SAMPLES_POWER), MOST_SAMPLES))
        self._wanted = np.bincount(np.round(np.linspace(0, length - 1, samples)).astype(int), minlength=length)
        self._samples = samples
        self._t = 0
        self._counts = np.zeros((3, 256))

    def see(self, picture: np.ndarray) -> None:
        """The next frame's picture, (H, W, 3) uint8."""
        times = self._wanted[self._t]
        self._t += 1
        if not times:
            return
        height, width = picture.shape[:2]
        if max(height, width) >= LARGE_PIXELS:
            step = int((width if width > height else height) / SMALL_PIXELS)
            picture = picture[::step, ::step]
        for colour in range(3):
            self._counts[colour] += times * np.bincount(picture[..., colour].ravel(), minlength=256)

    def stats(self) -> dict[str, np.ndarray]:
        """As vector_stats(), (3, 1, 1) each, in [0, 1]; count is the number of pictures."""
        each = [_weighted_stats(np.arange(256.0), counts) for counts in self._counts]
        stats = {name: np.array([of[name] for of in each]).reshape(3, 1, 1) / 255 for name in each[0]}
        return stats | {"count": np.array([self._samples])}


def _merged(stats: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One feature's statistics over several episodes. LeRobot averages quantiles, too."""
    counts = np.array([of["count"][0] for of in stats], np.float64)
    weights = (counts / counts.sum()).reshape(-1, *[1] * stats[0]["mean"].ndim)
    mean = (weights * [of["mean"] for of in stats]).sum(axis=0)
    variance = (weights * [of["std"] ** 2 + (of["mean"] - mean) ** 2 for of in stats]).sum(axis=0)
    merged = {name: (weights * [of[name] for of in stats]).sum(axis=0) for name in QUANTILES}
    merged |= {"min": np.min([of["min"] for of in stats], axis=0), "max": np.max([of["max"] for of in stats], axis=0)}
    return merged | {"mean": mean, "std": np.sqrt(variance), "count": np.array([int(counts.sum())])}


# -- what is written at the end -------------------------------------------------------------------------------------


def write_meta(dataset: Dataset, rows: Sequence[dict[str, Any]]) -> None:
    """Write meta/: from then on the folder is a dataset. `rows` are those of write_file() of all files, in order."""
    meta = dataset.root / "meta"
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {f"meta/episodes/{name}_index": [0] * len(rows) for name in ("chunk", "file")}
    stats: dict[str, dict[str, Any]] = {}
    for feature in dict.fromkeys(name.split("/")[1] for name in rows[0] if name.startswith("stats/")):
        names = [name.split("/")[2] for name in rows[0] if name.startswith(f"stats/{feature}/")]
        of_episodes = [{name: np.array(row[f"stats/{feature}/{name}"]) for name in names} for row in rows]
        stats[feature] = {name: value.tolist() for name, value in _merged(of_episodes).items()}
    with whole(meta / "episodes" / f"{FILE.format(chunk_index=0, file_index=0)}.parquet") as partial:
        pq.write_table(pa.table(columns), partial)
    with whole(meta / "tasks.parquet") as partial:
        pq.write_table(_tasks(dataset.tasks), partial)
    _write_json(meta / "stats.json", stats)
    frames = sum(row["length"] for row in rows)
    _write_json(meta / "info.json", _info(dataset, len(rows), frames))


def _write_json(path: Path, content: Any) -> None:
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=4) + "\n")


def _tasks(tasks: Sequence[str]) -> pa.Table:
    """As pandas writes a table of numbers whose index are the tasks' texts: LeRobot looks tasks up by that index."""
    table = pa.table({"task_index": np.arange(len(tasks)), "task": list(tasks)})
    column = {"metadata": None, "field_name": None}
    pandas = {
        "index_columns": ["task"], "column_indexes": [], "pandas_version": "2.0.0",
        "columns": [
            column | {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
            column | {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object"},
        ],
    }  # fmt: skip
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _info(dataset: Dataset, episodes: int, frames: int) -> dict[str, Any]:
    fps = int(dataset.fps) if dataset.fps == int(dataset.fps) else dataset.fps
    acted = list(dataset.acted)
    # units and action_mode are ours; LeRobot passes over what it does not know in a feature.
    features: dict[str, dict[str, Any]] = {
        STATE: {"dtype": "float32", "shape": [len(dataset.names)], "names": list(dataset.names),
                "units": list(dataset.units)},
        ACTION: {"dtype": "float32", "shape": [len(acted)], "names": [dataset.names[i] for i in acted],
                 "units": [action_unit(dataset.units[i], dataset.action_mode) for i in acted],
                 "action_mode": dataset.action_mode},
    }  # fmt: skip
    for camera, (height, width) in dataset.cameras.items():
        features[IMAGES + camera] = {
            "dtype": "video" if dataset.codec else "image",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
        }
        if dataset.codec:
            features[IMAGES + camera]["info"] = {
                "video.height": height, "video.width": width, "video.codec": dataset.codec,
                "video.pix_fmt": "yuv420p", "video.is_depth_map": False, "video.fps": fps, "video.channels": 3,
                "has_audio": False,
            }  # fmt: skip
    for key, kind in _ROW_TYPES.items():
        features[key] = {"dtype": "float32" if kind == pa.float32() else "int64", "shape": [1], "names": None}
    return {
        "codebase_version": "v3.0",
        "robot_type": ROBOT_TYPE,
        "total_episodes": episodes,
        "total_frames": frames,
        "total_tasks": len(dataset.tasks),
        "chunks_size": FILES_PER_CHUNK,
        "data_files_size_in_mb": DATA_MB,
        "video_files_size_in_mb": VIDEO_MB,
        "fps": fps,
        "splits": {"train": f"0:{episodes}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if dataset.codec else None,
        "features": features,
    }
