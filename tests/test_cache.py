"""Decoded frames on disk: keyed by what matters, whole or absent, built once, small in memory."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from rosbag_dataset import BagSettings, cache, cache_key, decoding, find_bags, open_pixels
from rosbag_dataset.fields import parse_field
from tests.bags import JOINT_TOPIC, joint_state, make_take, settings, write_bag
from tests.checks import LOAD, SLOW_LOAD, TAKE, cut, entries, error_of, load, python


def test_second_start_opens_no_bag(bag_dir, monkeypatch):
    """From the cache come the same episodes, without reading a single message."""
    first, _ = load(settings(bag_dir), workers=2)

    def fail(*args, **also):
        raise AssertionError("a bag was opened")

    monkeypatch.setattr(cache, "read_bag", fail)
    monkeypatch.setattr(decoding, "ProcessPoolExecutor", fail)
    second, _ = load(settings(bag_dir))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.state, b.state)
        np.testing.assert_array_equal(a.time_ns, b.time_ns)
        assert a.sync_report == b.sync_report and a.entry == b.entry


def test_an_entry_tells_how_many_joint_messages_were_ignored(bag_dir):
    """...when there were any: other entries are to the letter what they were before that was counted."""
    gripper = [(JOINT_TOPIC, int(t), joint_state(int(t), [0.1], ["finger_joint"])) for t in TAKE.joint_ns[::2]]
    write_bag(bag_dir / "c", TAKE.messages() + gripper)
    for start in ("decoded", "cached"):
        episodes, _ = load(settings(bag_dir))
        assert [e.sync_report["ignored_joint_messages"] for e in episodes] == [0, 0, 25], start
        metas = [json.loads((e.entry / "meta.json").read_text()) for e in episodes]
        assert list(metas[0]) == ["bag", "image_shape", "source_shape", "first_image", "stamp_delay_ms"]
        assert {*metas[2]} == {*metas[0], "ignored_joint_messages"}


# -- the key ------------------------------------------------------------------------------------------------------

PIXELS_OR_TIMES = dict(
    joint_topic="/other",
    camera_topics={"color": "/other"},
    joint_names=("elbow_joint",),
    state_topics={"gripper": parse_field("/gripper:data")},
    action_source="/commands",
    command_topics={"elbow_joint": parse_field("/elbow:data")},
    time_source="header",
    ros_distro="jazzy",
    image_resize=(3, 4),
)

AFTER_THE_CACHE = dict(
    one_camera=False,
    fps=10.0,
    max_offset_ms=20.0,
    joint_resample="nearest",
    joint_sign=(-1.0,) * 6,
    apply_joint_sign=True,
    wrap_angles=False,
    action_mode="absolute",
    observed_only=("wrist_3_joint",),
    command_max_age_ms=20.0,
    state_units={"wrist_3_joint": "deg"},
    min_used_share=0.5,
    on_bad_bag="skip",
    episodes="gaps",  # "marker" wants another topic: see the test behind these
    episode_pause_s=5.0,
    episode_marker_topic="/marker",
    keep_failures=True,
    trim_still_s=0.5,
    min_episode_s=1.0,
    frames="bags",  # an index is an entry of its own: cache.index_key()
    bag_dir=Path("elsewhere"),
    cache_dir=Path("elsewhere"),
)


def test_every_setting_is_in_the_key_or_has_a_reason():
    """A new setting must be put on one of the two lists above."""
    assert set(PIXELS_OR_TIMES) | set(AFTER_THE_CACHE) == {f.name for f in dataclasses.fields(BagSettings)}


@pytest.mark.parametrize("name", [*PIXELS_OR_TIMES, *AFTER_THE_CACHE])
def test_key_changes_with_what_changes_pixels_or_times(bag_dir, name):
    """...and with nothing else, so that another fps decodes nothing again."""
    bag, wanted = find_bags(bag_dir)[0], settings(bag_dir)
    value = (PIXELS_OR_TIMES | AFTER_THE_CACHE)[name]
    assert value != getattr(wanted, name)
    changed = dataclasses.replace(wanted, **{name: value})
    same = cache_key(bag, "identity", wanted) == cache_key(bag, "identity", changed)
    assert same == (name in AFTER_THE_CACHE)


def test_episode_markers_are_in_the_key_only_where_they_are_read(bag_dir):
    """One more topic is read with data.episodes: marker; no other way to cut decodes anything again."""
    bag, (a, b) = find_bags(bag_dir)[0], ("/a", "/b")
    keys = {
        (how, topic): cache_key(bag, "identity", settings(bag_dir, episodes=how, episode_marker_topic=topic))
        for how in ("bag", "gaps", "still", "file", "marker")
        for topic in (a, b)
    }
    assert len({key for (how, _), key in keys.items() if how != "marker"} | {keys["marker", a], keys["marker", b]}) == 3


def test_settings_after_the_cache_decode_nothing(bag_dir, monkeypatch):
    """The same, through load_episodes()."""
    load(settings(bag_dir))
    monkeypatch.setattr(cache, "read_bag", None)
    for name in ("fps", "max_offset_ms", "joint_resample", "wrap_angles", "action_mode", "apply_joint_sign"):
        load(settings(bag_dir, **{name: AFTER_THE_CACHE[name]}))


def test_changed_bag_is_decoded_again(bag_dir):
    """The bag was recorded anew under its old name."""
    load(settings(bag_dir))
    shutil.rmtree(bag_dir / "a")
    take = make_take(seconds=0.4, seed=77)
    write_bag(bag_dir / "a", take.messages())
    (episode, _), _ = load(settings(bag_dir))
    np.testing.assert_array_equal(open_pixels(episode, "color"), take.images)


# -- atomic, and safe with several processes ----------------------------------------------------------------------

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
    np.testing.assert_array_equal(open_pixels(episode, "color"), TAKE.images)
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(rf"frame cache: .*{episode.entry.name}.*({why}).*; decoding a again", line), line


def test_a_killed_process_with_the_same_id_left_half_an_entry(bag_dir):
    """As the next attempt in a container finds it: half an entry under its own id, beside one that is damaged."""
    (episode, _), _ = load(settings(bag_dir))
    cut(episode.entry / "color.rgb")
    leftover = episode.entry.with_name(f".{episode.entry.name}.{os.getpid()}")
    leftover.mkdir()
    (episode, _), _ = load(settings(bag_dir))
    np.testing.assert_array_equal(open_pixels(episode, "color"), TAKE.images)
    assert not leftover.exists()


def test_two_processes_at_once_decode_once(bag_dir):
    """Both end with all episodes; each bag was decoded by one of them, the other said that it waits."""
    processes = [python(SLOW_LOAD.replace("PAUSE", "0.1"), bag_dir, 1) for _ in range(2)]
    out = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], out
    assert [stdout.strip() for stdout, _ in out] == ["2", "2"]
    assert sorted((bag_dir.parent / "log").read_text().split("\n")[:-1]) == ["decode a", "decode b"]
    assert any("waiting for another process" in stderr for _, stderr in out)


# -- a file system that cannot lock, or reserve space, as some on networks -----------------------------------------


def without(number: int):
    """A system call that the file system does not have; staged, because no such file system can be mounted here."""

    def call(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_without_locks_it_is_said_and_goes_on(bag_dir, monkeypatch, capsys):
    monkeypatch.setattr(cache.fcntl, "flock", without(errno.ENOLCK))
    bag, changed = find_bags(bag_dir)[0], settings(bag_dir)
    key = cache_key(bag, bag.content_hash(), changed)
    (changed.cache_dir / f".{key}.1").mkdir(parents=True)
    cache.clean_cache(changed.cache_dir)
    cache.build_entry(bag, key, changed)
    said = capsys.readouterr().err
    assert f"{changed.cache_dir}: No locks available; {bag.name} may be decoded more than once" in said
    assert entries(changed.cache_dir) == [f".{key}.1", key], "perhaps a process is still writing the first"


def test_without_locks_the_first_entry_that_is_done_counts(bag_dir, monkeypatch):
    """Another process finishes the same entry while this one decodes: its files, which may be mapped, stay."""
    bag, changed = find_bags(bag_dir)[0], settings(bag_dir)
    key = cache_key(bag, bag.content_hash(), changed)
    cache.build_entry(bag, key, changed)
    entry, aside = changed.cache_dir / key, changed.cache_dir / "aside"
    before = (entry / "meta.json").stat().st_ino
    entry.rename(aside)
    original = cache.read_bag

    def overtaken(*args, **options):
        recording = original(*args, **options)
        aside.rename(entry)
        return recording

    monkeypatch.setattr(cache.fcntl, "flock", without(errno.EOPNOTSUPP))
    monkeypatch.setattr(cache, "read_bag", overtaken)
    cache.build_entry(bag, key, changed)
    assert (entry / "meta.json").stat().st_ino == before
    assert not list(changed.cache_dir.glob(".*.*"))


def test_space_that_cannot_be_reserved_is_not(bag_dir, monkeypatch):
    monkeypatch.setattr(cache.os, "posix_fallocate", without(errno.EOPNOTSUPP))
    episodes, _ = load(settings(bag_dir))
    assert episodes


# -- a disk that is full ------------------------------------------------------------------------------------------


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


# -- memory -------------------------------------------------------------------------------------------------------

PEAK = """
import sys; from pathlib import Path
from rosbag_dataset import build_entry, find_bags; from tests.bags import settings
wanted = settings(Path(sys.argv[1]))
(bag,) = find_bags(wanted.bag_dir)
build_entry(bag, "entry", wanted)
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


def test_an_older_entry_tells_a_copy_as_well(bag_dir):
    """Entries from before meta.json held the first image's hash are used as they are: it comes from the pixels."""
    (episode, _), _ = load(settings(bag_dir))
    meta = episode.entry / "meta.json"
    content = json.loads(meta.read_text())
    assert len(content.pop("first_image")["color"]) == 64
    meta.write_text(json.dumps(content))
    assert load(settings(bag_dir))[0][0].recording_hash == episode.recording_hash
    with (episode.entry / "color.rgb").open("r+b") as pixels:  # and it is the pixels that count there
        pixels.write(b"\xff" * 8)
    assert load(settings(bag_dir))[0][0].recording_hash != episode.recording_hash
