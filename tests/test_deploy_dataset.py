"""The episodes that the offline evaluation reads: LeRobot v3.0 datasets, and bags.

The datasets are written by the real LeRobot 0.4.4 (tests/lerobot_044/dataset_write.py), and what is read is compared
with what its own LeRobotDataset returns, bit for bit. The damaged ones are copies of these with one thing broken.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from ur10e_deploy.lerobot_dataset import LeRobotDatasetSource
from ur10e_deploy.sources import AbsentVideo, BagSource, EpisodeSource, SourceError

from lerobot_dataset import reading as lerobot_dataset
from rosbag_dataset import ChunkDataset, load_episodes, settings_from
from tests import bags
from tests.lerobot_044 import launch
from tests.once import once

ROOT = launch.ROOT
COLOR = "observation.images.color"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
DATA = "data/chunk-000/file-000.parquet"
VIDEO = f"videos/{COLOR}/chunk-000/file-000.mp4"


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with NAME/ (a dataset) and NAME.npz (what LeRobot 0.4.4 reads in it) for each of its datasets."""
    return once(tmp_path_factory, "lerobot-datasets", lambda folder: launch.run_script("dataset_write.py", folder))


@pytest.fixture
def joined(written: Path, tmp_path: Path) -> Path:
    """A copy to break: five episodes of 9, 4, 13, 1 and 8 frames at 7 Hz, all in one file."""
    return Path(shutil.copytree(written / "joined", tmp_path / "joined"))


def read_all(source: EpisodeSource) -> dict[str, np.ndarray]:
    """Every frame of every episode, under the names that dataset_write.py gives them."""
    rows: dict[str, list] = {}
    for index in source.episode_indices():
        episode = source.episode(index)
        for frame in source.frames(index):
            assert np.array_equal(frame.state_rad, episode.state_rad[frame.index])
            values = {"observation.state": frame.state_rad, "action": episode.action[frame.index], **frame.images}
            values |= {"timestamp": np.float32(frame.timestamp_s), "episode_index": index, "frame_index": frame.index}
            for key, value in values.items():
                rows.setdefault(key, []).append(value)
    return {key: np.stack(values) for key, values in rows.items()}


# -- the same as LeRobot ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["joined", "split", "half", "images", "joined-mpeg4", "joined-h264"])
def test_every_frame_equals_what_lerobot_reads(written: Path, name: str) -> None:
    """States, actions, times and pixels, bit for bit: several episodes per file, several files and chunks, two
    cameras of different size, 7, 12.5 and 30 Hz, AV1, H.264, MPEG-4 and PNG in parquet."""
    expected = np.load(written / f"{name}.npz")
    found = read_all(LeRobotDatasetSource(written / name))
    assert sorted(found) == sorted(expected.files)
    for key in expected.files:
        assert expected[key].dtype == found[key].dtype or key.endswith("_index"), key
        assert np.array_equal(expected[key], found[key]), key


READ_WITH_AV_15 = """
import sys
import av, numpy as np
from tests.test_deploy_dataset import read_all
from ur10e_deploy.lerobot_dataset import LeRobotDatasetSource, SourceError
assert av.__version__.startswith("15."), av.__version__
for name in sys.argv[3:]:
    expected, found = np.load(f"{sys.argv[1]}/{name}.npz"), read_all(LeRobotDatasetSource(f"{sys.argv[1]}/{name}"))
    assert sorted(found) == sorted(expected.files)
    assert all(np.array_equal(expected[key], found[key]) for key in found), name
try:
    read_all(LeRobotDatasetSource(sys.argv[2]))
except SourceError as error:
    print(error)
"""


def test_with_the_av_that_lerobot_pins(written: Path, joined: Path, tmp_path: Path) -> None:
    """LeRobot 0.4.4 and 0.6 pin av 15, beside which our reader is installed: the same frames, and a video that is cut
    short is noticed there too."""
    packages = next((launch.PYTHON.parents[1] / "lib").glob("python3*/site-packages"))
    for name in ("av", "av.libs", next(packages.glob("av-15*")).name):
        (tmp_path / name).symlink_to(packages / name)
    cut(joined / VIDEO, 0.6)
    command = [sys.executable, "-c", READ_WITH_AV_15, str(written), str(joined), "split", "half", "joined-h264"]
    path = f"{tmp_path}:{ROOT}:{ROOT / 'deploy'}"
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.search(r"file-000\.mp4: is cut short: \d+ of the 35 pictures", result.stdout), result.stdout


def test_the_datasets_have_what_they_are_there_for(written: Path) -> None:
    """Otherwise the test above would compare easier datasets than it says."""
    files = {n: len(list((written / n).glob(f"videos/{COLOR}/*/*.mp4"))) for n in ("joined", "split", "half")}
    assert files["joined"] == 1 and files["split"] >= 3 and files["half"] == 1
    for folder in ("data", "meta/episodes", f"videos/{COLOR}"):
        assert {p.name for p in (written / "split" / folder).iterdir()} >= {"chunk-000", "chunk-001"}, folder
    source = LeRobotDatasetSource(written / "split")
    parts = [(r[f"videos/{COLOR}/chunk_index"], r[f"videos/{COLOR}/file_index"]) for r in source._episodes.values()]
    assert len(set(parts)) < len(parts), "a file with several episodes, too"
    assert [len(source.episode(i).timestamp_s) for i in source.episode_indices()] == [9, 4, 13, 7, 8]


