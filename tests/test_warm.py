"""A start with the same bags and settings does nothing again; with others it does: what is kept is never stale."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from rosbag_dataset import BagError, ChunkDataset, bags, cache, cache_key, find_bags, pruning, samples, warm
from rosbag_dataset import episodes as loading
from rosbag_dataset.bags import Bag, KnownBags
from tests.bags import make_take, settings, storage_file, write_bag
from tests.checks import TAKE, cut, entries, load, still_joints
from tests.test_cache import AFTER_THE_CACHE, PIXELS_OR_TIMES
from tests.test_cutting import SIDECAR, session


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Files that were written just now are known again, without waiting for it."""
    monkeypatch.setattr(bags, "SETTLED_NS", -(10**12))


def fail(*args, **also):
    raise AssertionError("done again")


def kept(cache_dir: Path) -> list[str]:
    return sorted(path.name for path in cache_dir.glob("episodes-*") if path.is_dir())


def assert_same(ours, theirs):
    """Every field of every episode."""
    assert [e.name for e in ours] == [e.name for e in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for field in dataclasses.fields(a):
            one, other = getattr(a, field.name), getattr(b, field.name)
            if isinstance(one, np.ndarray):
                np.testing.assert_array_equal(one, other, strict=True)
            elif field.name == "image_index":
                assert one.keys() == other.keys()
                [np.testing.assert_array_equal(one[camera], other[camera], strict=True) for camera in one]
            elif field.name != "kept":
                assert one == other and type(one) is type(other), field.name


def test_a_warm_start_does_nothing_again(bag_dir, monkeypatch):
    """No bag is opened, parsed or hashed, no entry read, no episode made; copies and what was left out are the same."""
    shutil.copytree(bag_dir / "a", bag_dir / "copy of a")
    write_bag(bag_dir / "short", make_take(seconds=0.2).messages())
    write_bag(bag_dir / "still", still_joints())
    wanted = settings(bag_dir, on_bad_bag="skip", min_episode_s=0.25)
    with monkeypatch.context() as patch:  # as if nothing could be kept
        patch.setattr(warm, "_write", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "read only")))
        made = load(wanted)
    assert made[0][0].kept is None and not kept(wanted.cache_dir)
    first = load(wanted)
    for module, name in (
        (cache, "read_bag"), (bags, "load_yaml"), (Bag, "content_hash"), (loading, "open_entry"), (loading, "cut"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, fail)
    second = load(wanted)
    for episodes, left_out in (first, second):
        assert_same(episodes, made[0])
        assert left_out == made[1] and {entry["bag"] for entry in left_out} == {"short", "still"}
        assert [e.sync_report["copy_of"] for e in episodes] == ["", "", "a"]
    assert len(kept(wanted.cache_dir)) == 1


def test_a_bag_that_is_skipped_is_an_error_where_it_should_be(bag_dir, capsys):
    """What was kept with on_bad_bag: skip is said again, and is no answer to on_bad_bag: error."""
    write_bag(bag_dir / "still", still_joints())
    for _ in range(2):
        load(settings(bag_dir, on_bad_bag="skip"))
        assert "skipped bag still: no joint moves" in capsys.readouterr().err
    with pytest.raises(BagError, match="still: no joint moves"):
        load(settings(bag_dir))


def test_a_cut_recording_is_kept_as_it_was_cut(tmp_path, monkeypatch):
    """Several episodes of one bag, with labels; and what the sidecar says is part of what they are."""
    bag = write_bag(tmp_path / "bags" / "session", session().messages(), "mcap")
    (bag / "episodes.yaml").write_text(SIDECAR)
    wanted = settings(tmp_path / "bags", episodes="file", trim_still_s=0.2)
    first = load(wanted)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "cut", fail)
        second = load(wanted)
        assert_same(second[0], first[0])
        assert second[1] == first[1] != []
        (bag / "episodes.yaml").write_text(SIDECAR.replace("0.5", "0.6", 1))
        with pytest.raises(AssertionError, match="done again"):
            load(wanted)


# -- never stale --------------------------------------------------------------------------------------------------

KEPT_BY = {**PIXELS_OR_TIMES, **AFTER_THE_CACHE}


@pytest.mark.parametrize("name", sorted(KEPT_BY))
def test_every_setting_is_in_the_key(bag_dir, name):
    """All that is asked for makes other episodes, or other errors; only where bags and cache lie does not."""
    found, wanted = find_bags(bag_dir), settings(bag_dir)
    keys = {bag.name: cache_key(bag, "identity", wanted) for bag in found}
    changed = dataclasses.replace(wanted, **{name: KEPT_BY[name]})
    same = warm.kept_key(found, keys, wanted) == warm.kept_key(found, keys, changed)
    assert same == (name in ("bag_dir", "cache_dir"))


