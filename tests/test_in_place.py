"""Pictures read in the bags: the same samples as from a copy, no pixel written, and never a wrong one."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import shutil
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from rosbag_dataset import (
    BagError,
    ChunkDataset,
    cache,
    compute_stats,
    find_bags,
    in_place,
    load_episodes,
    open_pixels,
    pruning,
)
from tests.bags import (
    CAMERA_TOPIC,
    T0_NS,
    compressed,
    compressed_video,
    encode,
    image,
    make_take,
    noise_images,
    settings,
    storage_file,
    strip_mcap_index,
    write_bag,
    write_split_bag,
)
from tests.checks import STORAGES, TAKE, both_storages, cut, entries, error_of, flip, load, still_joints
from tests.test_video import stream
from tests.tiny import assert_same_run, run, run_process
from training import feed
from training.failures import explain

WRIST = "/wrist/image"


def with_pictures(make, take=TAKE):
    """The take's messages with other pictures: make(time in ns, (H, W, 3)) instead of the Image."""
    pixels = dict(zip(take.camera_ns.tolist(), take.images, strict=True))
    return [(topic, t, make(t, pixels[t]) if topic == CAMERA_TOPIC else m) for topic, t, m in take.messages()]


def jpeg(time_ns, pixels):
    return compressed(time_ns, encode(cv2.resize(pixels, (64, 48)), ".jpg"))


def two_cameras():
    """Raw and JPEG, at different rates, of different sizes; one picture is black."""
    wrist = [(WRIST, int(t), jpeg(int(t), p)) for t, p in zip(TAKE.camera_ns[::2], TAKE.images[::2], strict=True)]
    black = dataclasses.replace(TAKE, images=TAKE.images * (np.arange(len(TAKE.images)) != 5)[:, None, None, None])
    return sorted(black.messages() + wrist, key=lambda m: m[1])


def pauses():
    """A take with a pause of a second in the middle: two episodes with data.episodes: gaps."""
    take = make_take(seconds=2.4, seed=2)
    return [m for m in take.messages() if not 0.7 <= (m[1] - T0_NS) / 1e9 < 1.7]


CASES = {
    "raw": (lambda path, how: write_bag(path, TAKE.messages(), how), {}),
    "bgr8, resized": (
        lambda path, how: write_bag(path, with_pictures(lambda t, p: image(t, p, "bgr8")), how),
        {"image_resize": [3, 4]},
    ),
    "jpeg, resized": (lambda path, how: write_bag(path, with_pictures(jpeg), how), {"image_resize": [40, 60]}),
    "two cameras": (
        lambda path, how: write_bag(path, two_cameras(), how),
        {"camera_topics": {"color": CAMERA_TOPIC, "wrist": WRIST}},
    ),
    "several files": (
        lambda path, how: write_split_bag(path, [TAKE.messages()[:30], TAKE.messages()[30:]], storage=how),
        {},
    ),
    "two publishers": (lambda path, how: write_bag(path, TAKE.messages(), how, publishers=2), {}),
    "cut in two": (lambda path, how: write_bag(path, pauses(), how), {"episodes": "gaps", "episode_pause_s": 0.5}),
    "header stamps": (lambda path, how: write_bag(path, TAKE.messages(5_000_000), how), {"time_source": "header"}),
}


def both_ways(bag_dir, **changes):
    """The episodes of a folder with the pictures in the cache, and in the bags."""
    cached, _ = load(settings(bag_dir, frames="cache", **changes))
    in_bags, _ = load(settings(bag_dir, frames="bags", **changes))
    assert all(e.source is None for e in cached) and all(e.source is not None for e in in_bags)
    return cached, in_bags


def assert_equal_samples(cached, in_bags):
    """Every sample, and every stored picture, whether some frame shows it or not; what is known of the recordings."""
    for a, b in zip(cached, in_bags, strict=True):
        assert (a.name, a.sync_report, a.recording_hash) == (b.name, b.sync_report, b.recording_hash)
        for camera in a.image_shape:
            np.testing.assert_array_equal(open_pixels(a, camera), open_pixels(b, camera))
    ours, theirs = (ChunkDataset(episodes, 8) for episodes in (in_bags, cached))
    everything = list(range(len(theirs)))[::-1]
    one, other = ours.__getitems__(everything), theirs.__getitems__(everything)
    assert one.keys() == other.keys() and len(everything)
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])