def test_what_a_source_says_of_itself(written: Path) -> None:
    source = LeRobotDatasetSource(written / "half")
    assert source.fps == 12.5
    assert source.joint_names == ["shoulder_pan", "shoulder_lift", "elbow", "wrist_1", "wrist_2", "wrist_3"]
    assert source.cameras == {"color": (48, 64), "wrist": (64, 96)}
    assert (source.action_mode, source.resized, source.notes) == (None, False, [])
    assert source.episode_indices() == [0, 1]
    assert source.episode_name(1) == "episode_000001"
    identity = source.identity
    assert (identity["kind"], identity["version"], identity["episodes"], identity["frames"]) == (
        "lerobot", "v3.0", 2, 11,
    )  # fmt: skip
    episode = source.episode(1)
    assert episode.timestamp_s.dtype == np.float64 and episode.state_rad.dtype == episode.action.dtype == np.float32
    assert set(episode.segment) == {0}


def test_identity_follows_the_content_and_not_the_place(written: Path, joined: Path) -> None:
    original = LeRobotDatasetSource(written / "joined").identity["sha256"]
    assert LeRobotDatasetSource(joined).identity["sha256"] == original
    edit_table(joined / DATA, lambda rows: rows[3].update(action=[0.0] * 6))
    assert LeRobotDatasetSource(joined).identity["sha256"] != original


@pytest.mark.parametrize("name", ["split", "images"])
def test_a_range_of_frames_is_that_part_of_the_episode(written: Path, name: str) -> None:
    source = LeRobotDatasetSource(written / name)
    whole = list(source.frames(1))
    for start, stop in itertools.combinations_with_replacement(range(len(whole) + 1), 2):
        part = list(source.frames(1, start, stop))
        assert [f.index for f in part] == list(range(start, stop))
        for frame in part:
            assert frame.timestamp_s == whole[frame.index].timestamp_s
            for camera, image in frame.images.items():
                assert np.array_equal(image, whole[frame.index].images[camera])
    for start, stop in ((0, len(whole) + 1), (-1, 2), (3, 2)):
        with pytest.raises(SourceError, match=f"frames {start} to {stop} asked for, it has {len(whole)}"):
            source.frames(1, start, stop)
    with pytest.raises(SourceError, match=r"no episode 7; the dataset has \d \(0 to \d\)"):
        source.frames(7)


@pytest.mark.parametrize("name", ["split", "images", "bags"])
def test_frames_are_the_callers_own(written: Path, sample_bags: Path, tmp_path: Path, name: str) -> None:
    """A caller that keeps or paints a frame must not see it change, nor change a later one."""
    source = LeRobotDatasetSource(written / name) if name != "bags" else BagSource(
        sample_bags, checkpoint_values(image_resize=[24, 32]), tmp_path
    )  # fmt: skip
    untouched = [f.images["color"].copy() for f in source.frames(0)]
    state_rad = source.episode(0).state_rad.copy()
    source.episode(0).state_rad[:] = 9
    kept = []
    for frame in source.frames(0):
        kept.append(frame.images["color"].copy())
        frame.images["color"][:] = 0
        frame.state_rad[:] = 9
        assert frame.images["color"].flags.owndata and frame.images["color"].flags.c_contiguous
    assert np.array_equal(kept, untouched)
    assert np.array_equal(source.episode(0).state_rad, state_rad)


def test_images_in_files_that_the_parquet_names(written: Path, tmp_path: Path) -> None:
    """The other way to store a picture: {"bytes": null, "path": "images/..."}, and a plain column of paths."""
    root = Path(shutil.copytree(written / "images", tmp_path / "images"))
    before = read_all(LeRobotDatasetSource(root))
    for file in root.glob("data/*/*.parquet"):
        table = pq.read_table(file)
        for camera, plain in (("color", False), ("wrist", True)):
            key, values = f"observation.images.{camera}", []
            for row in table.select([key, "episode_index", "frame_index"]).to_pylist():
                path = f"images/{key}/episode-{row['episode_index']:06d}/{row['frame_index']}.png"
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_bytes(row[key]["bytes"])
                values.append(path if plain else {"bytes": None, "path": path})
            kind = pa.string() if plain else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            table = table.set_column(table.schema.get_field_index(key), key, pa.array(values, kind))
        pq.write_table(table, file)
    after = read_all(LeRobotDatasetSource(root))
    assert all(np.array_equal(before[key], after[key]) for key in before)
    next(root.glob("images/*color/episode-000001/2.png")).unlink()
    with pytest.raises(SourceError, match="color, frame 2 of episode 1: the image cannot be read .*No such file"):
        read_all(LeRobotDatasetSource(root))


@pytest.mark.parametrize("name", ["split", "images"])
def test_paths_and_row_groups_as_other_tools_make_them(written: Path, tmp_path: Path, name: str) -> None:
    """Paths are info.json's templates; row groups need not be episodes; pandas writes whole numbers as floats."""
    root = Path(shutil.copytree(written / name, tmp_path / name))
    before = read_all(LeRobotDatasetSource(root))
    for old in list(root.glob("data/*/*.parquet")):
        new = root / "rows" / f"{old.parent.name[6:]}.{int(old.stem[5:])}.parquet"
        new.parent.mkdir(exist_ok=True)
        pq.write_table(pq.read_table(old), new, row_group_size=4)
    for old in list(root.glob("videos/*/*/*.mp4")):
        new = root / "film" / old.parts[-3] / f"{int(old.parent.name[6:])}-{old.stem[5:]}.mp4"
        new.parent.mkdir(parents=True, exist_ok=True)
        old.rename(new)
    shutil.rmtree(root / "data")
    rows, film = "rows/{chunk_index:03d}.{file_index}.parquet", "film/{video_key}/{chunk_index}-{file_index:03d}.mp4"
    edit_info(root, lambda i: i.update(data_path=rows, video_path=film))
    for file in root.glob("meta/episodes/*/*.parquet"):
        table = pq.read_table(file)
        for column in [c for c in table.column_names if c.endswith(("chunk_index", "file_index"))]:
            table = table.set_column(table.column_names.index(column), column, table[column].cast(pa.float64()))
        pq.write_table(table, file)
    after = read_all(LeRobotDatasetSource(root))
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_only_needed_columns_and_no_foreign_libraries(joined: Path) -> None:
    """An extra column that cannot be decoded does not matter; the reader loads neither lerobot nor torch nor train."""
    table = pq.read_table(joined / DATA)
    pq.write_table(table.append_column("extra", pa.array([{"nested": [[None]]}] * len(table))), joined / DATA)
    code = (
        "import sys; from ur10e_deploy.lerobot_dataset import LeRobotDatasetSource as S; "
        f"print(sum(1 for _ in S({str(joined)!r}).frames(2))); "
        "print([m for m in ('lerobot', 'torch', 'train', 'datasets') if m in sys.modules])"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "deploy")])
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert result.stdout.split("\n")[:2] == ["13", "[]"], result.stderr


