"""LeRobot datasets, format v3.0, without lerobot: pyarrow reads the tables and av the videos.

    meta/info.json                 fps, features, and the templates of the paths below
    meta/episodes/**/*.parquet     where each episode lies: its data file, and per camera its video file and times
    data/...                       the rows of many episodes per file: state, action, timestamp (images: pixels too)
    videos/...                     many episodes per file; a row's frame is at the episode's from_timestamp + timestamp

Frames are those that LeRobot's own LeRobotDataset returns with its pyav decoder, bit for bit; the tests compare with
the real 0.4.4. What that library would read in silence and differently from what info.json says is refused here.

A dataset may come from somebody else (docs/trust.md): the paths that it names stay below its folder, and pictures are
not decoded before their size is known to be the declared one.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Generator, Iterable, Iterator
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import av
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from av.video.reformatter import VideoReformatter

from rosbag_dataset import MAX_PIXELS

from .frames import AbsentVideo, EpisodeData, Frame, SourceError, frame_range

STATE, ACTION, IMAGE_PREFIX = "observation.state", "action", "observation.images."
ALIASES = {STATE: ("state", "observation.states", "observation.qpos", "qpos"), ACTION: ("actions",)}
RECORDED = ["source/bag", "source/recording"]  # columns of meta/episodes that rosbag_dataset/lerobot_v3.py writes
# LeRobot's own default: a frame this far from the time asked for counts as that frame.
TOLERANCE_S = 1e-4
# Rows per read of a parquet file that holds pixels. What bounds the memory is the file's pages, though: parquet's
# writers put at least 1024 rows in one, however large.
IMAGE_ROWS = 4
# What LeRobot's recorders write. PIL and ffmpeg know many more formats, some of which run programs (EPS) or open other
# files and addresses (playlists).
PICTURES = ("PNG", "JPEG")
ONLY_THIS_FILE = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi", "protocol_whitelist": "file"}
# Where LeRobot 0.4 and 0.6 have their converter of older datasets.
CONVERTERS = ("lerobot.datasets.v30.convert_dataset_v21_to_v30", "lerobot.scripts.convert_dataset_v21_to_v30")


class LeRobotDatasetSource:
    """A LeRobot v3.0 dataset on disk as an EpisodeSource (see deploy/ur10e_deploy/sources.py for the methods).

    Files are opened when an episode in them is asked for, so that a partly downloaded dataset serves the episodes
    that it has. LeRobot's datasets do not say whether their actions are deltas or positions: `action_mode` is None.
    Those that `python -m rosbag_dataset export` made do, and also have units, and of each episode the recording.

    Attributes (besides those of an EpisodeSource):
        action_names: names of the action's numbers, or None.
        units: of the states, "" where unknown, or None.
        sizes: how many numbers a "state" and an "action" have.

    Args:
        root: the folder that holds meta/, data/ and videos/.

    Raises:
        SourceError: not a v3.0 dataset, or its metadata contradict each other.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._info_file = self.root / "meta" / "info.json"
        self.notes: list[str] = []
        self._fingerprints: dict[Path, str] = {}
        self._info = self._read_info()
        self._check_version()
        self._features = self._read_features()
        self.fps = self._positive("fps")
        mode = self._features[ACTION].get("action_mode")  # of our own exports
        self.action_mode: str | None = mode if mode in ("absolute", "delta") else None
        self.resized = False
        self.joint_names, self.action_names = self._names(STATE), self._names(ACTION)
        self.units = self._units()
        self.sizes = {"state": self._features[STATE]["shape"][0], "action": self._features[ACTION]["shape"][0]}
        self.cameras = self._cameras()
        self._episodes = self._read_episodes()
        self._check_counts()

    # -- metadata -------------------------------------------------------------------------------------------------

    def _read_info(self) -> dict[str, Any]:
        if not self.root.is_dir():
            found = "a file" if self.root.exists() else "nothing"
            raise SourceError(f"{self.root}: expected the folder of a LeRobot dataset, found {found} there")
        if not self._info_file.exists():
            found = ", ".join(sorted(p.name for p in self.root.iterdir())[:8]) or "nothing"
            raise SourceError(
                f"{self.root}: expected a LeRobot dataset with meta/info.json, found {found}; give the folder that "
                "holds meta/, data/ and videos/"
            )
        try:
            info = json.loads(self._info_file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise SourceError(f"{self._info_file}: cannot be read as JSON ({error}); copy the dataset again") from None
        if not isinstance(info, dict):
            raise SourceError(f"{self._info_file}: expected a JSON object, found {type(info).__name__}")
        return info

    def _check_version(self) -> None:
        version = self._info.get("codebase_version")
        meta, folder = self.root / "meta", self.root.resolve()
        joined = (meta / "episodes").is_dir() or "{file_index" in str(self._info.get("data_path"))
        if not isinstance(version, str) or not version.startswith("v3."):
            if joined:
                raise SourceError(
                    f"{self._info_file}: codebase_version is {version!r}, but the files are laid out as v3.0 "
                    "(meta/episodes/, several episodes per file); if they are, set codebase_version to 'v3.0'"
                )
            raise SourceError(
                f"{self._info_file}: codebase_version is {version!r}, expected 'v3.0'; LeRobot 0.4 converts v2.1 in "
                f"place and keeps the old: {_conversion(folder)}"
            )
        if not joined:
            raise SourceError(
                f"{self._info_file}: codebase_version is {version!r}, but meta/episodes/ is absent"
                + (" and meta/episodes.jsonl is there, as in v2.1" if (meta / "episodes.jsonl").exists() else "")
                + f"; copy the dataset again, or set codebase_version to 'v2.1' and convert it: {_conversion(folder)}"
            )
        if version != "v3.0":
            self.notes.append(f"{self._info_file}: codebase_version is {version}; read as v3.0")

    def _read_features(self) -> dict[str, dict[str, Any]]:
        features = self._info.get("features")
        if not isinstance(features, dict) or not all(
            isinstance(f, dict)
            and isinstance(f.get("dtype"), str)
            and isinstance(f.get("shape"), list)
            and all(isinstance(size, int) and size > 0 for size in f["shape"])
            for f in features.values()
        ):
            raise SourceError(f"{self._info_file}: features: expected {{name: {{dtype, shape: [sizes], names}}}}")
        missing = []
        for key in (STATE, ACTION):
            if key not in features:
                near = [k for k in features if k in ALIASES[key]] or difflib.get_close_matches(key, features, 1, 0.8)
                missing.append(f"{key!r}" + (f" ({near[0]!r} looks like it)" if near else ""))
            elif len(features[key]["shape"]) != 1:
                raise SourceError(f"{self._info_file}: {key}: shape is {features[key]['shape']}, expected [joints]")
        visual = [k for k, f in features.items() if f["dtype"] in ("video", "image")]
        if not any(k.startswith(IMAGE_PREFIX) for k in visual):
            near = visual or [k for k in features if "image" in k]
            missing.append(f"'{IMAGE_PREFIX}<camera>'" + (f" ({near[0]!r} looks like it)" if near else ""))
        if missing:
            raise SourceError(
                f"{self._info_file}: no feature {', no '.join(missing)}; found {', '.join(features)}; the evaluation "
                "needs states, recorded actions and images: rename features in meta/ and columns in data/ alike, or "
                "record them"
            )
        return features

    def _positive(self, key: str) -> float:
        value = self._info.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise SourceError(f"{self._info_file}: {key} is {value!r}, expected a positive number")
        return float(value)

    def _names(self, key: str) -> list[str] | None:
        names = self._features[key].get("names")
        if isinstance(names, dict) and len(names) == 1:  # {"motors": [...]}
            (names,) = names.values()
        size = self._features[key]["shape"][0]
        return [str(n) for n in names] if isinstance(names, list) and len(names) == size else None

    def _units(self) -> list[str] | None:
        units = self._features[STATE].get("units")
        size = self._features[STATE]["shape"][0]
        return [str(u) for u in units] if isinstance(units, list) and len(units) == size else None

    def _cameras(self) -> dict[str, tuple[int, int]]:
        cameras = {}
        for key, feature in self._features.items():
            if feature["dtype"] not in ("video", "image"):
                continue
            shape, names = feature["shape"], feature.get("names")
            channels_first = isinstance(names, list) and names[:1] in (["channels"], ["channel"], ["c"])
            if len(shape) == 3 and (channels_first or (shape[0] == 3 and shape[2] != 3)):
                shape = [*shape[1:], shape[0]]
            if not key.startswith(IMAGE_PREFIX):
                self.notes.append(f"{key} is not read: its name does not begin with {IMAGE_PREFIX}")
            elif len(shape) != 3 or shape[2] != 3:
                self.notes.append(f"{key} is not read: its shape is {feature['shape']}, not that of a colour image")
            elif shape[0] * shape[1] > MAX_PIXELS:
                raise SourceError(
                    f"{self._info_file}: {key}: shape is {feature['shape']}, expected at most {MAX_PIXELS} pixels"
                )
            else:
                cameras[key.removeprefix(IMAGE_PREFIX)] = (int(shape[0]), int(shape[1]))
        if not cameras:
            raise SourceError(f"{self._info_file}: no camera with colour images; {'; '.join(self.notes)}")
        return cameras

    def _is_video(self, camera: str) -> bool:
        return self._features[IMAGE_PREFIX + camera]["dtype"] == "video"

    def _read_episodes(self) -> dict[int, dict[str, Any]]:
        """Each episode's row of meta/episodes, by episode index, without the statistics."""
        meta = self.root / "meta"
        files = sorted([*meta.glob("episodes/**/*.parquet"), *meta.glob("episodes.parquet")])
        if not files:
            raise SourceError(f"{meta}: no episodes/*/*.parquet in it; copy the dataset again")
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        for camera in self.cameras:
            if self._is_video(camera):
                videos = f"videos/{IMAGE_PREFIX}{camera}/"
                columns += [videos + name for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
        episodes: dict[int, dict[str, Any]] = {}
        self._recorded: dict[int, tuple[str, str]] = {}  # of our own exports: name and hash of an episode's recording
        listed_in: dict[int, Path] = {}
        for file in files:
            with _reading(file):
                with pq.ParquetFile(file) as parquet:
                    _check_columns(file, parquet, columns)
                    rows = parquet.read(columns).to_pylist()
                    recorded = RECORDED if set(RECORDED) <= set(parquet.schema_arrow.names) else []
                    sources = parquet.read(recorded).to_pylist() if recorded else []
            for row, source in itertools.zip_longest(rows, sources):
                _check_row(file, row)
                if source is not None:
                    self._recorded[row["episode_index"]] = (str(source[RECORDED[0]]), str(source[RECORDED[1]]))
                index = row["episode_index"]
                if index in listed_in:
                    where = " and in ".join(str(f.relative_to(self.root)) for f in (listed_in[index], file))
                    raise SourceError(
                        f"{self.root}: episode {index} is listed in {where}; delete the file that does not belong there"
                    )
                listed_in[index], episodes[index] = file, row
        self._episode_files = files
        return dict(sorted(episodes.items()))

    def _check_counts(self) -> None:
        """info.json, the episodes' lengths and the data files' rows agree (those files that are there)."""
        frames = sum(row["length"] for row in self._episodes.values())
        for key, found in (("total_episodes", len(self._episodes)), ("total_frames", frames)):
            if self._info.get(key) != found:
                raise SourceError(
                    f"{self._info_file}: {key} is {self._info.get(key)!r}, but meta/episodes lists {found}; the "
                    "recording was not finished with finalize(), or files of two datasets are mixed: copy it again"
                )
        expected: dict[Path, int] = {}
        for row in self._episodes.values():
            file = self._data_file(row)
            expected[file] = expected.get(file, 0) + row["length"]
        for file, rows in expected.items():
            if not file.exists():
                continue
            with _reading(file):
                found = pq.read_metadata(file).num_rows
            if found != rows:
                raise SourceError(
                    f"{file}: has {found} rows, but meta/episodes places {rows} frames in it, and info.json counts "
                    f"{frames} in all; the recording was not finished with finalize(), or files of two datasets are "
                    "mixed: copy it again"
                )

    def _path(self, template: str, **fields: Any) -> Path:
        """A path from one of info.json's templates."""
        text: Any = self._info.get(template)  # whatever the file holds
        field = "|".join(fields)
        if not isinstance(text, str) or not re.fullmatch(rf"([^{{}}]|\{{({field})(:0\d?d)?\}})*", text):
            expected = ", ".join("{" + name + "}" for name in fields)
            raise SourceError(
                f"{self._info_file}: {template} is {text!r}, expected a path with {expected}, as v3.0 has"
            )
        return self._inside(f"{self._info_file}: {template}", text.format(**fields))

    def _inside(self, where: str, text: str) -> Path:
        """A path that the dataset names, below its folder.

        By its letters: links are followed, because in Hugging Face's cache every file is one that leads elsewhere.
        """
        if PurePath(text).is_absolute() or ".." in PurePath(text).parts:
            raise SourceError(f"{where}: names {text!r}, expected a path below the dataset's folder, {self.root}")
        return self.root / text

    def _data_file(self, row: dict[str, Any]) -> Path:
        return self._path("data_path", chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])

    def _video_file(self, row: dict[str, Any], camera: str) -> Path:
        key = IMAGE_PREFIX + camera
        chunk, file = row[f"videos/{key}/chunk_index"], row[f"videos/{key}/file_index"]
        return self._path("video_path", video_key=key, chunk_index=chunk, file_index=file)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What was evaluated; `sha256` covers the name, the size and both ends of every file that is there."""
        files = {self._info_file, *self._episode_files}
        for row in self._episodes.values():
            files.add(self._data_file(row))
            files.update(self._video_file(row, camera) for camera in self.cameras if self._is_video(camera))
        with _reading(self.root):
            sha256 = _fingerprint(self.root, (file for file in files if file.exists()))
        return {
            "path": str(self.root),
            "kind": "lerobot",
            "version": self._info["codebase_version"],
            "episodes": len(self._episodes),
            "frames": self._info["total_frames"],
            "sha256": sha256,
        }

    # -- episodes -------------------------------------------------------------------------------------------------

    def length(self, index: int) -> int:
        """How many frames an episode has. Raises SourceError when there is no such episode."""
        return self._row(index)["length"]

    def recorded(self, index: int) -> tuple[str, str] | None:
        """(name, hash) of the recording that an episode is from or a part of; None where nobody says."""
        return self._recorded.get(index)

    def content_hash(self, index: int) -> str:
        """SHA-256 of an episode, in hex: its rows, and of each file with its pictures the size and both ends.

        Raises:
            SourceError: as episode().
        """
        data, row = self.episode(index), self._row(index)
        digest = hashlib.sha256()
        for part in (data.state_rad, data.action, data.timestamp_s):
            digest.update(f"{part.shape} ".encode() + np.ascontiguousarray(part).tobytes())
        for camera in self.cameras:
            video = self._is_video(camera)
            file = self._video_file(row, camera) if video else self._data_file(row)
            if file not in self._fingerprints:
                with _reading(file):
                    self._fingerprints[file] = _fingerprint(self.root, [file])
            begins = row[f"videos/{IMAGE_PREFIX}{camera}/from_timestamp"] if video else ""
            digest.update(f"{camera} {self._fingerprints[file]} {begins} ".encode())
        return digest.hexdigest()

    def episode_indices(self) -> list[int]:
        """Numbers of all episodes that meta/episodes lists, ascending, whether their files are there or not."""
        return list(self._episodes)

    def episode_name(self, index: int) -> str:
        """The name "episode_000003" of an episode. Raises SourceError when there is no such episode."""
        self._row(index)
        return f"episode_{index:06d}"

    def _row(self, index: int) -> dict[str, Any]:
        if index not in self._episodes:
            known = list(self._episodes)
            span = f"{known[0]} to {known[-1]}" if known else "none"
            raise SourceError(f"{self.root}: no episode {index}; the dataset has {len(known)} ({span})")
        return self._episodes[index]

    def episode(self, index: int) -> EpisodeData:
        """States, actions and times of an episode, from its rows; opens its videos, but decodes no picture.

        Raises:
            SourceError: there is no such episode, a file of it is absent or damaged, or its numbers contradict
                info.json.
        """
        name, row = self.episode_name(index), self._row(index)
        file = self._data_file(row)
        columns = [STATE, ACTION, "timestamp", "frame_index"]
        images = [IMAGE_PREFIX + camera for camera in self.cameras if not self._is_video(camera)]
        with _reading(file), pq.ParquetFile(file) as parquet:
            _check_columns(file, parquet, [*columns, "episode_index", *images])
            first, stop = self._rows_of(file, parquet, index, row["length"])
            groups, skipped = _row_groups(parquet, first, stop)
            table = parquet.read_row_groups(groups, columns).slice(first - skipped, stop - first)
        where = f"{file}: episode {index}"
        if table["frame_index"].to_pylist() != list(range(len(table))):
            raise SourceError(f"{where}: frame_index does not count from 0 to {len(table) - 1}; its rows are mixed up")
        state, action = (self._vectors(where, key, table[key]) for key in (STATE, ACTION))
        timestamp_s = table["timestamp"].to_numpy().astype(np.float64)
        self._check_times(where, timestamp_s)
        for camera in self.cameras:
            if self._is_video(camera):
                self._check_video(index, camera, timestamp_s[-1])
        return EpisodeData(index, name, timestamp_s, state, action, np.zeros(len(table), np.int64))

    def _rows_of(self, file: Path, parquet: pq.ParquetFile, index: int, length: int) -> tuple[int, int]:
        """[first, stop) of an episode's rows in its data file."""
        rows = np.flatnonzero(parquet.read(["episode_index"])["episode_index"].to_numpy() == index)
        if len(rows) != length or not length or rows[-1] - rows[0] + 1 != length:
            found = f"{len(rows)} rows" + (", not in one piece" if len(rows) == length else "")
            raise SourceError(f"{file}: episode {index}: found {found}, meta/episodes says {length}; copy it again")
        return int(rows[0]), int(rows[-1]) + 1

    def _vectors(self, where: str, key: str, column: pa.ChunkedArray) -> np.ndarray:
        """(n, size) float32 of a feature's column; every value finite."""
        size = self._features[key]["shape"][0]
        is_list = pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
        if is_list or pa.types.is_large_list(column.type):
            flat = pc.list_flatten(column)  # ty: ignore[missing-attribute] - pyarrow makes it when imported
        else:
            flat = column
        if len(flat) != len(column) * size:
            raise SourceError(f"{where}: {key}: info.json says {size} values a row, found {len(flat)} in {len(column)}")
        try:
            values = flat.to_numpy().astype(np.float32).reshape(-1, size)
        except (ValueError, TypeError):
            raise SourceError(f"{where}: {key}: expected numbers, found {flat.type}") from None
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            t, j = bad[0]
            joint = self.joint_names[j] if self.joint_names and key == STATE else f"value {j}"
            raise SourceError(
                f"{where}: {key}: {joint} is {values[t, j]} at frame {t}, expected a finite number ({len(bad)} such "
                "values in this episode); evaluate other episodes, or repair the recording"
            )
        return values

    def _check_times(self, where: str, timestamp_s: np.ndarray) -> None:
        wrong = ~np.isfinite(timestamp_s) | ~(np.diff(timestamp_s, prepend=-np.inf) > 0)
        if wrong.any():
            t = int(wrong.argmax())
            raise SourceError(
                f"{where}: timestamp {timestamp_s[t]} s of frame {t} does not follow the one before it; its rows are "
                "mixed up or the recorder's clock jumped"
            )
        steps = np.diff(timestamp_s)
        off_s = np.abs(steps - 1 / self.fps)
        uneven = off_s > TOLERANCE_S + np.spacing(timestamp_s[1:].astype(np.float32))  # a step rounds at both ends
        if uneven.any():
            self._note(
                f"{where}: {uneven.sum()} of {len(steps)} steps in time are not 1 / fps = {1 / self.fps:.6g} s "
                f"(the worst is {steps[off_s.argmax()]:.6g} s)"
            )

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    # -- pixels ---------------------------------------------------------------------------------------------------

    def frames(self, index: int, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        """Frames start <= i < stop (None: to the end) in order; videos are decoded once, from the key frame before.

        Raises:
            SourceError: at once when the episode or the range does not exist; while iterating when an image is damaged
                or a video has no frame at that time.
        """
        episode = self.episode(index)
        return self._frames(episode, frame_range(episode.name, len(episode.timestamp_s), start, stop))

    def _frames(self, episode: EpisodeData, wanted: range) -> Iterator[Frame]:
        with contextlib.ExitStack() as stack:  # closes the files when the caller stops early, too
            pixels = {}
            for camera in self.cameras:
                stream = self._video_frames if self._is_video(camera) else self._image_frames
                pixels[camera] = stack.enter_context(contextlib.closing(stream(episode, camera, wanted)))
            for i in wanted:
                images = {camera: next(stream) for camera, stream in pixels.items()}
                yield Frame(i, float(episode.timestamp_s[i]), episode.state_rad[i], images)

    def _check_video(self, index: int, camera: str, last_s: float) -> None:
        """The file is there, opens, and is long enough; its codec is the declared one, or that is noted."""
        row, key = self._row(index), IMAGE_PREFIX + camera
        file = self._video_file(row, camera)
        if not file.exists():
            raise AbsentVideo(
                f"{file}: info.json declares videos of {key}, but that of episode {index} is absent; copy it, or leave "
                "the episode out (--skip-missing-episodes leaves out all such)"
            )
        with _open_video(file) as (container, stream):
            if (stream.height, stream.width) != self.cameras[camera]:
                height, width = self.cameras[camera]
                raise SourceError(
                    f"{file}: its frames are {stream.height}x{stream.width} (HxW), info.json says {height}x{width}"
                )
            _check_length(file, container, stream)
            codec = stream.codec.canonical_name
            info = self._features[key].get("info") or self._features[key].get("video_info") or {}
            declared = info.get("video.codec")
            if declared and _codec(declared) != codec:
                self._note(f"{key}: info.json declares the codec {declared}, but there is {codec}; decoded as such")
            needed_s, to_s = row[f"videos/{key}/from_timestamp"] + last_s, row[f"videos/{key}/to_timestamp"]
            if needed_s > to_s + TOLERANCE_S:
                raise SourceError(
                    f"{file}: episode {index} needs a frame at {needed_s:.4f} s, but by meta/episodes its part of the "
                    f"video ends at {to_s:.4f} s; rows and video are not of the same recording: copy the dataset again"
                )
            if stream.duration is not None:
                ends_s = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
                if needed_s > ends_s + TOLERANCE_S:
                    raise SourceError(
                        f"{file}: ends at {ends_s:.4f} s, but episode {index} needs a frame at {needed_s:.4f} s; the "
                        "video was cut short, or from_timestamp in meta/episodes is wrong: copy the dataset again"
                    )

    def _video_frames(self, episode: EpisodeData, camera: str, wanted: range) -> Generator[np.ndarray]:
        """Decode forward from the key frame before the first wanted frame, once."""
        row = self._row(episode.index)
        file = self._video_file(row, camera)
        from_s = row[f"videos/{IMAGE_PREFIX}{camera}/from_timestamp"]
        if not wanted:
            return
        with _open_video(file) as (container, stream):
            # Threads across frames as well as inside one; the pictures are the same.
            stream.thread_type = "AUTO"
            converter = VideoReformatter()  # frame.to_ndarray(format=...) would set one up for each frame
            times_s = from_s + episode.timestamp_s
            # Timestamps are stored in float32: late in a long episode the rounding alone passes the tolerance.
            tolerance_s = TOLERANCE_S + np.spacing(episode.timestamp_s.astype(np.float32)) / 2
            decoded = _decode_from(container, stream, times_s[wanted[0]] + tolerance_s[wanted[0]])
            frame = next(decoded, None)
            for i in wanted:
                before = None
                while frame is not None and _time_s(frame) < times_s[i] - tolerance_s[i]:
                    before, frame = frame, next(decoded, None)
                if frame is None or _time_s(frame) > times_s[i] + tolerance_s[i]:
                    around = [f"{_time_s(f):.4f} s" for f in (before, frame) if f is not None]
                    raise SourceError(
                        f"{file}: no frame at {times_s[i]:.4f} s for frame {i} of episode {episode.index} (nearest: "
                        f"{' and '.join(around) or 'none'}; tolerance {TOLERANCE_S:g} s); the video was cut short, or "
                        "the timestamps are not the video's: copy the dataset again"
                    )
                if frame.is_corrupt:  # ffmpeg patches over damage, and LeRobot takes what it made up
                    raise SourceError(f"{file}: frame {i} of episode {episode.index} is damaged; copy the file again")
                pixels = converter.reformat(frame, format="rgb24").to_ndarray()
                # Without a copy the array may be a view of memory that belongs to ffmpeg.
                yield np.require(pixels, requirements=["C", "W", "O"])

    def _image_frames(self, episode: EpisodeData, camera: str, wanted: range) -> Generator[np.ndarray]:
        """Pixels that lie in the parquet file (PNG or JPEG bytes) or in files that it names."""
        key = IMAGE_PREFIX + camera
        file = self._data_file(self._row(episode.index))
        # Read page by page: LeRobot writes an episode as one row group, which may be a gigabyte of pictures.
        with _reading(file), pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as parquet:
            first, _ = self._rows_of(file, parquet, episode.index, len(episode.timestamp_s))
            groups, skipped = _row_groups(parquet, first + wanted.start, first + wanted.stop)
            batches = parquet.iter_batches(IMAGE_ROWS, groups, [key])
            values = (value for batch in batches for value in batch.column(0))
            begin = first + wanted.start - skipped
            for i, value in zip(wanted, itertools.islice(values, begin, None), strict=False):
                yield self._picture(f"{file}: {key}, frame {i} of episode {episode.index}", camera, value.as_py())

    def _picture(self, where: str, camera: str, value: Any) -> np.ndarray:
        content = value.get("bytes") if isinstance(value, dict) else None
        path = value.get("path") if isinstance(value, dict) else value
        try:
            if content is None and isinstance(path, str):
                file = self._inside(where, path)
                if file.exists() and not file.is_file():
                    raise SourceError(f"{where}: {file} is not a regular file; copy the dataset again")
                content = file.read_bytes()
            if not isinstance(content, bytes):
                raise SourceError(
                    f"{where}: expected an encoded image or the path of one, found {type(value).__name__}"
                )
            with _open_picture(content) as image:
                if (image.height, image.width) != self.cameras[camera]:  # known before a pixel is decoded
                    declared = "x".join(map(str, self.cameras[camera]))
                    raise SourceError(
                        f"{where}: the image is {image.height}x{image.width} (HxW), info.json says {declared}"
                    )
                if image.mode != "RGB":
                    raise SourceError(f"{where}: expected an RGB image, found mode {image.mode}")
                pixels = np.array(image)
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:  # PIL's, broken images
            raise SourceError(f"{where}: the image cannot be read ({error}); copy the dataset again") from None
        return pixels


# -- files ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _reading(file: Path) -> Generator[None]:
    """Damaged files make pyarrow and ffmpeg raise a dozen types of exception; ours is one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise SourceError(f"{error.filename or file}: is absent; copy the dataset again, whole") from None
    except (pa.ArrowException, av.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{file}: is damaged or cut short ({error}); copy it again") from error


def _open_picture(content: bytes) -> PIL.Image.Image:
    """Read the header of a picture; PIL's warning of a large one is ours to say, by the size that was declared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        return PIL.Image.open(io.BytesIO(content), formats=PICTURES)


def _check_columns(file: Path, parquet: pq.ParquetFile, needed: Iterable[str]) -> None:
    found = parquet.schema_arrow.names
    missing = [column for column in needed if column not in found]
    if missing:
        near = [n for n in found if n in ALIASES.get(missing[0], ())] or difflib.get_close_matches(missing[0], found, 1)
        hint = f" ({near[0]!r} looks like {missing[0]!r})" if near else ""
        there = ", ".join(name for name in found if not name.startswith("stats/"))
        raise SourceError(f"{file}: no column {', '.join(map(repr, missing))}{hint}; found {there}")


def _check_row(file: Path, row: dict[str, Any]) -> None:
    """A row of meta/episodes holds finite numbers; makes whole ones int (pandas writes a column with gaps as float)."""
    for column, value in row.items():
        whole = "timestamp" not in column
        if not isinstance(value, (int, float)) or not math.isfinite(value) or (whole and value != int(value)):
            expected = "a whole number" if whole else "seconds"
            raise SourceError(
                f"{file}: {column} of episode {row['episode_index']} is {value!r}, expected {expected}; copy it again"
            )
        row[column] = int(value) if whole else float(value)


def _row_groups(parquet: pq.ParquetFile, first: int, stop: int) -> tuple[list[int], int]:
    """(row groups that hold the rows first <= i < stop, number of rows before them)."""
    sizes = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
    ends = np.cumsum(sizes)
    groups = [g for g, (size, end) in enumerate(zip(sizes, ends, strict=True)) if end - size < stop and end > first]
    return groups, int(ends[groups[0]] - sizes[groups[0]]) if groups else 0


def _fingerprint(root: Path, files: Iterable[Path]) -> str:
    """SHA-256 over names, sizes, and the first and last MiB of each file: videos are too large to hash whole."""
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{os.path.relpath(file, root)}\0{size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()


def _codec(name: str) -> str:
    """`libsvtav1`, the name of an encoder, is the codec `av1`."""
    try:
        return av.Codec(name, "w").canonical_name
    except ValueError:  # av's UnknownCodecError: ffmpeg here cannot encode it
        return name


def _conversion(folder: Path) -> str:
    """The command that converts a v2.1 dataset, of the LeRobot that is installed; that of 0.4 if there is none.

    Looking imports LeRobot: only for an error.
    """
    there = CONVERTERS[0]
    for name in CONVERTERS:
        with contextlib.suppress(Exception):  # a package above it that is not there, or fails to import
            if importlib.util.find_spec(name):
                there = name
                break
    return f"python -m {there} --repo-id={folder.name} --root={folder.parent} --push-to-hub=false"


@contextlib.contextmanager
def _open_video(file: Path) -> Generator[tuple[Any, Any]]:
    # av's own default, which torchvision changes when it is imported: with a log level set, a decoding thread that
    # complains of a damaged file waits for the interpreter while closing the file waits for the thread, for ever.
    av.logging.set_level(None)
    with _reading(file), av.open(str(file), options=ONLY_THIS_FILE) as container:
        if not container.streams.video:
            raise SourceError(f"{file}: has no video stream; copy it again")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise SourceError(
                f"{file}: no decoder here for its codec; it is damaged, or this av was built without it: install av's "
                "own wheel, or convert the videos with ffmpeg -c:v libx264"
            )
        yield container, stream


def _check_length(file: Path, container: Any, stream: Any) -> None:
    """All is there that the file's index names, if it has one. Raises SourceError."""
    if hasattr(stream, "index_entries"):  # from av 17 on
        if len(stream.index_entries):
            last = stream.index_entries[-1]
            size, needed = file.stat().st_size, last.pos + last.size
            if size < needed:
                raise SourceError(
                    f"{file}: is cut short: its index reaches to byte {needed}, the file has {size}; copy it again"
                )
        return
    # LeRobot 0.4.4 and 0.6 pin av 15, which does not show the index: count what can be read.
    found = sum(packet.size > 0 and not packet.is_corrupt for packet in container.demux(stream))
    if found < stream.frames:
        raise SourceError(
            f"{file}: is cut short: {found} of the {stream.frames} pictures that its index names can be read; copy it "
            "again"
        )


def _time_s(frame: av.VideoFrame) -> float:
    assert frame.pts is not None and frame.time_base is not None  # _decode_from leaves out frames without a time
    return float(frame.pts * frame.time_base)


def _decode_from(container: Any, stream: Any, time_s: float) -> Iterator[av.VideoFrame]:
    """Frames in order of presentation, from the last key frame presented at or before `time_s`."""
    wanted = target = int(time_s / stream.time_base)
    while True:
        container.seek(target, stream=stream)
        packets = container.demux(stream)
        first = next(packets)
        # Containers seek by decode time, which runs ahead of presentation where there are B frames: the key frame
        # found may be shown only after the wanted frame. Then the one before it is right.
        if first.dts is None or first.pts is None or first.pts <= wanted or first.dts > target:
            break
        target = first.dts - 1
    for packet in itertools.chain([first], packets):
        yield from (frame for frame in packet.decode() if frame.pts is not None)