def test_the_order_of_cameras_is_in_the_key(bag_dir):
    """It is the model's; the entry's key does not have it."""
    found = find_bags(bag_dir)
    keys = dict.fromkeys((bag.name for bag in found), "entry")
    a, b = ({"a": "/a", "b": "/b"}, {"b": "/b", "a": "/a"})
    one, other = (warm.kept_key(found, keys, settings(bag_dir, camera_topics=cameras)) for cameras in (a, b))
    assert one != other


CHANGES = {
    "a bag less": lambda bag_dir, _: shutil.rmtree(bag_dir / "b"),
    "another name": lambda bag_dir, _: (bag_dir / "b").rename(bag_dir / "c"),
    "a bag recorded anew": lambda bag_dir, _: (
        shutil.rmtree(bag_dir / "a"), write_bag(bag_dir / "a", make_take(seconds=0.4, seed=5).messages()),
    ),
    "joints of an entry": lambda _, entry: np.save(entry / "joint_rad.npy", np.load(entry / "joint_rad.npy") + 0.1),
    "its pixels": lambda _, entry: (entry / "color.rgb").write_bytes((entry / "color.rgb").read_bytes()),
    "its meta.json": lambda _, entry: (entry / "meta.json").write_text(
        (entry / "meta.json").read_text().replace('"bag": "a"', '"bag": "x"')
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_what_changes_an_episode_makes_them_again(bag_dir, change, monkeypatch):
    """Whatever it is, and whoever did it."""
    (episode, *_), _ = load(settings(bag_dir))
    change(bag_dir, episode.entry)
    made = []
    original = loading.cut
    monkeypatch.setattr(loading, "cut", lambda *args: (made.append(args[0].name), original(*args))[1])
    load(settings(bag_dir))
    assert made and len(kept(settings(bag_dir).cache_dir)) == 2


def test_other_code_makes_them_again(bag_dir, monkeypatch):
    """As the version of the package that is there, to the letter."""
    load(settings(bag_dir))
    monkeypatch.setattr(warm, "_code", lambda: "other")
    monkeypatch.setattr(loading, "cut", fail)
    with pytest.raises(AssertionError, match="done again"):
        load(settings(bag_dir))


DAMAGES = {
    "a column cut": lambda folder: cut(folder / "path_rad.bin"),
    "a column gone": lambda folder: (folder / "image_index.color.bin").unlink(),
    "episodes cut": lambda folder: cut(folder / "episodes.json"),
    "no meta.json, which is written last": lambda folder: (folder / "meta.json").unlink(),
    "reports of fewer": lambda folder: (folder / "reports.json").write_text('{"reports": [], "left_out": []}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_damaged_episodes_are_made_again(bag_dir, damage):
    """From the entries, which are whole; and kept again."""
    wanted = settings(bag_dir)
    first, _ = load(wanted)
    expected = [(e.name, e.state.copy()) for e in first]
    (name,) = kept(wanted.cache_dir)
    del first  # it maps the files
    damage(wanted.cache_dir / name)
    again, _ = load(wanted)
    for episode, (called, state) in zip(again, expected, strict=True):
        assert episode.name == called and episode.kept is not None
        np.testing.assert_array_equal(episode.state, state)
    assert kept(wanted.cache_dir) == [name] and not list(wanted.cache_dir.glob(".*"))


def test_a_disk_that_is_full_is_said_and_costs_memory(bag_dir, monkeypatch, capsys):
    """Training goes on with the same episodes, and the next start tries again."""
    usual, _ = load(settings(bag_dir))
    shutil.rmtree(next(settings(bag_dir).cache_dir.glob("episodes-*/")))
    with monkeypatch.context() as patch:
        patch.setattr(warm, "save", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        full, _ = load(settings(bag_dir))
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot keep the synchronised episodes there (No space left on device)" in line
    assert_same(full, usual)
    assert not kept(settings(bag_dir).cache_dir) and not list(settings(bag_dir).cache_dir.glob(".*"))
    load(settings(bag_dir))
    assert len(kept(settings(bag_dir).cache_dir)) == 1


# -- bags that are known ------------------------------------------------------------------------------------------


def test_a_bag_is_known_only_while_its_files_are_the_same(bag_dir, tmp_path, monkeypatch):
    """A byte that is changed in place, with the times of the file set back, is another bag."""

    def hashes():
        known = KnownBags(tmp_path / "bags.json")
        found = {bag.name: known.content_hash(bag) for bag in find_bags(bag_dir, known)}
        known.save()
        return found

    first = hashes()
    with monkeypatch.context() as patch:
        patch.setattr(Bag, "content_hash", fail)
        patch.setattr(bags, "load_yaml", fail)
        assert hashes() == first
    file = storage_file(bag_dir / "b")
    before = file.stat()
    with file.open("r+b") as stream:
        stream.write(b"x")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = hashes()
    assert changed["a"] == first["a"] and changed["b"] != first["b"]


def test_a_bag_that_was_just_written_is_not_known_yet(bag_dir, tmp_path, monkeypatch):
    """It may be written to again within the steps in which its file system keeps times."""
    monkeypatch.setattr(bags, "SETTLED_NS", 10**12)
    known = KnownBags(tmp_path / "bags.json")
    assert len({known.content_hash(bag) for bag in find_bags(bag_dir, known)}) == 2
    known.save()
    assert not (tmp_path / "bags.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', '{"version": 2, "bags": 3}'])
def test_what_is_known_may_be_lost(bag_dir, tmp_path, content):
    """A file that is cut or of another version is as none."""
    (tmp_path / "bags.json").write_text(content)
    assert [bag.name for bag in find_bags(bag_dir, KnownBags(tmp_path / "bags.json"))] == ["a", "b"]


# -- memory, and what workers are sent ----------------------------------------------------------------------------


def test_episodes_take_no_memory_and_workers_are_sent_names(tmp_path):
    """Arrays are parts of mapped files; a dataset is as small when episodes are ten times as long, and whole there."""
    sizes = []
    for seconds in (2.0, 20.0):
        folder = tmp_path / str(seconds)
        for i in range(2):
            write_bag(folder / "bags" / str(i), make_take(seconds=seconds, size=(2, 2), seed=i).messages())
        episodes, _ = load(settings(folder / "bags", action_mode="absolute"))
        for episode in episodes:
            for array in (episode.time_ns, episode.path_rad, episode.image_index["color"]):
                assert isinstance(array.base.base, np.memmap)
            episode.reference_rad = np.full(6, 0.5)
        samples = ChunkDataset(episodes, 8)
        packed = pickle.dumps(samples)
        sizes.append(len(packed))
        other, everything = pickle.loads(packed), range(len(samples))
        for key, value in samples.__getitems__(everything).items():
            np.testing.assert_array_equal(value, other.__getitems__(everything)[key])
    assert abs(sizes[1] - sizes[0]) < 100 and sizes[1] < 6_000


def test_no_more_files_are_open_than_a_process_may_have(tmp_path, monkeypatch):
    """Of many episodes and cameras the latest stay open; every picture is the right one."""
    monkeypatch.setattr(samples, "MAX_FILES", 2)
    for i in range(4):
        take = dataclasses.replace(TAKE, images=TAKE.images + np.uint8(i))
        write_bag(tmp_path / "bags" / str(i), take.messages())
    episodes, _ = load(settings(tmp_path / "bags"))
    dataset, before = ChunkDataset(episodes, 4), len(os.listdir("/proc/self/fd"))
    per_episode = len(dataset) // 4
    for i in range(len(dataset)):
        number = i * 7 % len(dataset)
        pixels = dataset[number]["observation.images.color"]
        np.testing.assert_array_equal(pixels, TAKE.images[dataset.locate(number)[1]] + np.uint8(number // per_episode))
        assert len(os.listdir("/proc/self/fd")) <= before + 2


# -- pruning ------------------------------------------------------------------------------------------------------


def test_kept_episodes_are_listed_and_pruned(bag_dir, capsys):
    """As entries are: unused for long, beyond a size, half made; and with the first of their entries."""
    cache_dir = settings(bag_dir).cache_dir
    for fps in (30.0, 10.0):
        (episode, *_), _ = load(settings(bag_dir, fps=fps))
    both, before = kept(cache_dir), entries(cache_dir)
    used = {name: (cache_dir / name / "meta.json").stat().st_mtime for name in both}
    old = min(both, key=used.__getitem__)
    os.utime(cache_dir / old / "meta.json", (0, 0))
    cache._in_use.pop(cache_dir.resolve()).close()  # as if this program had ended
    (cache_dir / f".{old}.1").mkdir()
    assert pruning.main([str(cache_dir)]) == 0
    assert "(2 episodes of 2 bags)" in capsys.readouterr().out
    assert pruning.main([str(cache_dir), "--prune", "--older-than", "30"]) == 0
    assert kept(cache_dir) == [name for name in both if name != old] and entries(cache_dir) == before
    os.utime(episode.entry / "meta.json", (0, 0))
    assert pruning.main([str(cache_dir), "--prune", "--older-than", "30"]) == 0
    assert "episodes of entries that go, or are gone" in capsys.readouterr().out
    assert kept(cache_dir) == [] and entries(cache_dir) == [name for name in before if name != episode.entry.name]
    assert not list(cache_dir.glob("episodes-*.lock"))


def test_a_warm_start_counts_as_use(bag_dir):
    """Of every entry, although none of them is read."""
    (episode, *_), _ = load(settings(bag_dir))
    os.utime(episode.entry / "meta.json", (0, 0))
    load(settings(bag_dir))
    assert (episode.entry / "meta.json").stat().st_mtime > 0