# -- any video ----------------------------------------------------------------------------------------------------

# Codecs as other tools write them; what a person gets from `ffmpeg -i in.mp4 out.mp4` has B frames and long GOPs.
CODECS = {
    "h264 with B frames": ("libx264", {"g": "12", "bf": "3", "sc_threshold": "0"}),
    "h264 with open GOPs": ("libx264", {"x264-params": "keyint=12:bframes=3:scenecut=0:open-gop=1"}),
    "hevc with open GOPs": ("libx265", {"x265-params": "keyint=8:open-gop=1:bframes=3:scenecut=0:log-level=none"}),
    "mpeg4 with B frames": ("mpeg4", {"g": "12", "bf": "2", "q:v": "3"}),
}


def encode(file: Path, pictures: list[np.ndarray], rate: int, codec: str, options: dict[str, str]) -> None:
    with av.open(str(file), "w") as target:
        stream = target.add_stream(codec, rate, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, rate)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())


def decode(file: Path) -> list[np.ndarray]:
    """Every frame from the beginning, by the plainest use of the decoder."""
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("codec", CODECS)
def test_frames_are_exact_wherever_an_episode_begins(joined: Path, codec: str) -> None:
    """A container finds key frames by decode time, which with B frames runs ahead of the time shown: from each frame
    of each episode on, the pictures are those of a decoding from the file's beginning."""
    for camera in ("color", "wrist"):
        file = joined / VIDEO.replace("color", camera)
        encode(file, decode(file), 7, *CODECS[codec])
    source = LeRobotDatasetSource(joined)
    truth = decode(joined / VIDEO)
    assert len({t.tobytes() for t in truth}) == len(truth) == 35, "every picture is another"
    first = 0
    for index in source.episode_indices():
        count = len(source.episode(index).timestamp_s)
        for start in range(count):
            for frame in source.frames(index, start):
                assert np.array_equal(frame.images["color"], truth[first + frame.index]), (index, start, frame.index)
        first += count
    assert any("declares the codec av1" in note for note in source.notes)


def test_reading_begins_at_the_key_frame_before_and_stops_with_the_caller(
    joined: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three frames in the middle of a long file cost at most one group of pictures, and the first of many costs one."""
    pictures = decode(joined / VIDEO)
    long = [pictures[i % len(pictures)] for i in range(400)]
    for camera in ("color", "wrist"):
        size = (64, 48) if camera == "color" else (96, 64)
        resized = [np.asarray(PIL.Image.fromarray(p).resize(size)) for p in long]
        encode(joined / VIDEO.replace("color", camera), resized, 7, "libx264", {"g": "10", "bf": "3"})
    shift = 200 / 7  # every episode now lies in the middle of its video file

    def move(rows: list[dict]) -> None:
        for row, camera, side in itertools.product(rows, ("color", "wrist"), ("from", "to")):
            row[f"videos/observation.images.{camera}/{side}_timestamp"] += shift

    edit_table(joined / EPISODES, move)
    decoded = []
    real = lerobot_dataset._decode_from

    def counting(container, stream, time_s):
        for frame in real(container, stream, time_s):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(lerobot_dataset, "_decode_from", counting)
    source = LeRobotDatasetSource(joined)
    frames = source.frames(2, 4, 7)
    first = next(frames)
    assert len(decoded) <= 2 * 11, "two cameras, each at most the frames of one group"
    assert np.array_equal(first.images["color"], decode(joined / VIDEO)[200 + 9 + 4 + 4])
    assert [f.index for f in frames] == [5, 6]
    assert len(decoded) <= 2 * 13
    decoded.clear()
    frames = source.frames(2)
    next(frames)
    frames.close()
    assert len(decoded) <= 2 * 11


def test_an_absent_video_is_an_error_of_its_own_kind(joined: Path) -> None:
    """So that --skip-missing-episodes can leave such episodes out, and no others."""
    (joined / VIDEO).unlink()
    with pytest.raises(AbsentVideo, match="is absent"):
        LeRobotDatasetSource(joined).episode(0)


def test_the_converter_is_that_of_the_installed_lerobot(monkeypatch: pytest.MonkeyPatch) -> None:
    """It moved: 0.4 and 0.6 have it in different places, and without either the hint is 0.4's."""
    assert f"python -m {lerobot_dataset.CONVERTERS[0]} --repo-id=b --root=/a" in lerobot_dataset._conversion(
        Path("/a/b")
    )
    there = lerobot_dataset.CONVERTERS[1]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == there else None)
    assert f"python -m {there} " in lerobot_dataset._conversion(Path("/a/b"))


