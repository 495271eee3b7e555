"""python -m rosbag_dataset cache: it says what a cache holds, and removes nothing that anybody may still want."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rosbag_dataset import cache_key, find_bags, pruning
from tests.bags import make_take, settings, write_bag
from tests.checks import LOAD, ROOT, SLOW_LOAD, entries, python, wait_for

# Load as LOAD does, and use the cache until told to end.
USE = LOAD + "print('loaded', flush=True)\nsys.stdin.read()\n"


PRUNE_OFTEN = """
import sys, time
from rosbag_dataset import pruning
for _ in range(100):
    assert pruning.main([sys.argv[1], "--prune", "--max-gb", "0"]) in (0, 1)
    time.sleep(0.02)
"""


def fill(bag_dir: Path) -> Path:
    """Decode the bags, in a process that ends; -> the cache, less what a warm start is spared (tests/test_warm.py)."""
    process = python(LOAD, bag_dir, 1)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and stdout.strip(), stderr
    cache = bag_dir.parent / "cache"
    for path in [*cache.glob("episodes-*"), *cache.glob("bags.json")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return cache


def key_of(bag_dir: Path, name: str) -> str:
    (bag,) = (bag for bag in find_bags(bag_dir) if bag.name == name)
    return cache_key(bag, bag.content_hash(), settings(bag_dir))


def config_of(folder: Path, **changes) -> Path:
    """The settings of tests.bags as a config; `changes` are keys of its conventions."""
    wanted = settings(folder)
    data = {"joint_topic": wanted.joint_topic, "camera_topic": wanted.camera_topics["color"], "camera_topics": None}
    data |= {"joint_names": list(wanted.joint_names), "time_source": wanted.time_source, "ros_distro": "humble"}
    file = folder / f"{len(list(folder.glob('*.yaml')))}.yaml"
    file.write_text(yaml.safe_dump({"data": data, "conventions": {"image_resize": None, **changes}}))
    return file


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = pruning.main([str(a) for a in arguments])
    return code, *capsys.readouterr()


def age(cache: Path, key: str, days: float) -> None:
    then = time.time() - days * 86_400
    os.utime(cache / key / "meta.json", (then, then))


def size_of(cache: Path, *keys: str) -> int:
    return sum(file.stat().st_size for key in keys for file in (cache / key).iterdir())


def test_the_list_writes_nothing(bag_dir, tmp_path):
    """As a command: every entry with its bag, size and last use, and whether a bag needs it."""
    cache = fill(bag_dir)
    shutil.rmtree(bag_dir / "b")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    config = config_of(tmp_path.parent)
    done = subprocess.run(
        [sys.executable, "-m", "rosbag_dataset", "cache", cache, "--bags", bag_dir, "--config", config],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split()[-1]: line.split() for line in done.stdout.splitlines()[1:3]}
    assert {bag: (row[0] in os.listdir(cache), row[4]) for bag, row in rows.items()} == {
        "a": (True, "yes"), "b": (True, "no"),
    }  # fmt: skip
    assert done.stdout.splitlines()[3].startswith("2 entries, 0.000 GB")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_no_bag_needs_goes(bag_dir, tmp_path, capsys):
    """With any of the configs that are named; every byte of it, its lock file too, and the rest is used as before."""
    cache = fill(bag_dir)
    kept, gone = key_of(bag_dir, "a"), key_of(bag_dir, "b")
    shutil.rmtree(bag_dir / "b")
    size = size_of(cache, gone)
    plain, resized = config_of(tmp_path), config_of(tmp_path, image_resize=[3, 4])
    unneeded = [cache, "--prune", "--unneeded", "--bags", bag_dir, "--config"]
    code, out, _ = run(capsys, *unneeded, resized, "--dry-run")
    assert code == 0 and "would remove 2 of 2 entries" in out and entries(cache) == sorted([kept, gone])
    code, out, _ = run(capsys, *unneeded, resized, plain)
    assert code == 0 and f"removed 1 of 2 entries, {size} bytes" in out and "b  -> no bag needs it" in out
    assert sorted(os.listdir(cache)) == sorted([kept, f"{kept}.lock", "in-use.lock"])


def test_bags_that_cannot_be_read_are_no_reason_to_remove(bag_dir, tmp_path, capsys):
    """A folder that is not mounted, a bag that cannot be opened, a config with a mistake: one line, nothing goes."""
    cache = fill(bag_dir)
    before = entries(cache)
    unreadable = tmp_path / "unreadable"
    shutil.copytree(bag_dir, unreadable)
    for file in (unreadable / "a").glob("*.db3"):
        file.unlink()
        file.mkdir()
    (tmp_path / "bad.yaml").write_text("data: [1")
    for bags, config in ((tmp_path / "absent", []), (unreadable, []), (bag_dir, ["--config", tmp_path / "bad.yaml"])):
        code, _, err = run(capsys, cache, "--prune", "--unneeded", "--bags", bags, *config)
        assert code == 1 and err.startswith("error: ") and len(err.splitlines()) == 1, err
    assert entries(cache) == before


def test_what_was_not_used_for_long_goes(bag_dir, capsys):
    """Loading counts as use."""
    cache = fill(bag_dir)
    a, b = key_of(bag_dir, "a"), key_of(bag_dir, "b")
    for key in (a, b):
        age(cache, key, 40)
    shutil.move(bag_dir / "b", bag_dir.parent / "aside")
    fill(bag_dir)
    code, out, _ = run(capsys, cache, "--prune", "--older-than", "30")
    assert code == 0 and "b  -> last used 40 days ago" in out and entries(cache) == [a]


def test_a_size_limit_keeps_what_was_used_last(tmp_path, capsys):
    """And removes no more than it must."""
    for i, name in enumerate("abc"):
        write_bag(tmp_path / "bags" / name, make_take(seconds=0.4, seed=i, size=(60, 80)).messages())
    cache = fill(tmp_path / "bags")
    a, b, c = (key_of(tmp_path / "bags", name) for name in "abc")
    for key, days in ((a, 2), (b, 3), (c, 1)):
        age(cache, key, days)
    limit = (size_of(cache, a, c) + 1) / 1e9
    code, out, _ = run(capsys, cache, "--prune", "--max-gb", limit)
    assert code == 0 and "removed 1 of 3 entries" in out and entries(cache) == sorted([a, c])
    assert run(capsys, cache, "--prune", "--max-gb", "0")[0] == 0 and entries(cache) == []


def test_half_made_and_damaged_entries_go_and_foreign_things_stay(bag_dir, capsys):
    """With --prune alone; and lock files of entries that are not there."""
    cache = fill(bag_dir)
    a, b = key_of(bag_dir, "a"), key_of(bag_dir, "b")
    half = cache / f".{'0' * 24}.123"
    (half / ".unpack-x").mkdir(parents=True)
    (half / ".unpack-x" / "a.db3").write_bytes(bytes(1000))
    (cache / b / "meta.json").unlink()
    (cache / f"{'1' * 24}.lock").touch()
    size = 1000 + size_of(cache, b)
    foreign = [cache / ("2" * 24), cache / "notes"]
    for folder in foreign:
        folder.mkdir()
        (folder / "mine.txt").write_text("mine")
    code, out, _ = run(capsys, cache, "--prune")
    assert code == 0 and f"removed 2 of 3 entries, {size} bytes" in out and "1 lock files" in out, out
    assert sorted(os.listdir(cache)) == sorted([a, f"{a}.lock", "in-use.lock", *(f.name for f in foreign)])


def test_an_entry_that_is_being_built_stays(bag_dir, capsys):
    """Also one built by a program that does not say that it uses the cache: its lock is looked at."""
    cache = fill(bag_dir)
    a, b = key_of(bag_dir, "a"), key_of(bag_dir, "b")
    half = cache / f".{a}.123"
    half.mkdir()
    with (cache / f"{a}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, out, _ = run(capsys, cache, "--prune", "--max-gb", "0")
    assert code == 0 and out.count("stays: a process is building it") == 2
    assert entries(cache) == sorted([a, half.name]) and (cache / f"{a}.lock").exists() and b not in os.listdir(cache)


@pytest.mark.parametrize("ends_by", ["itself", "SIGKILL"])
def test_nothing_goes_while_a_program_uses_the_cache(bag_dir, capsys, ends_by):
    """Its workers may map any entry at any time. However it ends, pruning works afterwards."""
    cache = fill(bag_dir)
    before = entries(cache)
    user = python(USE, bag_dir, 1, stdin=subprocess.PIPE)
    try:
        while "loaded" not in user.stdout.readline():
            assert user.poll() is None
        code, out, err = run(capsys, cache, "--prune", "--max-gb", "0")
        assert code == 1 and "a program that uses it is running" in err and len(err.splitlines()) == 1
        assert entries(cache) == before
        assert "in use: a training" in run(capsys, cache)[1]
    finally:
        user.communicate() if ends_by == "itself" else (user.send_signal(signal.SIGKILL), user.communicate())
    assert run(capsys, cache, "--prune", "--max-gb", "0")[0] == 0 and entries(cache) == []


def test_nothing_goes_while_bags_are_decoded(bag_dir, capsys):
    """The first training with a new cache is not asked to decode twice, nor finds half of its entries."""
    process, cache = python(SLOW_LOAD.replace("PAUSE", "0.1"), bag_dir, 1), bag_dir.parent / "cache"
    wait_for(lambda: cache.is_dir() and any(name.startswith(".") for name in os.listdir(cache)))
    code, _, err = run(capsys, cache, "--prune", "--max-gb", "0")
    assert code == 1 and "is running" in err
    assert process.communicate(timeout=60)[0].strip() == "2"


def test_loading_and_pruning_at_once(bag_dir):
    """Whoever comes at the wrong time decodes again: every load has all its episodes, and no prune fails otherwise."""
    cache = fill(bag_dir)
    pruner = python(PRUNE_OFTEN, cache)
    loads = [python(LOAD, bag_dir, 1) for _ in range(4)]
    assert [load.communicate(timeout=60)[0].strip() for load in loads] == ["2"] * 4
    _, err = pruner.communicate(timeout=60)
    assert pruner.returncode == 0, err
    assert all("a program that uses it is running" in line for line in err.splitlines()), err


def test_without_locks_nothing_goes(bag_dir, capsys, monkeypatch):
    """Nobody can tell then whether a training runs."""
    cache = fill(bag_dir)
    before = entries(cache)

    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(pruning.fcntl, "flock", no_locks)
    code, _, err = run(capsys, cache, "--prune", "--max-gb", "0")
    assert code == 1 and "No locks available: it cannot be locked" in err and len(err.splitlines()) == 1
    assert entries(cache) == before


@pytest.mark.parametrize(
    "arguments, fact",
    [
        (["--max-gb", "3"], "add --prune"),
        (["--prune", "--unneeded"], "--unneeded needs --bags"),
        (["--prune", "--max-gb", "-1"], "--max-gb is -1, expected 0 or more"),
        (["--prune", "--older-than", "nan"], "--older-than is nan"),
        (["--config", "x.yaml"], "--config needs --bags"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, capsys, arguments, fact):
    with pytest.raises(SystemExit) as caught:
        pruning.main([str(tmp_path), *arguments])
    assert caught.value.code == 2 and fact in capsys.readouterr().err


def test_a_cache_that_is_not_there(tmp_path, capsys):
    code, _, err = run(capsys, tmp_path / "absent", "--prune")
    assert code == 1 and "absent: expected the folder of a frame cache" in err and not list(tmp_path.iterdir())
