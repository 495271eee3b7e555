"""How several tests read, load, damage and refuse bags."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rosbag_dataset import BagError, find_bags, load_episodes, read_bag
from tests.bags import JOINT_TOPIC, joint_state, make_take, settings, storage_file, write_bag

ROOT = Path(__file__).parent.parent
TAKE = make_take(seconds=0.4)
STORAGES = ("sqlite3", "mcap")
both_storages = pytest.mark.parametrize("storage", STORAGES)


def still_joints():
    """The messages of the take, but no joint moves."""
    return [(t, n, joint_state(n, np.ones(6)) if t == JOINT_TOPIC else m) for t, n, m in TAKE.messages()]


def read(bag_dir, **changes):
    """The only bag below `bag_dir`: -> (Recording, {camera: (N, H, W, 3)})."""
    (bag,) = find_bags(bag_dir)
    images = {}
    recording = read_bag(
        bag, settings(bag_dir, **changes), lambda camera, rgb: images.setdefault(camera, []).append(rgb.copy())
    )
    return recording, {camera: np.stack(frames) for camera, frames in images.items()}


def assert_is_take(bag_dir, take=TAKE, **changes):
    """Every joint position, every pixel and every time of the take came out of the bag."""
    recording, images = read(bag_dir, **changes)
    joints, camera = np.argsort(recording.joint_time_ns), np.argsort(recording.camera_time_ns["color"])
    np.testing.assert_array_equal(recording.joint_time_ns[joints], take.joint_ns)
    np.testing.assert_array_equal(recording.joint_rad[joints], take.joint_rad)
    np.testing.assert_array_equal(recording.camera_time_ns["color"][camera], take.camera_ns)
    np.testing.assert_array_equal(images["color"][camera], take.images)


def error_of(action):
    """The message of the BagError that `action` raises, which is one line."""
    with pytest.raises(BagError) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def sql(bag, *statements):
    """Change a .db3 by hand."""
    with sqlite3.connect(storage_file(bag)) as db:
        for statement in statements:
            db.execute(statement)
    db.close()


def truncated(storage, share):
    """-> a function that writes a bag of which only this share of the bytes is there."""

    def make(path):
        file = storage_file(write_bag(path, TAKE.messages(), storage))
        os.truncate(file, int(file.stat().st_size * share))

    return make


def load(wanted, workers=1):
    return load_episodes(wanted, workers, progress=False)


def entries(cache_dir):
    """Everything in the cache but the lock files and what a warm start is spared, hidden names too."""
    ours = (p for p in cache_dir.iterdir() if p.suffix != ".lock" and p.name != "bags.json")
    return sorted(p.name for p in ours if not p.name.startswith("episodes-"))


def flip(file, at):
    """Change one bit of the byte at `at`, from the end if negative."""
    with file.open("r+b") as stream:
        stream.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))


def cut(path):
    """Leave half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def python(code, *args, **how):
    """Start `code` in a Python of its own, with this repository's modules; sys.argv[1:] are `args`."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how,
    )  # fmt: skip


# Load the bags in argv[1] with argv[2] processes and print how many. Code put before its "try:" can break a room.
LOAD = """
import sys; from pathlib import Path
from rosbag_dataset import BagError, cache, decoding, load_episodes; from tests.bags import settings
try:
    episodes, _ = load_episodes(settings(Path(sys.argv[1])), int(sys.argv[2]), False)
    print(len(episodes))
except BagError as error:
    sys.exit(f"BagError: {error}")
"""

# PAUSE seconds per image; every bag that is decoded leaves a line in a log.
SLOW = """
import time
real, log = cache.read_bag, open(sys.argv[1] + "/../log", "a", buffering=1)
def slow(bag, settings, sink, *rest, **also):
    log.write("decode " + bag.name + "\\n")
    def slow_sink(camera, rgb):
        time.sleep(PAUSE)
        sink(camera, rgb)
    return real(bag, settings, slow_sink, *rest, **also)
cache.read_bag = slow
"""

SLOW_LOAD = LOAD.replace("try:", SLOW + "try:")


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
