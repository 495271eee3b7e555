"""Decoded frames on disk: keyed by what matters, whole or absent, built once, small in memory; and the inspection."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

import rosbag_dataset as rd
from tests.bags import (
    CAMERA_TOPIC,
    JOINT_TOPIC,
    compressed,
    image,
    make_take,
    noise_images,
    settings,
    storage_file,
    write_bag,
)

ROOT = Path(rd.__file__).parent
TAKE = make_take(seconds=0.4)


@pytest.fixture
def bag_dir(tmp_path):
    """A folder with two bags, one of each storage."""
    write_bag(tmp_path / "bags" / "a", TAKE.messages())
    write_bag(tmp_path / "bags" / "b", make_take(seconds=0.4, seed=1).messages(), "mcap")
    return tmp_path / "bags"


def load(wanted, workers=1):
    return rd.load_episodes(wanted, workers, progress=False)


def entries(cache_dir):
    """Everything in the cache but the lock files, hidden names too."""
    return sorted(p.name for p in cache_dir.iterdir() if p.suffix != ".lock")


def error_of(action):
    with pytest.raises(rd.BagError) as caught:
        action()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def python(code, *args, **how):
    """Start `code` in a Python of its own, with this repository's modules; sys.argv[1:] are `args`."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how,
    )  # fmt: skip


LOAD = """
import sys; from pathlib import Path
import rosbag_dataset as rd; from tests.bags import settings
try:
    episodes, _ = rd.load_episodes(settings(Path(sys.argv[1])), int(sys.argv[2]), False)
    print(len(episodes))
except rd.BagError as error:
    sys.exit(f"BagError: {error}")
"""


# -- what is in it ------------------------------------------------------------------------------------------------


def test_second_start_opens_no_bag(bag_dir, monkeypatch):
    """From the cache come the same episodes, without reading a single message."""
    first, _ = load(settings(bag_dir), workers=2)

    def fail(*args, **also):
        raise AssertionError("a bag was opened")

    monkeypatch.setattr(rd, "read_bag", fail)
    monkeypatch.setattr(rd, "ProcessPoolExecutor", fail)
    second, _ = load(settings(bag_dir))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.state, b.state)
        np.testing.assert_array_equal(a.time_ns, b.time_ns)
        assert a.report == b.report and a.entry == b.entry


def test_random_access_equals_the_source(bag_dir):
    """Any frame of any episode shows the recorded image that is nearest in time, bit by bit."""
    (episode, _), _ = load(settings(bag_dir, fps=60))
    samples = rd.ChunkDataset([episode], chunk_size=4)
    for i in np.random.default_rng(0).permutation(len(samples)):
        tick = episode.time_ns[samples.locate(i)[1]]
        nearest = np.abs(TAKE.camera_ns - tick).argmin()
        np.testing.assert_array_equal(samples[i]["observation.images.color"], TAKE.images[nearest])


def test_several_cameras(tmp_path):
    """Each camera has its own images, size and order."""
    wrist = noise_images(len(TAKE.camera_ns), (4, 5), seed=9)
    extra = [("/wrist", int(t) + 5_000_000, image(0, p)) for t, p in zip(TAKE.camera_ns, wrist, strict=True)]
    write_bag(tmp_path / "bags" / "a", TAKE.messages() + extra)
    topics = {"wrist": "/wrist", "color": CAMERA_TOPIC}
    (episode,), _ = load(settings(tmp_path / "bags", camera_topics=topics))
    sample = rd.ChunkDataset([episode], 4)[3]
    assert list(episode.image_shape) == ["wrist", "color"]
    np.testing.assert_array_equal(sample["observation.images.wrist"], wrist[3])
    np.testing.assert_array_equal(sample["observation.images.color"], TAKE.images[3])