def pixel_bytes(cache_dir: Path) -> int:
    return sum(file.stat().st_size for file in cache_dir.rglob("*.rgb"))


@both_storages
@pytest.mark.parametrize("make, changes", CASES.values(), ids=list(CASES))
def test_samples_are_equal_bit_by_bit(tmp_path, storage, make, changes):
    """...to those from a copy, as are the report (with the faults of pictures) and what tells recordings apart; and of
    the pictures nothing is written."""
    make(tmp_path / "bags" / "a", storage)
    make(tmp_path / "bags" / "b", storage)
    in_bags, _ = load(settings(tmp_path / "bags", frames="bags", **changes))
    assert pixel_bytes(tmp_path / "cache") == 0
    assert_equal_samples(*both_ways(tmp_path / "bags", **changes))
    if "camera_topics" in changes:
        assert in_bags[0].sync_report["picture_faults"]["color"]["black"]["count"] == 1


@pytest.mark.parametrize("unchunk", [False, True])
def test_an_mcap_without_an_index(tmp_path, unchunk):
    """As a recorder that was killed leaves it, and one without chunks: messages are found by walking the records."""
    strip_mcap_index(storage_file(write_bag(tmp_path / "bags" / "a", TAKE.messages(), "mcap")), unchunk)
    assert_equal_samples(*both_ways(tmp_path / "bags"))


def test_image_statistics_and_frames_on_the_device_are_the_same(tmp_path):
    """What else looks at all pixels: data.image_stats: dataset, and the copy on a GPU (staged on the CPU)."""
    for i in range(3):
        write_bag(tmp_path / "bags" / f"{i}", make_take(seconds=2.5, seed=i).messages(), STORAGES[i % 2])
    cached, in_bags = both_ways(tmp_path / "bags")
    ours, theirs = (compute_stats(e, "dataset", 8)[0]["observation.images.color"] for e in (in_bags, cached))
    assert all((ours[key] == theirs[key]).all() for key in theirs)
    here = torch.device("cpu")
    ours, theirs = (feed.DeviceFrames(ChunkDataset(e, 4), here).frames["color"] for e in (in_bags, cached))
    assert torch.equal(ours, theirs) and len(theirs) > feed.BLOCK
    assert feed.DeviceFrames.size_bytes(in_bags) == feed.DeviceFrames.size_bytes(cached) == theirs.numel()


# -- workers ------------------------------------------------------------------------------------------------------


def test_workers_that_are_forked_or_spawned_read_the_same(tmp_path):
    """Each opens files of its own, also when this process has read before; what travels to them holds no index."""
    for i, storage in enumerate(STORAGES):
        write_bag(tmp_path / "bags" / storage, make_take(seconds=0.4, seed=i).messages(), storage)
    cached, in_bags = both_ways(tmp_path / "bags")
    dataset, everything = ChunkDataset(in_bags, 4), list(range(len(ChunkDataset(cached, 4))))
    wanted = ChunkDataset(cached, 4).__getitems__(everything)["observation.images.color"]
    np.testing.assert_array_equal(dataset.__getitems__(everything)["observation.images.color"], wanted)
    assert len(pickle.dumps(dataset)) < len(pickle.dumps(ChunkDataset(cached, 4))) + 2000
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            got = pool.map(dataset.__getitem__, everything)
        np.testing.assert_array_equal([sample["observation.images.color"] for sample in got], wanted)


