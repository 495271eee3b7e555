"""Episodes for tests: takes (see tests/bags.py), synchronised without a bag in between."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from rosbag_dataset import synchronise
from tests.bags import T0_NS, Take, make_take, settings


def sync(take, **changes):
    return synchronise("a", take.recording(), settings(Path("bags"), **changes))


def one_joint(path, hz=125.0, seconds=4.0, camera_hz=30.0, joint=0):
    """A take in which one joint follows `path(t)` and the others rest at 0."""

    def all_joints(t):
        rad = np.zeros((len(t), 6))
        rad[:, joint] = path(t)
        return rad

    return make_take(seconds=seconds, path=all_joints, size=(2, 2), joint_hz=hz, camera_hz=camera_hz)


def turning(t):
    """From 2.6 rad on at 0.4 rad/s: over the seam, on to 4.2 rad."""
    return 2.6 + 0.4 * t


def without(take, joints=(0, 0), camera=(0, 0)):
    """The take less its samples in these stretches, in seconds from its start."""

    def outside(times, stretch):
        seconds = (times - T0_NS) / 1e9
        return (seconds < stretch[0]) | (seconds >= stretch[1])

    j, c = outside(take.joint_ns, joints), outside(take.camera_ns, camera)
    return Take(take.joint_ns[j], take.joint_rad[j], take.camera_ns[c], take.images[c])


def with_pixels(episode, entry):
    """Store for each image a grey level that tells which one it is."""
    entry.mkdir()
    count, shape = episode.stored_images["color"], episode.image_shape["color"]
    levels = np.arange(count, dtype=np.uint8)[:, None, None, None]
    np.broadcast_to(levels, (count, *shape, 3)).tofile(entry / "color.rgb")
    return dataclasses.replace(episode, entry=entry)