def test_a_declared_codec_that_is_not_the_files_is_said(written: Path) -> None:
    source = LeRobotDatasetSource(written / "joined-mpeg4")
    read_all(source)
    assert source.notes == [
        f"observation.images.{camera}: info.json declares the codec av1, but there is mpeg4; decoded as such"
        for camera in ("color", "wrist")
    ]
    for name in ("joined", "split", "images"):
        source = LeRobotDatasetSource(written / name)
        read_all(source)
        assert source.notes == []


@pytest.mark.parametrize("codec", ["libsvtav1", "av1"])
def test_an_encoders_name_is_its_codec(joined: Path, codec: str) -> None:
    edit_info(joined, lambda info: info["features"][COLOR]["info"].update({"video.codec": codec}))
    source = LeRobotDatasetSource(joined)
    read_all(source)
    assert source.notes == []


# -- seen in the wild ---------------------------------------------------------------------------------------------


def edit_info(root: Path, change: Callable[[dict], object]) -> None:
    file = root / "meta" / "info.json"
    info = json.loads(file.read_text())
    change(info)
    file.write_text(json.dumps(info))


def edit_table(file: Path, change: Callable[[list[dict]], object]) -> None:
    """Rewrite a parquet file with its rows changed in place; types stay."""
    table = pq.read_table(file)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)


def rename_columns(root: Path, names: dict[str, str], also_in_info: bool) -> None:
    table = pq.read_table(root / DATA)
    pq.write_table(table.rename_columns([names.get(n, n) for n in table.column_names]), root / DATA)
    if also_in_info:
        edit_info(root, lambda i: i.update(features={names.get(k, k): f for k, f in i["features"].items()}))


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def cut_video_with_its_index_at_the_end(root: Path) -> None:
    """LeRobot's files have their index in front; most others', and a recording that broke off, have it behind."""
    encode(root / VIDEO, decode(root / VIDEO), 7, "mpeg4", {})
    cut(root / VIDEO, 0.6)


def damage_a_picture(root: Path) -> None:
    """As a bad disk does: some bytes in the middle of one frame, nothing else. ffmpeg raises no error for it."""
    file = root / VIDEO
    encode(file, decode(file), 7, "mpeg4", {"g": "12"})
    with av.open(str(file)) as container:
        entry = container.streams.video[0].index_entries[6]
    content = bytearray(file.read_bytes())
    middle = entry.pos + entry.size // 2
    content[middle : middle + 10] = bytes(255 - b for b in content[middle : middle + 10])
    file.write_bytes(content)
    assert len(decode(file)) == 35


def v21_layout(root: Path) -> None:
    """What LeRobot v2.1 left: one file an episode, json lines."""
    shutil.rmtree(root / "meta" / "episodes")
    (root / "meta" / "episodes.jsonl").write_text('{"episode_index": 0, "length": 9}\n')
    template = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    edit_info(root, lambda i: i.update(codebase_version="v2.1", data_path=template))


def set_value(column: str, row: int, value: object, file: str = DATA) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        edit_table(root / file, lambda rows: rows[row].update({column: value}))

    return damage


