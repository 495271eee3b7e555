"""Decoding in several processes: what goes wrong in one, or to one, arrives as one line; none is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from rosbag_dataset import BagError, cache, load_episodes
from tests.bags import settings, storage_file, write_bag
from tests.checks import LOAD, SLOW_LOAD, entries, error_of, load, python, still_joints, truncated, wait_for


def test_a_slow_bad_bag_before_a_quick_one(tmp_path, monkeypatch):
    """Two bad bags at once: whichever fails first is the error, and the other's absence from the cache is not."""
    for name in "ab":
        write_bag(tmp_path / "bags" / name, still_joints())
    truncated("mcap", 0.5)(tmp_path / "bags" / "c")

    def fail(bag, *rest, **also):
        time.sleep({"a": 1.0}.get(bag.name, 0.0))
        raise BagError(f"{bag.name}: broken")

    monkeypatch.setattr(cache, "read_bag", fail)
    message = error_of(lambda: load_episodes(settings(tmp_path / "bags"), workers=2, progress=False))
    assert message in ("b: broken", "c: broken")


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


def test_error_in_a_decoding_process(bag_dir):
    """It arrives as the one line that it is, with nothing of the pool's around it, and exit code 1."""
    os.truncate(storage_file(bag_dir / "b"), 5000)
    process = python(LOAD, bag_dir, 2)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stdout == ""
    (line,) = stderr.strip().splitlines()
    assert line.startswith("BagError: b: b.mcap is damaged")


DEATHS = {
    "while it reads": "cache.read_bag = lambda *a, **k: os.kill(os.getpid(), 9)",
    "with the counters' lock": "decoding.count = lambda *a: decoding._counters.acquire() and os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("death", DEATHS.values(), ids=list(DEATHS))
def test_killed_decoding_process(bag_dir, death):
    """The kernel kills a decoding process for want of memory: one line that says so, wherever it was."""
    process = python(LOAD.replace("try:", f"import os\n{death}\ntry:"), bag_dir, 2)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = stderr.strip().splitlines()
    assert "was killed" in line and "memory" in line