def test_pickled_dataset_holds_no_pixels(tmp_path):
    """What a data loader's worker is sent is small, and gives the same batch there."""
    take = make_take(seconds=1.0, size=(60, 80))
    write_bag(tmp_path / "bags" / "a", take.messages())
    (episode,), _ = load(settings(tmp_path / "bags"))
    samples = rd.ChunkDataset([episode], chunk_size=8)
    everything = list(range(len(samples)))
    batch = samples.__getitems__(everything)
    packed = pickle.dumps(samples)
    assert len(packed) < 20_000 < take.images[0].nbytes * 2
    again = pickle.loads(packed).__getitems__(everything)
    assert batch.keys() == again.keys()
    for key in batch:
        np.testing.assert_array_equal(batch[key], again[key])
    assert batch["observation.images.color"].dtype == np.uint8 and batch["observation.state"].dtype == np.float32
    assert batch["index"].tolist() == everything


# -- the key ------------------------------------------------------------------------------------------------------

PIXELS_OR_TIMES = dict(
    joint_topic="/other",
    camera_topics={"color": "/other"},
    joint_names=("elbow_joint",),
    time_source="header",
    ros_distro="jazzy",
    image_resize=(3, 4),
)
AFTER_THE_CACHE = dict(
    fps=10.0,
    max_offset_ms=20.0,
    joint_resample="nearest",
    joint_sign=(-1.0,) * 6,
    apply_joint_sign=True,
    wrap_angles=False,
    action_mode="absolute",
    on_bad_bag="skip",
    bag_dir=Path("elsewhere"),
    cache_dir=Path("elsewhere"),
)


def test_every_setting_is_in_the_key_or_has_a_reason():
    """A new setting must be put on one of the two lists above."""
    assert set(PIXELS_OR_TIMES) | set(AFTER_THE_CACHE) == {f.name for f in dataclasses.fields(rd.BagSettings)}


@pytest.mark.parametrize("name", [*PIXELS_OR_TIMES, *AFTER_THE_CACHE])
def test_key_changes_with_what_changes_pixels_or_times(bag_dir, name):
    """...and with nothing else, so that another fps decodes nothing again."""
    bag, wanted = rd.find_bags(bag_dir)[0], settings(bag_dir)
    value = (PIXELS_OR_TIMES | AFTER_THE_CACHE)[name]
    assert value != getattr(wanted, name)
    changed = dataclasses.replace(wanted, **{name: value})
    same = rd.cache_key(bag, "identity", wanted) == rd.cache_key(bag, "identity", changed)
    assert same == (name in AFTER_THE_CACHE)


def test_settings_after_the_cache_decode_nothing(bag_dir, monkeypatch):
    """The same, through load_episodes()."""
    load(settings(bag_dir))
    monkeypatch.setattr(rd, "read_bag", None)
    for name in ("fps", "max_offset_ms", "joint_resample", "wrap_angles", "action_mode", "apply_joint_sign"):
        load(settings(bag_dir, **{name: AFTER_THE_CACHE[name]}))


def flip(file, at):
    with file.open("r+b") as stream:
        stream.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("where", ["first MiB", "last MiB", "middle", "metadata", "size", "name"])