def info(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda root: edit_info(root, change)


NAN, JOINT = float("nan"), [0.0, 0.0, float("nan"), 0.0, 0.0, 0.0]

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    # rows
    "info.json counts other frames": (
        info(lambda i: i.update(total_frames=36)),
        r"info\.json: total_frames is 36, but meta/episodes lists 35; .*copy it again",
    ),
    "info.json counts other episodes": (
        info(lambda i: i.update(total_episodes=4)), r"info\.json: total_episodes is 4, but meta/episodes lists 5",
    ),
    "rows are missing": (
        lambda root: edit_table(root / DATA, lambda rows: rows.pop()),
        r"file-000\.parquet: has 34 rows, but meta/episodes places 35 frames in it, and info\.json counts 35",
    ),
    "an episode's rows are another's": (
        set_value("episode_index", 8, 1), r"episode 0: found 8 rows, meta/episodes says 9",
    ),
    "rows are shuffled": (
        lambda root: edit_table(root / DATA, lambda rows: rows.insert(3, rows.pop(5))),
        r"episode 0: frame_index does not count from 0 to 8; its rows are mixed up",
    ),
    "an episode in two pieces": (
        lambda root: edit_table(root / DATA, lambda rows: rows.append(rows.pop(2))),
        r"episode 0: found 9 rows, not in one piece, meta/episodes says 9",
    ),
    "the data file is cut": (lambda root: cut(root / DATA, 0.7), r"file-000\.parquet: is damaged or cut short \("),
    "the data file is absent": (lambda root: (root / DATA).unlink(), r"file-000\.parquet: is absent; copy the dataset"),
    # videos
    "declared video absent": (
        lambda root: (root / VIDEO).unlink(),
        r"info\.json declares videos of observation\.images\.color, but that of episode 0 is absent.*--skip-missing",
    ),
    "truncated video": (lambda root: cut(root / VIDEO, 0.6), r"file-000\.mp4: is cut short: its index .* to byte \d+"),
    "truncated video with its index at the end": (
        cut_video_with_its_index_at_the_end, r"file-000\.mp4: is damaged or cut short \(.*\); copy it again",
    ),
    "empty video": (lambda root: (root / VIDEO).write_bytes(b""), r"file-000\.mp4: is damaged or cut short"),
    "no video in the file": (
        lambda root: shutil.copy(root / "meta" / "info.json", root / VIDEO), r"file-000\.mp4: is damaged or cut short",
    ),
    "a damaged picture that ffmpeg patches over": (
        damage_a_picture, r"file-000\.mp4: frame \d of episode \d is damaged; copy the file again",
    ),
    "times between the video's frames": (
        set_value(f"videos/{COLOR}/from_timestamp", 0, 0.05, EPISODES),
        r"no frame at 0\.0500 s for frame 0 of episode 0 \(nearest: 0\.0000 s and 0\.1429 s; tolerance 0\.0001 s\)",
    ),
    "times behind the video's end": (
        lambda root: edit_table(root / EPISODES, lambda rows: [
            row.update({f"videos/{COLOR}/{side}_timestamp": 100.0 + i + (side == "to") * 9})
            for i, row in enumerate(rows) for side in ("from", "to")
        ]),
        r"file-000\.mp4: ends at 5\.0000 s, but episode 0 needs a frame at 101\.1429 s",
    ),
    "an episode's video part is too short": (
        set_value(f"videos/{COLOR}/to_timestamp", 0, 0.5, EPISODES),
        r"episode 0 needs a frame at 1\.1429 s, but by meta/episodes its part of the video ends at 0\.5000 s",
    ),
    "the video has another size": (
        info(lambda i: i["features"][COLOR].update(shape=[480, 640, 3])),
        r"file-000\.mp4: its frames are 48x64 \(HxW\), info\.json says 480x640",
    ),
    # versions
    "v3.0 that says v2.1": (
        info(lambda i: i.update(codebase_version="v2.1")),
        r"codebase_version is 'v2\.1', but the files are laid out as v3\.0 .*set codebase_version to 'v3\.0'",
    ),
    "v2.1": (
        v21_layout,
        r"codebase_version is 'v2\.1', expected 'v3\.0'; LeRobot 0\.4 converts .*: python -m "
        r"lerobot\.datasets\.v30\.convert_dataset_v21_to_v30 --repo-id=joined --root=/.* --push-to-hub=false",
    ),
    "v2.1 that says v3.0": (
        lambda root: (v21_layout(root), edit_info(root, lambda i: i.update(codebase_version="v3.0"))),
        r"codebase_version is 'v3\.0', but meta/episodes/ is absent and meta/episodes\.jsonl is there, as in v2\.1",
    ),
    "no version": (info(lambda i: i.pop("codebase_version")), r"codebase_version is None, but .* laid out as v3\.0"),
    # names
    "columns actions and state": (
        lambda root: rename_columns(root, {"action": "actions", "observation.state": "state"}, also_in_info=True),
        r"no feature 'observation\.state' \('state' looks like it\), no 'action' \('actions' looks like it\); found "
        r"state, actions, observation\.images\.color, .*rename",
    ),
    "an image feature called image": (
        info(lambda i: i.update(features={
            {COLOR: "image"}.get(k, k): f for k, f in i["features"].items() if "wrist" not in k
        })),
        r"no feature 'observation\.images\.<camera>' \('image' looks like it\); found .*, action, image, timestamp",
    ),
    "no action": (
        info(lambda i: i["features"].pop("action")),
        r"info\.json: no feature 'action'; found observation\.state, .*the evaluation needs states, recorded actions",
    ),
    "a column that info.json calls otherwise": (
        lambda root: rename_columns(root, {"action": "actions"}, also_in_info=False),
        r"file-000\.parquet: no column 'action' \('actions' looks like 'action'\); found observation\.state, actions",
    ),
    "no camera": (
        info(lambda i: [i["features"].pop(f"observation.images.{c}") for c in ("color", "wrist")]),
        r"no feature 'observation\.images\.<camera>'; found observation\.state, action, timestamp",
    ),
    # the episodes' own files
    "episodes in two places": (
        lambda root: shutil.copy(root / EPISODES, root / "meta" / "episodes" / "episodes.parquet"),
        r"episode 0 is listed in meta/episodes/chunk-000/file-000\.parquet and in meta/episodes/episodes\.parquet;",
    ),
    "episodes in two places, one of them old": (
        lambda root: shutil.copy(root / EPISODES, root / "meta" / "episodes.parquet"),
        r"episode 0 is listed in meta/episodes/chunk-000/file-000\.parquet and in meta/episodes\.parquet; delete",
    ),
    "no episodes": (lambda root: (root / EPISODES).unlink(), r"meta: no episodes/\*/\*\.parquet in it; copy"),
    "an episode nowhere": (
        set_value("data/file_index", 1, None, EPISODES),
        r"data/file_index of episode 1 is None, expected a whole number",
    ),
    "an episode at no time": (
        set_value(f"videos/{COLOR}/from_timestamp", 1, NAN, EPISODES),
        r"from_timestamp of episode 1 is nan, expected seconds",
    ),
    # values
    "a state that is not finite": (
        set_value("observation.state", 4, JOINT),
        r"episode 0: observation\.state: elbow is nan at frame 4, expected a finite number \(1 such values",
    ),
    "an action that is not finite": (
        set_value("action", 4, JOINT), r"episode 0: action: value 2 is nan at frame 4, expected a finite number",
    ),
    "other joints than declared": (
        info(lambda i: i["features"]["observation.state"].update(shape=[7])),
        r"observation\.state: info\.json says 7 values a row, found 54 in 9",
    ),
    "times that go back": (
        set_value("timestamp", 5, 0.0), r"episode 0: timestamp 0\.0 s of frame 5 does not follow the one before it",
    ),
    # paths and files that lead out of the dataset, or ask for more than one can need
    "a data path that is absolute": (
        info(lambda i: i.update(data_path="/data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet")),
        r"info\.json: data_path: names '/data/chunk-000/file-000\.parquet', expected a path below the dataset's folder",
    ),
    "a data path that climbs": (
        info(lambda i: i.update(data_path="x/../../joined/data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet")),
        r"data_path: names 'x/\.\./\.\./joined/data/.*', expected a path below the dataset's folder",
    ),
    "a video path that climbs": (
        info(lambda i: i.update(video_path="../joined/" + i["video_path"])),
        r"video_path: names '\.\./joined/videos/.*', expected a path below the dataset's folder",
    ),
    "a path of gigabytes": (
        info(lambda i: i.update(data_path="{chunk_index:02000000000d}{file_index}")),
        r"data_path is '\{chunk_index:02000000000d\}.*, expected a path with \{chunk_index\}",
    ),
    "a video that is a list of others": (
        lambda root: (root / VIDEO).rename((root / VIDEO).with_name("other.mp4"))
        and (root / VIDEO).write_text("ffconcat version 1.0\nfile other.mp4\n"),
        r"file-000\.mp4: is damaged or cut short \(Invalid argument",
    ),
    "pictures of gigabytes": (
        info(lambda i: i["features"][COLOR].update(shape=[30000, 30000, 3])),
        r"info\.json: .*color: shape is \[30000, 30000, 3\], expected at most 33554432 pixels",
    ),
    "info.json is nested without end": (
        lambda root: (root / "meta" / "info.json").write_text("[" * 1_000_000),
        r"info\.json: cannot be read as JSON \(maximum recursion",
    ),
    # info.json
    "no fps": (info(lambda i: i.update(fps=0)), r"info\.json: fps is 0, expected a positive number"),
    "a template of v2.1": (
        info(lambda i: i.update(video_path="videos/chunk-{episode_chunk:03d}/{video_key}/{episode_index:06d}.mp4")),
        r"video_path is 'videos/chunk-.*', expected a path with \{video_key\}, \{chunk_index\}, \{file_index\}",
    ),
    "no template": (info(lambda i: i.update(video_path=None)), r"video_path is None, expected a path with"),
    "broken features": (info(lambda i: i.update(features=[])), r"info\.json: features: expected \{name: "),
    "info.json is cut": (
        lambda root: cut(root / "meta" / "info.json", 0.5), r"info\.json: cannot be read as JSON \(.*\); copy",
    ),
    "info.json is absent": (
        lambda root: (root / "meta" / "info.json").unlink(),
        r"expected a LeRobot dataset with meta/info\.json, found data, .*meta, videos",
    ),
    "nothing there": (shutil.rmtree, r"joined: expected the folder of a LeRobot dataset, found nothing there"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_clear_line(joined: Path, damage: str) -> None:
    """Each thing seen in the wild is a SourceError of one line that names the file, what was found and expected."""
    change, expected = DAMAGES[damage]
    change(joined)
    with pytest.raises(SourceError, match=expected) as caught:
        read_all(LeRobotDatasetSource(joined))
    message = str(caught.value)
    assert "\n" not in message and str(joined) in message
    assert len(message.removeprefix(str(joined))) < 500, "one line that a person reads"


@pytest.mark.parametrize(
    "damage",
    [
        "declared video absent",
        "truncated video",
        "truncated video with its index at the end",
        "a state that is not finite",
        "rows are shuffled",
    ],
)
def test_damage_is_found_before_the_first_frame_is_decoded(joined: Path, damage: str) -> None:
    """episode() says so already: an evaluation of many episodes does not stop at the last one after an hour."""
    change, expected = DAMAGES[damage]
    change(joined)
    with pytest.raises(SourceError, match=expected):
        LeRobotDatasetSource(joined).episode(0)


def test_a_part_of_a_dataset_serves_the_episodes_that_it_has(written: Path, tmp_path: Path) -> None:
    """Datasets are large and downloaded in parts: what is there is read, what is not is said when asked for."""
    root = Path(shutil.copytree(written / "split", tmp_path / "split"))
    last = max(root.glob(f"videos/{COLOR}/*/*.mp4"))
    last.unlink()
    source = LeRobotDatasetSource(root)
    assert len(list(source.frames(0))) == 9
    with pytest.raises(SourceError, match=f"{last}: .* that of episode 4 is absent"):
        source.episode(4)


def png(height: int, width: int) -> bytes:
    """The header of a PNG of this size, and the end of one; there is not a pixel in it."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    chunks = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def picture(kind: str) -> bytes:
    target = io.BytesIO()
    PIL.Image.new("RGB", (64, 48)).save(target, kind)
    return target.getvalue()


PICTURES = {  # what stands in the place of a picture of 48x64, and what is said of it
    "no picture": (b"not a picture", "the image cannot be read"),
    "damaged": (b"\x89PNG\r\n\x1a\n" + bytes(20), "the image cannot be read"),
    "one that PIL fears": (png(30000, 30000), "the image cannot be read .*decompression bomb"),
    "one that PIL warns of": (png(9999, 9999), r"the image is 9999x9999 \(HxW\), info\.json says 48x64"),
    "one that is too large": (png(5000, 5000), r"the image is 5000x5000 \(HxW\), info\.json says 48x64"),
    "another format": (picture("EPS"), "the image cannot be read .*cannot identify"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("content, fact", PICTURES.values(), ids=list(PICTURES))
def test_a_damaged_picture_is_one_clear_line(written: Path, tmp_path: Path, content: bytes, fact: str) -> None:
    """Its size is known, and refused, before a pixel is decoded."""
    root = Path(shutil.copytree(written / "images", tmp_path / "images"))
    edit_table(root / DATA, lambda rows: rows[3][COLOR].update(bytes=content))
    with pytest.raises(SourceError, match=f"color, frame 3 of episode 0: {fact}"):
        read_all(LeRobotDatasetSource(root))


@pytest.mark.parametrize("where", ["outside", "above", "no file"])
def test_a_picture_outside_the_dataset_is_not_read(written: Path, tmp_path: Path, where: str) -> None:
    """A parquet may name any path; a link inside, as all of Hugging Face's cache is, is followed."""
    root = Path(shutil.copytree(written / "images", tmp_path / "images"))
    (tmp_path / "secret.png").write_bytes(pq.read_table(root / DATA)[COLOR][3].as_py()["bytes"])
    (root / "linked.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(root / "pipe.png")
    path = {"outside": str(tmp_path / "secret.png"), "above": "x/../../secret.png", "no file": "pipe.png"}[where]
    edit_table(root / DATA, lambda rows: rows[3][COLOR].update(bytes=None, path="linked.png"))
    assert read_all(LeRobotDatasetSource(root))
    edit_table(root / DATA, lambda rows: rows[3][COLOR].update(bytes=None, path=path))
    expected = "is not a regular file" if where == "no file" else f"names '{path}', expected a path below the dataset's"
    with pytest.raises(SourceError, match=f"color, frame 3 of episode 0: .*{expected}"):
        read_all(LeRobotDatasetSource(root))


def test_a_damaged_video_ends_although_others_want_its_log(joined: Path) -> None:
    """torchvision switches av's log to Python on; a decoding thread that complains then waits for the interpreter,
    which waits for the thread. Without the switch back, this hangs within seconds."""
    file = joined / VIDEO
    encode(file, decode(file), 7, "mpeg4", {"g": "12"})
    content = bytearray(file.read_bytes())
    content[3000:3400] = bytes(400)
    file.write_bytes(content)
    code = f"""
import av
from ur10e_deploy.lerobot_dataset import LeRobotDatasetSource as S
from ur10e_deploy.sources import SourceError
av.logging.set_level(av.logging.ERROR)
refused, source = 0, S({str(joined)!r})
for i in [*source.episode_indices()] * 60:
    try:
        list(source.frames(i))
    except SourceError:
        refused += 1
print(refused)
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "deploy")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert int(result.stdout) >= 0, result.stderr


def test_uneven_times_are_said(written: Path, tmp_path: Path) -> None:
    """A recorder that stored its own clock: the frames are read, and the step that is not 1 / fps is noted."""
    root = Path(shutil.copytree(written / "images", tmp_path / "images"))
    edit_table(root / DATA, lambda rows: rows[4].update(timestamp=0.5))
    source = LeRobotDatasetSource(root)
    source.episode(0)
    assert len(source.notes) == 1 and "1 of 4 steps in time are not 1 / fps = 0.08 s" in source.notes[0]


def test_a_camera_that_cannot_be_read_is_said(joined: Path) -> None:
    """A depth map or a camera under another name does not stop the evaluation, but it is not passed over in silence."""
    edit_info(joined, lambda i: i["features"][COLOR].update(shape=[48, 64, 1]))
    source = LeRobotDatasetSource(joined)
    assert list(source.cameras) == ["wrist"]
    assert source.notes == [f"{COLOR} is not read: its shape is [48, 64, 1], not that of a colour image"]


@pytest.mark.parametrize("names", [["channels", "height", "width"], None])
def test_channels_may_be_declared_first(joined: Path, names: list[str] | None) -> None:
    edit_info(joined, lambda i: i["features"][COLOR].update(shape=[3, 48, 64], names=names))
    assert LeRobotDatasetSource(joined).cameras["color"] == (48, 64)


@pytest.mark.parametrize(
    ("names", "expected"), [({"motors": list("abcdef")}, list("abcdef")), (None, None), (["a"], None)]
)
def test_joint_names_are_as_the_dataset_says_or_not_at_all(joined: Path, names: object, expected: object) -> None:
    edit_info(joined, lambda i: i["features"]["observation.state"].update(names=names))
    assert LeRobotDatasetSource(joined).joint_names == expected


# -- bags ---------------------------------------------------------------------------------------------------------


def checkpoint_values(**changes: object) -> dict:
    """The merged data and conventions of a checkpoint that was trained with config.yaml's defaults."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    return config["data"] | config["conventions"] | changes


def test_bags_are_read_as_in_training(sample_bags: Path, tmp_path: Path) -> None:
    """Frame by frame what ChunkDataset gives the trainer: states, actions, pixels, with its resize and conventions."""
    sign = {"joint_sign": [1, -1, 1, 1, -1, 1], "apply_joint_sign": True}
    values = checkpoint_values(image_resize=[24, 32], fps=10, **sign)
    source = BagSource(sample_bags, values, tmp_path / "cache")
    trained_on = {"bag_dir": sample_bags, "cache_dir": tmp_path / "training-cache"}
    episodes, _ = load_episodes(settings_from(values | trained_on), progress=False)
    assert [source.episode_name(i) for i in source.episode_indices()] == [e.name for e in episodes]
    assert (source.fps, source.action_mode, source.resized) == (10.0, "delta", True)
    assert source.joint_names == list(bags.JOINTS)
    assert source.cameras == {"color": (24, 32)}
    for index in (0, 4):
        episode, dataset = source.episode(index), ChunkDataset([episodes[index]], chunk_size=1)
        frames = list(source.frames(index))
        assert len(frames) == len(dataset) + 1 == len(episode.timestamp_s)
        assert np.allclose(np.diff(episode.timestamp_s), 0.1) and episode.timestamp_s[0] == 0
        assert np.isnan(episode.action[-1]).all() and np.isfinite(episode.action[:-1]).all()
        for frame, sample in zip(frames, (dataset[i] for i in range(len(dataset))), strict=False):
            assert np.array_equal(frame.state_rad, sample["observation.state"])
            assert np.array_equal(episode.action[frame.index], sample["action"][0])
            assert np.array_equal(frame.images["color"], sample["observation.images.color"])
            assert frame.images["color"].flags.owndata
    assert len(list((tmp_path / "cache").glob("*/meta.json"))) == 2, "only the bags that were asked for are decoded"


def test_the_cache_of_training_serves_the_evaluation(sample_bags: Path, tmp_path: Path) -> None:
    values, cache = checkpoint_values(image_resize=[24, 32]), tmp_path / "cache"
    load_episodes(settings_from(values | {"bag_dir": sample_bags, "cache_dir": cache}), progress=False)
    before = {file: file.stat().st_mtime_ns for file in cache.rglob("*.rgb")}
    source = BagSource(sample_bags, values, cache)
    assert [len(list(source.frames(i, 0, 2))) for i in source.episode_indices()] == [2] * 6
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.rgb")} == before


def test_a_gap_in_a_bag_cuts_the_episode(tmp_path: Path) -> None:
    """Frames were dropped there: the frame before it has no action, and the segment changes."""
    take = bags.make_take(seconds=2.0, path=bags.smooth_path)
    hole = (take.camera_ns > take.camera_ns[20]) & (take.camera_ns < take.camera_ns[35])
    messages = [m for m in take.messages() if not (m[0] == bags.CAMERA_TOPIC and m[1] in set(take.camera_ns[hole]))]
    bags.write_bag(tmp_path / "bags" / "gap", messages)
    source = BagSource(tmp_path / "bags", checkpoint_values(), tmp_path / "cache")
    assert source.cameras == {"color": (6, 8)}
    episode = source.episode(0)
    (ends,) = np.flatnonzero(np.diff(episode.segment))[None]
    assert len(ends) == 1 and set(episode.segment) == {0, 1}
    assert list(np.flatnonzero(np.isnan(episode.action).any(axis=1))) == [ends[0], len(episode.segment) - 1]
    assert episode.timestamp_s[ends[0] + 1] - episode.timestamp_s[ends[0]] > 0.3
    shown = {frame.index: frame.images["color"] for frame in source.frames(0)}
    assert any(np.array_equal(shown[0], image) for image in take.images)


def test_a_bag_of_which_training_would_take_too_little_can_be_judged(tmp_path: Path) -> None:
    """data.min_used_share is for training; checkpoints from before it was there do not have it."""
    take = bags.make_take(seconds=1.0)
    messages = [m for m in take.messages() if m[0] == bags.JOINT_TOPIC or m[1] < take.camera_ns[6]]
    bags.write_bag(tmp_path / "bags" / "a", messages)
    values = checkpoint_values()
    for settings in (values, {key: value for key, value in values.items() if key != "min_used_share"}):
        assert len(list(BagSource(tmp_path / "bags", settings, tmp_path / "cache").frames(0))) == 6


def test_the_identity_of_bags_is_their_content(sample_bags: Path, tmp_path: Path) -> None:
    """The same bags elsewhere, or read with other settings, are the same; one more or one changed bag is not."""
    copied = Path(shutil.copytree(sample_bags, tmp_path / "bags"))
    identity = BagSource(sample_bags, checkpoint_values(), tmp_path / "cache").identity
    other = BagSource(copied, checkpoint_values(fps=10), tmp_path / "cache").identity
    assert (identity["kind"], identity["episodes"], identity["frames"]) == ("rosbag2", 6, None)
    assert identity["sha256"] == other["sha256"] and other["read_with"]["fps"] == 10
    json.dumps(identity)
    shutil.rmtree(next(p for p in sorted(copied.iterdir()) if p.is_dir()))
    assert BagSource(copied, checkpoint_values(), tmp_path / "cache").identity["sha256"] != identity["sha256"]
    assert not (tmp_path / "cache").exists(), "nothing was decoded for it"


def test_a_bad_bag_is_an_error_only_when_it_is_asked_for(tmp_path: Path) -> None:
    for name in ("a", "b"):
        bags.write_bag(tmp_path / "bags" / name, bags.make_take().messages())
    cut(bags.storage_file(tmp_path / "bags" / "b"), 0.5)
    source = BagSource(tmp_path / "bags", checkpoint_values(on_bad_bag="skip"), tmp_path / "cache")
    assert len(list(source.frames(0))) > 20
    with pytest.raises(SourceError, match=r"bags: b: .* is damaged or not a finished recording"):
        source.episode(1)
    with pytest.raises(SourceError, match=r"no episode 2; the folder has 2 episodes in 2 bags, from 0 on"):
        source.episode(2)


def test_bags_that_do_not_fit_are_one_clear_line(tmp_path: Path) -> None:
    bags.write_bag(tmp_path / "bags" / "a", bags.make_take().messages())
    bags.write_bag(tmp_path / "bags" / "b", bags.make_take(size=(8, 8)).messages())
    (tmp_path / "empty").mkdir()

    def read(folder: str, **changes: object) -> None:
        values = {key: value for key, value in checkpoint_values(**changes).items() if value != "absent"}
        source = BagSource(tmp_path / folder, values, tmp_path / "cache")
        for index in source.episode_indices():
            source.episode(index)

    for folder, changes, expected in (
        ("nowhere", {}, r"nowhere: expected a folder of ROS 2 bags .*, found nothing; check the path"),
        ("empty", {}, r"empty: expected a folder of ROS 2 bags .*, found none; check the path"),
        ("bags", {"fps": "absent"}, r"the checkpoint's settings: the config lacks fps"),
        ("bags", {"camera_topic": "/front"}, r"bags: a: data\.camera_topic: no topic /front; .*in this bag:"),
        ("bags", {}, r"images of b are .*8, 8.*, those of a are .*6, 8.*evaluate them apart"),
    ):
        with pytest.raises(SourceError, match=expected) as caught:
            read(folder, **changes)
        assert "\n" not in str(caught.value)