def test_a_forked_worker_resizes_although_this_process_had_threads(tmp_path):
    """OpenCV's pool of threads does not survive a fork: a worker that waited for one would wait for ever."""
    take = make_take(seconds=0.2, size=(960, 1280))  # large enough for OpenCV to divide it among threads
    write_bag(tmp_path / "bags" / "a", take.messages())
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(4)
        episodes, _ = load(settings(tmp_path / "bags", frames="bags", image_resize=[480, 640]))
        cv2.setNumThreads(4)
        cv2.resize(np.zeros((2000, 2000, 3), np.uint8), (1000, 1000), interpolation=cv2.INTER_AREA)
        dataset = ChunkDataset(episodes, 4)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            sample = pool.apply_async(dataset.__getitem__, (0,)).get(timeout=60)
    finally:
        cv2.setNumThreads(threads)
    assert sample["observation.images.color"].any()


def test_few_files_are_open_and_none_is_mapped(tmp_path, monkeypatch):
    """Of thousands of bags, each with a file and an index: the one not used for longest is closed."""
    for i in range(5):
        write_bag(tmp_path / "bags" / f"{i}", make_take(seconds=0.3, seed=i).messages(), STORAGES[i % 2])
    cached, in_bags = both_ways(tmp_path / "bags")
    monkeypatch.setattr(in_place, "MAX_OPEN_FILES", 3)
    before = len(os.listdir("/proc/self/fd"))
    dataset = ChunkDataset(in_bags, 4)
    everything = np.random.default_rng(0).permutation(len(dataset)).tolist()
    got, wanted = dataset.__getitems__(everything), ChunkDataset(cached, 4).__getitems__(everything)
    np.testing.assert_array_equal(got["observation.images.color"], wanted["observation.images.color"])
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    maps = Path("/proc/self/maps").read_text()
    assert not any(str(file) in maps for bag in find_bags(tmp_path / "bags") for file in bag.files)
    del dataset
    assert len(os.listdir("/proc/self/fd")) == before


def test_another_threads_garbage_collection_closes_the_files(tmp_path, monkeypatch):
    """sqlite's connections ask by default to be closed where they were opened; Python collects garbage anywhere."""
    write_bag(tmp_path / "bags" / "a", TAKE.messages())
    _, in_bags = both_ways(tmp_path / "bags")
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    before = len(os.listdir("/proc/self/fd"))
    held = [ChunkDataset(in_bags, 4)]
    held[0][0]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert not complaints and len(os.listdir("/proc/self/fd")) == before


# -- a bag that changed -------------------------------------------------------------------------------------------


def another_take(file: Path) -> None:
    """A recording of the same size in its place."""
    take, storage = make_take(seconds=3.2, size=(100, 100), seed=9), "mcap" if file.suffix == ".mcap" else "sqlite3"
    shutil.copy(storage_file(write_bag(file.parents[2] / "other" / "a", take.messages(), storage)), file)