def test_identity_is_that_of_the_bytes(tmp_path, where):
    """Size, metadata.yaml, first and last MiB, and the relative path count; --verify sees the middle as well."""
    bag_dir = tmp_path / "bags"
    path = write_bag(bag_dir / "a", TAKE.messages())
    file = storage_file(path)
    with file.open("ab") as stream:
        stream.write(bytes(3 << 20))
    (bag,) = rd.find_bags(bag_dir)
    key, full = rd.cache_key(bag, bag.identity(), settings(bag_dir)), bag.identity(full=True)
    if where == "metadata":
        (path / "metadata.yaml").write_text((path / "metadata.yaml").read_text() + "\n")
    elif where == "size":
        os.truncate(file, file.stat().st_size - 1)
    elif where == "name":
        path.rename(bag_dir / "b")
    else:
        flip(file, {"first MiB": 1000, "last MiB": -1000, "middle": file.stat().st_size // 2}[where])
    (bag,) = rd.find_bags(bag_dir)
    assert (rd.cache_key(bag, bag.identity(), settings(bag_dir)) != key) == (where != "middle")
    assert (bag.identity(full=True) != full) == (where != "name")


def test_changed_bag_is_decoded_again(bag_dir):
    """The bag was recorded anew under its old name."""
    load(settings(bag_dir))
    shutil.rmtree(bag_dir / "a")
    take = make_take(seconds=0.4, seed=77)
    write_bag(bag_dir / "a", take.messages())
    (episode, _), _ = load(settings(bag_dir))
    np.testing.assert_array_equal(rd.open_pixels(episode, "color"), take.images)


# -- atomic, and safe with several processes -----------------------------------------------------------------------

SLOW = """
import time, rosbag_dataset as rd
real, log = rd.read_bag, open(sys.argv[1] + "/../log", "a", buffering=1)
def slow(bag, settings, sink, *rest, **also):
    log.write("decode " + bag.name + "\\n")
    def slow_sink(camera, rgb):
        time.sleep(PAUSE)
        sink(camera, rgb)
    return real(bag, settings, slow_sink, *rest, **also)
rd.read_bag = slow
"""
SLOW_LOAD = LOAD.replace("try:", SLOW + "try:")


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive_in(session):
    """Processes of a session (a pool's are among them)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z" and int(fields[3]) == session:
                found.append(stat.parent.name)
    return found


def test_killed_while_caching(bag_dir):
    """SIGKILL in the middle: no entry that loads, no process left behind; the next start cleans up and completes."""
    cache_dir = settings(bag_dir).cache_dir
    process = python(SLOW_LOAD.replace("PAUSE", "0.5"), bag_dir, 2, start_new_session=True)
    wait_for(lambda: len(list(cache_dir.glob(".*/color.rgb"))) == 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not alive_in(process.pid))
    assert len(entries(cache_dir)) == 2 and all(name.startswith(".") for name in entries(cache_dir))
    assert len(load(settings(bag_dir))[0]) == 2
    assert len(entries(cache_dir)) == 2 and not any(name.startswith(".") for name in entries(cache_dir))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "no meta.json, which is written last": (lambda entry: (entry / "meta.json").unlink(), "No such file"),
    "meta.json cut": (lambda entry: cut(entry / "meta.json"), "Unterminated|Expecting"),
    "pixels cut": (lambda entry: cut(entry / "color.rgb"), r"color\.rgb: \d+ bytes, expected \d+"),
    "pixels gone": (lambda entry: (entry / "color.rgb").unlink(), "No such file"),
    "joints cut": (lambda entry: cut(entry / "joint_rad.npy"), "data|reshape|size"),
    "times emptied": (lambda entry: (entry / "color.time_ns.npy").write_bytes(b""), "No data left in file"),
}


@pytest.mark.parametrize("damage, why", DAMAGES.values(), ids=list(DAMAGES))
def test_damaged_entry_is_built_again(bag_dir, damage, why, capfd):
    """By a disk that was full, or a copy that was cut: said, and decoded once more; never half an entry, or a crash."""
    (episode, _), _ = load(settings(bag_dir))
    damage(episode.entry)
    (episode, _), _ = load(settings(bag_dir))
    np.testing.assert_array_equal(rd.open_pixels(episode, "color"), TAKE.images)
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(rf"frame cache: .*{episode.entry.name}.*({why}).*; decoding a again", line), line


def test_damaged_statistics_are_computed_again(bag_dir):
    episodes, _ = load(settings(bag_dir))
    expected, _ = rd.compute_stats(episodes, "dataset", "delta")
    cut(episodes[0].entry / "color.moments.json")
    again, _ = rd.compute_stats(episodes, "dataset", "delta")
    np.testing.assert_array_equal(
        again["observation.images.color"]["mean"], expected["observation.images.color"]["mean"]
    )


def test_a_killed_process_with_the_same_id_left_half_an_entry(bag_dir):
    """As the next attempt in a container finds it: half an entry under its own id, beside one that is damaged."""
    (episode, _), _ = load(settings(bag_dir))
    cut(episode.entry / "color.rgb")
    leftover = episode.entry.with_name(f".{episode.entry.name}.{os.getpid()}")
    leftover.mkdir()
    (episode, _), _ = load(settings(bag_dir))
    np.testing.assert_array_equal(rd.open_pixels(episode, "color"), TAKE.images)
    assert not leftover.exists()


def test_two_processes_at_once_decode_once(bag_dir):
    """Both end with all episodes; each bag was decoded by one of them, the other said that it waits."""
    processes = [python(SLOW_LOAD.replace("PAUSE", "0.1"), bag_dir, 1) for _ in range(2)]
    out = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], out
    assert [stdout.strip() for stdout, _ in out] == ["2", "2"]
    assert sorted((bag_dir.parent / "log").read_text().split("\n")[:-1]) == ["decode a", "decode b"]
    assert any("waiting for another process" in stderr for _, stderr in out)


def test_error_in_a_decoding_process(bag_dir):
    """It arrives as the one line that it is, with nothing of the pool's around it, and exit code 1."""
    os.truncate(storage_file(bag_dir / "b"), 5000)
    process = python(LOAD, bag_dir, 2)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stdout == ""
    (line,) = stderr.strip().splitlines()
    assert line.startswith("BagError: b: b.mcap is damaged")


DEATHS = {
    "while it reads": "rd.read_bag = lambda *a, **k: os.kill(os.getpid(), 9)",
    "with the counters' lock": "rd._count = lambda *a: rd._counters.acquire() and os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("death", DEATHS.values(), ids=list(DEATHS))
def test_killed_decoding_process(bag_dir, death):
    """The kernel kills a decoding process for want of memory: one line that says so, wherever it was."""
    process = python(LOAD.replace("try:", f"import os\n{death}\ntry:"), bag_dir, 2)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = stderr.strip().splitlines()
    assert "was killed" in line and "memory" in line


# -- a disk that is full ------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True)
    if done.returncode:
        pytest.skip("mounting needs root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("on_bad_bag", ["error", "skip"])
@pytest.mark.parametrize("what", ["pixels", "joints", "unpacked"])
def test_disk_fills_up(tmp_path, small_disk, what, on_bad_bag):
    """One line about the disk, also with skip (no bag is at fault); nothing half-written; done once space is free."""
    take, room = {
        "pixels": (make_take(seconds=0.4, size=(100, 100)), 200_000),  # they take 330 kB
        "joints": (make_take(seconds=4, size=(2, 2)), 20_480),  # pixels and times take three pages, joints six
        "unpacked": (make_take(seconds=0.4), 20_000),  # the .db3 takes 60 kB
    }[what]
    write_bag(tmp_path / "bags" / "a", take.messages(), compression="file" if what == "unpacked" else "none")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes((1 << 20) - room // 4096 * 4096))
    wanted = settings(tmp_path / "bags", small_disk / "cache", on_bad_bag=on_bad_bag)
    message = error_of(lambda: load(wanted))
    assert message.startswith("data.cache_dir: ") and "disk is full" in message and "free some space" in message
    assert " a;" in message or " of a;" in message
    assert entries(wanted.cache_dir) == []
    ballast.unlink()
    assert len(load(wanted)[0]) == 1


def test_file_size_limit(tmp_path):
    """The same by RLIMIT_FSIZE, which needs no root."""
    write_bag(tmp_path / "bags" / "a", make_take(seconds=0.4, size=(40, 40)).messages())
    code = LOAD.replace("try:", "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\ntry:")
    process = python(code, tmp_path / "bags", 1)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = stderr.strip().splitlines()
    assert line.startswith("BagError: data.cache_dir: ") and "disk is full" in line
    wanted = settings(tmp_path / "bags")
    assert entries(wanted.cache_dir) == []
    assert len(load(wanted)[0]) == 1


@pytest.mark.parametrize("on_bad_bag", ["error", "skip"])
def test_cache_dir_that_is_a_file(bag_dir, on_bad_bag):
    """Said by its key, whatever on_bad_bag is."""
    (bag_dir.parent / "cache").write_text("in the way")
    message = error_of(lambda: load(settings(bag_dir, on_bad_bag=on_bad_bag)))
    assert message.startswith("data.cache_dir: ") and "File exists" in message


def test_statistics_on_a_full_disk(tmp_path, small_disk):
    """Image statistics are kept beside the pixels if there is room, and are right if there is none."""
    write_bag(tmp_path / "bags" / "a", TAKE.messages())
    episodes, _ = load(settings(tmp_path / "bags", small_disk / "cache"))
    with contextlib.suppress(OSError):
        (small_disk / "ballast").write_bytes(bytes(1 << 20))
    color = rd.compute_stats(episodes, "dataset", "delta")[0]["observation.images.color"]
    np.testing.assert_allclose(color["mean"].ravel(), TAKE.images.mean(axis=(0, 1, 2)) / 255, rtol=1e-5)
    assert not list(episodes[0].entry.glob("*moments*"))


# -- memory -------------------------------------------------------------------------------------------------------

PEAK = """
import sys; from pathlib import Path
import rosbag_dataset as rd; from tests.bags import settings
wanted = settings(Path(sys.argv[1]))
(bag,) = rd.find_bags(wanted.bag_dir)
rd.build_entry(bag, "entry", wanted)
# of this program alone: ru_maxrss starts from the process that launched it
print(*[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""


@pytest.mark.parametrize("storage", ["sqlite3", "mcap"])
def test_memory_does_not_grow_with_the_recording(tmp_path, storage):
    """Eight times the frames (45 MB of pixels against 6) decode within the same peak, give or take 8 MiB."""
    peaks = []
    for seconds in (0.54, 4.04):
        take = make_take(seconds=seconds, size=(250, 500))
        write_bag(tmp_path / str(seconds) / "bags" / "a", take.messages(), storage)
        process = python(PEAK, tmp_path / str(seconds) / "bags")
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
        peaks.append(int(stdout))
        grown = take.images.nbytes
    assert grown > 40e6
    assert peaks[1] - peaks[0] < 8 * 1024, f"peak resident memory in KiB: {peaks}"


# -- python -m rosbag_dataset -------------------------------------------------------------------------------------


def inspect(capsys, *args):
    """-> (exit code, stdout, stderr) of the inspection."""
    code = rd.main([str(a) for a in args])
    return code, *capsys.readouterr()


def files_below(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.mark.parametrize("verify", [[], ["--verify"]], ids=["plain", "verify"])
def test_inspection_writes_nothing(bag_dir, verify, tmp_path):
    """As a command of its own, in the folder of the bags: topics, the table, exit code 0, and no file anywhere."""
    before = files_below(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "rosbag_dataset", bag_dir, *verify],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert f"    {CAMERA_TOPIC}  sensor_msgs/msg/Image  11\n" in done.stdout
    assert f"    {JOINT_TOPIC}  sensor_msgs/msg/JointState  50\n" in done.stdout
    assert "2 episodes, 22 frames kept, 0 dropped, 2 segments" in done.stdout
    assert files_below(tmp_path) == before


def test_inspection_report(bag_dir, tmp_path, capsys):
    """--json holds what the table is made of, and each bad bag with the reason; exit code 1 then."""
    os.truncate(storage_file(bag_dir / "b"), 5000)
    code, out, err = inspect(capsys, bag_dir, "--json", tmp_path / "report.json")
    assert code == 1 and "error: b: b.mcap is damaged" in err and len(err.splitlines()) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [e["episode"] for e in report["episodes"]] == ["a"] and report["episodes"][0]["frames"] == 11
    assert [b["bag"] for b in report["bad"]] == ["b"] and report["bad"][0]["why"] in err
    assert "1 episodes, 11 frames kept" in out


def test_inspection_verifies_pixels_when_asked(tmp_path, capsys):
    """A JPEG that does not decode is found by --verify; without it only headers are looked at."""
    frames = [(CAMERA_TOPIC, int(t), compressed(0, b"not a picture")) for t in TAKE.camera_ns]
    write_bag(tmp_path / "bags" / "a", [m for m in TAKE.messages() if m[0] == JOINT_TOPIC] + frames)
    assert inspect(capsys, tmp_path / "bags")[0] == 0
    code, _, err = inspect(capsys, tmp_path / "bags", "--verify")
    assert code == 1 and "do not decode" in err


def test_inspection_finds_copies(bag_dir, tmp_path, capsys):
    """Copies are pointed out; --verify compares every byte and tells look-alikes apart."""
    for name in ("c", "d"):
        shutil.copytree(bag_dir / "a", bag_dir / name)
        with storage_file(bag_dir / name).open("ab") as stream:
            stream.write(bytes(3 << 20))
    flip(storage_file(bag_dir / "d"), 1 << 21)
    assert "d has the same bytes as c" in inspect(capsys, bag_dir)[1]
    assert "same bytes" not in inspect(capsys, bag_dir, "--verify")[1]


def test_inspection_finds_sizes_that_differ(bag_dir, capsys):
    """What training would refuse, the inspection refuses."""
    write_bag(bag_dir / "c", make_take(seconds=0.4, size=(10, 12)).messages())
    code, _, err = inspect(capsys, bag_dir)
    assert code == 1 and "c: images of color are 10x12, those of a are 6x8" in err


def test_inspection_with_a_config(bag_dir, tmp_path, capsys):
    """--config brings topics and joints; what it does not hold is as in config.yaml."""
    config = tmp_path / "my.yaml"
    config.write_text(yaml.safe_dump({"data": {"fps": 10, "camera_topic": "/nope"}, "model": {"chunk_size": 3}}))
    code, _, err = inspect(capsys, bag_dir, "--config", config)
    assert code == 1 and f"no topic /nope; set it to one of the topics in this bag: {CAMERA_TOPIC}" in err
    config.write_text(yaml.safe_dump({"data": {"fps": 10}}))
    code, out, _ = inspect(capsys, bag_dir, "--config", config)
    assert code == 0 and "8 frames kept" in out


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("data: [1", "cannot be read as a config"),
        ("data:\n\tfps: 3", "cannot be read"),
        ("data: {fps: fast}", "'fast'"),
    ],
    ids=["not-yaml", "tab", "wrong-type"],
)
def test_inspection_with_a_bad_config(bag_dir, tmp_path, capsys, text, fact):
    """One line, exit code 1."""
    (tmp_path / "bad.yaml").write_text(text)
    code, _, err = inspect(capsys, bag_dir, "--config", tmp_path / "bad.yaml")
    assert code == 1 and err.startswith("error: ") and fact in err and len(err.splitlines()) == 1


def test_inspection_of_nothing(bag_dir, tmp_path, capsys):
    """A folder that is not there, and a report that cannot be written: one line each."""
    code, _, err = inspect(capsys, tmp_path / "absent")
    assert code == 1 and err.startswith("error: data.bag_dir: ") and len(err.splitlines()) == 1
    code, _, err = inspect(capsys, bag_dir, "--json", tmp_path / "absent" / "report.json")
    assert code == 1 and "--json" in err and "No such file" in err and len(err.splitlines()) == 1