def one_bit(file: Path) -> None:
    """...of a picture in the middle, where a bag's content hash does not look."""
    flip(file, file.stat().st_size // 2 + 100)


AFTERWARDS = {
    "cut": (cut, "cannot be read|not where it was"),
    "gone": (Path.unlink, "No such file|unable to open"),
    "replaced": (another_take, "not where it was, or another one"),
    "one bit": (one_bit, "not where it was, or another one"),
}


@both_storages
@pytest.mark.parametrize("change, why", AFTERWARDS.values(), ids=list(AFTERWARDS))
def test_a_bag_that_changes_under_a_run_is_one_line(tmp_path, storage, change, why):
    """Whatever became of it: no wrong pixel is handed out, and the line names bag, file and picture."""
    take = make_take(seconds=3.2, size=(100, 100))
    file = storage_file(write_bag(tmp_path / "bags" / "a", take.messages(), storage))
    assert file.stat().st_size > 2 << 20
    content_hash = find_bags(tmp_path / "bags")[0].content_hash()
    episodes, _ = load(settings(tmp_path / "bags", frames="bags"))
    change(file)
    if change is one_bit:
        assert find_bags(tmp_path / "bags")[0].content_hash() == content_hash
        episodes, _ = load(settings(tmp_path / "bags", frames="bags"))  # nor does a new start notice
    dataset, line = ChunkDataset(episodes, 4), ""
    for index in range(len(dataset)):
        try:
            shown = dataset[index]["observation.images.color"]
        except BagError as error:
            line = str(error)
        else:
            np.testing.assert_array_equal(shown, take.images[episodes[0].image_index["color"][index]])
    assert line.startswith(f"a: {file}: picture ") and len(line.splitlines()) == 1
    assert any(words in line for words in why.split("|")) and "put it back" in line, line


def test_a_bag_that_was_recorded_anew_is_read_anew(tmp_path):
    write_bag(tmp_path / "bags" / "a", TAKE.messages(), "mcap")
    load(settings(tmp_path / "bags", frames="bags"))
    shutil.rmtree(tmp_path / "bags" / "a")
    take = make_take(seconds=0.4, seed=5)
    write_bag(tmp_path / "bags" / "a", take.messages(), "mcap")
    (episode,), _ = load(settings(tmp_path / "bags", frames="bags"))
    np.testing.assert_array_equal(open_pixels(episode, "color"), take.images)


def test_the_line_of_a_loaders_process_is_one_line(tmp_path):
    """...without the traceback that torch puts before it."""
    file = storage_file(write_bag(tmp_path / "bags" / "a", TAKE.messages(), "mcap"))
    episodes, _ = load(settings(tmp_path / "bags", frames="bags"))
    cut(file)
    dataset = ChunkDataset(episodes, 4)
    stream_ = feed.SampleStream(len(dataset), len(dataset), 0, 1, 0)
    batches = iter(feed.make_loader(dataset, stream_, 1, torch.device("cpu")))
    try:
        with pytest.raises(BagError) as caught:
            next(batches)
    finally:
        feed.end_loader(batches)
    line = explain(caught.value, None)
    assert line is not None and line.startswith(f"a: {file}: picture ") and "Traceback" not in line


def test_a_checksum_notices_any_bit_and_any_order():
    """In sizes around those of its blocks: one bit that turns, and two words that change places."""
    for size in (1, 7, 8, 8191, 8192, 8193, 30_000):
        data = noise_images(1, (size, 1), 0)[0].ravel()[:size].copy()
        first = in_place.checksum(data.tobytes())
        assert first == in_place.checksum(memoryview(data))
        for at in {0, size // 2, size - 1}:
            for bit in (0, 7):
                data[at] ^= 1 << bit
                assert in_place.checksum(data.tobytes()) != first
                data[at] ^= 1 << bit
        if size >= 16:
            swapped = np.concatenate([data[8:16], data[:8], data[16:]])
            assert in_place.checksum(swapped.tobytes()) != first


# -- the index is an entry of the cache ---------------------------------------------------------------------------

DAMAGES = {
    "cut": lambda entry: cut(entry / "color.places"),
    "gone": lambda entry: (entry / "color.places").unlink(),
    "meta.json cut": lambda entry: cut(entry / "meta.json"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_index_is_made_again(bag_dir, damage, capfd):
    """Said, and again as an index."""
    (episode, _), _ = load(settings(bag_dir, frames="auto"))
    damage(episode.entry)
    (again, _), _ = load(settings(bag_dir, frames="auto"))
    assert again.entry == episode.entry and again.source is not None and pixel_bytes(bag_dir.parent / "cache") == 0
    np.testing.assert_array_equal(open_pixels(again, "color"), TAKE.images)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("frame cache: ") and line.endswith("; decoding a again")


def test_settings_after_the_cache_read_no_bag_again(bag_dir, monkeypatch):
    """As with pixels: another rate, another kind of action."""
    load(settings(bag_dir, frames="bags"))
    monkeypatch.setattr(cache, "read_bag", None)
    load(settings(bag_dir, frames="bags", fps=10, action_mode="absolute"))


def test_a_copy_that_is_there_is_used(bag_dir, monkeypatch):
    """With auto nothing is decoded again, and new bags are read in place beside it."""
    load(settings(bag_dir, frames="cache"))
    monkeypatch.setattr(cache, "read_bag", None)
    episodes, _ = load(settings(bag_dir, frames="auto"))
    assert [e.source for e in episodes] == [None, None]
    monkeypatch.undo()
    write_bag(bag_dir / "c", make_take(seconds=0.4, seed=2).messages())
    episodes, _ = load(settings(bag_dir, frames="auto"))
    assert [e.source is None for e in episodes] == [True, True, False]


def test_pruning_knows_what_is_needed(bag_dir, tmp_path, capsys):
    """An index, and with auto a copy as well; with data.frames: cache the index is not."""
    for frames in ("cache", "bags"):
        load(settings(bag_dir, frames=frames))
    cache_dir = bag_dir.parent / "cache"
    for frames, kept in (("auto", 4), ("cache", 2), ("bags", 2)):
        config = tmp_path / f"{frames}.yaml"
        config.write_text(f"data: {{frames: {frames}, time_source: receive}}\n")
        needed = pruning.keys_needed([bag_dir], [config])
        assert len(needed & {*entries(cache_dir)}) == kept, frames
    bags = {entry.bag for entry in pruning.find_entries(cache_dir)}
    assert bags == {"a", "b", "(2 episodes of 2 bags)"}
    assert pruning.main([str(cache_dir)]) == 0 and "6 entries" in capsys.readouterr().out


# -- data.frames: auto --------------------------------------------------------------------------------------------


def video():
    """The take with pictures of a video."""
    packets = [packet for packet, _ in stream("h264")]
    pictures = [
        (CAMERA_TOPIC, int(t), compressed_video(int(t), packet, "h264"))
        for t, packet in zip(TAKE.camera_ns, packets, strict=False)
    ]
    return sorted([m for m in TAKE.messages() if m[0] != CAMERA_TOPIC] + pictures, key=lambda m: m[1])


SLOW = {
    "chunks": (lambda path: write_bag(path, TAKE.messages(), "mcap", "storage"), "a.mcap is compressed in chunks"),
    "messages": (lambda path: write_bag(path, TAKE.messages(), "mcap", "message"), "its messages is compressed"),
    "file": (lambda path: write_bag(path, TAKE.messages(), "sqlite3", "file"), "a.db3.zstd is compressed as a whole"),
    "video": (lambda path: write_bag(path, video()), "is video, of which a picture needs those before it"),
}


@pytest.mark.parametrize("make, why", SLOW.values(), ids=list(SLOW))
def test_what_is_slow_at_random_goes_into_the_cache(tmp_path, make, why, capfd):
    """With auto, in one line; with `bags` it is refused, and no setting for bad bags passes over that."""
    make(tmp_path / "bags" / "a")
    for on_bad_bag in ("error", "skip"):
        message = error_of(lambda how=on_bad_bag: load(settings(tmp_path / "bags", frames="bags", on_bad_bag=how)))
        assert message.startswith("a: ") and why in message and "data.frames: bags, expected auto (" in message
    assert entries(tmp_path / "cache") == []
    capfd.readouterr()
    (episode,), _ = load_episodes(settings(tmp_path / "bags", frames="auto"), 1, progress=True)
    assert episode.source is None and (episode.entry / "color.rgb").exists()
    (line,) = (text for text in capfd.readouterr().err.splitlines() if text.startswith("frames:"))
    assert line.startswith("frames: pixels into the cache: a: ") and why in line and "data.frames: auto" in line


def test_auto_says_what_a_copy_would_take_and_what_it_measured(bag_dir, capfd, monkeypatch):
    """In one line: in place what is quick, into the cache what is slow to decode; and nothing once that is done."""
    size = 2 * TAKE.images.nbytes / 1e9
    for limit, wanted in ((1000.0, "read in the bags"), (0.0, "into the cache")):  # the machine may be busy
        monkeypatch.setattr(in_place, "MAX_CPU_MS", limit)
        episodes, _ = load_episodes(settings(bag_dir, bag_dir.parent / wanted, frames="auto"), 1, progress=True)
        assert all((e.source is None) == (limit == 0) for e in episodes)
        (line,) = (text for text in capfd.readouterr().err.splitlines() if text.startswith("frames:"))
        assert wanted in line and f"{size:.2f} GB of pixels" in line and "ms of a core" in line
        load_episodes(settings(bag_dir, bag_dir.parent / wanted, frames="auto"), 1, progress=True)
        assert "frames:" not in capfd.readouterr().err
    assert (pixel_bytes(bag_dir.parent / "read in the bags"), pixel_bytes(bag_dir.parent / "into the cache") > 0) == (
        0,
        1,
    )


def test_auto_decides_bag_by_bag(bag_dir, capfd):
    """One that is compressed beside others that are not goes into the cache alone, and is named."""
    write_bag(bag_dir / "c", make_take(seconds=0.4, seed=2).messages(), "mcap", "storage")
    episodes, _ = load_episodes(settings(bag_dir, frames="auto"), 1, progress=True)
    assert [e.source is None for e in episodes] == [False, False, True]
    lines = [text for text in capfd.readouterr().err.splitlines() if text.startswith("frames:")]
    assert len(lines) == 2 and "read in the bags" in lines[0] and "1 of 3 new bags" in lines[1] and "c.mcap" in lines[1]


def test_a_bad_bag_is_as_bad(tmp_path):
    """The same line as from the cache, for a recording that is damaged, and for one in which nothing moves."""
    write_bag(tmp_path / "bags" / "a", still_joints(), "mcap")
    moved = error_of(lambda: load(settings(tmp_path / "bags", frames="cache")))
    assert error_of(lambda: load(settings(tmp_path / "bags", frames="auto"))) == moved
    cut(storage_file(tmp_path / "bags" / "a"))
    damaged = error_of(lambda: load(settings(tmp_path / "bags", frames="cache")))
    assert error_of(lambda: load(settings(tmp_path / "bags", frames="auto"))) == damaged and "damaged" in damaged


# -- through train.py ---------------------------------------------------------------------------------------------


def test_a_run_is_the_same_run_and_resumes_either_way(sample_bags, tmp_path):
    """Two workers, pictures in the bags: every weight and loss is that of a run from the cache; begun from a copy and
    resumed in the bags, too. How frames are read is not what a run is compared by."""
    short = {"training__steps": 4, "training__save_freq": 2}
    usual = run(sample_bags, tmp_path / "cache", data__frames="cache", **short)
    fresh = {**short, "data__cache_dir": tmp_path / "index", "data__frames": "bags"}
    assert_same_run(run(sample_bags, tmp_path / "bags", training__num_workers=2, **fresh), usual)
    assert pixel_bytes(tmp_path / "index") == 0
    run(sample_bags, tmp_path / "mixed", data__frames="cache", **{**short, "training__steps": 2})
    assert_same_run(run(sample_bags, tmp_path / "mixed", "--resume", **fresh), usual)
    contract = json.loads((tmp_path / "mixed/run/last/pretrained_model/train_config.json").read_text())
    assert contract["config"]["data"]["frames"] == "bags"


def test_a_bag_that_vanishes_ends_the_run_in_one_line(sample_bags, tmp_path):
    """Through the entry that users call: named, with what to do, and no traceback."""
    shutil.copytree(sample_bags, tmp_path / "bags")
    code = (
        "import os, sys, pathlib, train; from rosbag_dataset import samples\n"
        "read = samples.PictureReader.read\n"
        "def late(self, index, source, *rest):\n"
        "    [file.unlink(missing_ok=True) for file in source.files]\n"
        "    return read(self, index, source, *rest)\n"
        "samples.PictureReader.read = late\n"
        "sys.exit(train.main(sys.argv[2:]))"
    )
    launcher = (sys.executable, "-c", code)
    late = {"training__num_workers": 1, "data__frames": "bags"}
    result = run_process(tmp_path / "bags", tmp_path, launcher=launcher, **late)
    (line,) = (text for text in result.stderr.replace("\r", "\n").splitlines() if text.startswith("error: "))
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert line.startswith("error: episode_00") and "No such file" in line and "--resume" in line
