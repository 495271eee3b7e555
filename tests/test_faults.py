"""Pictures that show no scene, and cameras that are late, are counted and said; those that are right are not."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from rosbag_dataset import sync_table
from rosbag_dataset.inspection import main
from tests.bags import CAMERA_TOPIC, JOINT_TOPIC, image, joint_state, make_take, settings, write_bag
from tests.checks import load, read

TAKE = make_take(seconds=2.0, size=(32, 24))  # noise, as from a camera: no two pictures are the same


def spoiled(change, take=TAKE):
    """A take whose pictures `change` has been given, to change them in place."""
    images = take.images.copy()
    change(images)
    return dataclasses.replace(take, images=images)


def spoil(which, value):
    return lambda images: images.__setitem__(which, value)


def torn(images):
    """From row 20 on the picture before, or one colour."""
    images[7, 20:] = images[6, 20:]
    images[30, 20:] = 128


def freeze(images):
    images[10:20] = images[9]


KINDS = {
    "black": (spoil(np.s_[5:9], 3), (4, 5, 8)),
    "white": (spoil(np.s_[[0, 40]], 250), (2, 0, 40)),
    "torn": (torn, (2, 7, 30)),
    "frozen": (freeze, (10, 10, 19)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_faults_are_counted_and_said(tmp_path, kind, capsys):
    """By the inspection's --verify, and by a run from what was decoded or cached: camera, kind, how many, when."""
    change, (count, first, last) = KINDS[kind]
    take = spoiled(change)
    write_bag(tmp_path / "bags" / "a", take.messages())
    first_ns, last_ns = int(take.camera_ns[first]), int(take.camera_ns[last])
    assert read(tmp_path / "bags")[0].picture_faults == {"color": {kind: (count, first_ns, last_ns)}}
    begin, end = ((t - take.camera_ns[0]) / 1e9 for t in (first_ns, last_ns))
    said = f"note: a: pictures of camera color: {count} {kind}"
    for _ in ("decoded", "from the cache"):
        ((episode,), _) = load(settings(tmp_path / "bags"))
        found = episode.sync_report["picture_faults"]["color"][kind]
        assert found == {"count": count, "first_s": round(begin, 3), "last_s": round(end, 3)}
        assert said in sync_table([episode.sync_report]) and f"({begin:.1f} to {end:.1f} s)" in sync_table(
            [episode.sync_report]
        )
    assert main([str(tmp_path / "bags")]) == 0 and said not in capsys.readouterr().out
    assert main([str(tmp_path / "bags"), "--verify"]) == 0 and said in capsys.readouterr().out


def bar_below(images):
    images[:, 26:] = 0


def still_scene(images):
    """A camera that never moves, without noise: below there is what was there before, above a thing moves."""
    images[:] = images[0]
    for i, picture in enumerate(images):
        picture[i % 10, :8] = i


def hardly_moving(images):
    """The same, and it moves below, but for once."""
    images[:] = images[0]
    for i, picture in enumerate(images):
        picture[-1, :2] = i + (i == 19)
        picture[0, :2] = i


RIGHT = {"noise": lambda images: None, "bar": bar_below, "still-scene": still_scene, "hardly-moving": hardly_moving}


@pytest.mark.parametrize("change", RIGHT.values(), ids=list(RIGHT))
def test_pictures_that_are_right(tmp_path, change):
    """Noise, a bar that each picture has, and a scene in which little moves."""
    write_bag(tmp_path / "bags" / "a", spoiled(change).messages())
    assert read(tmp_path / "bags")[0].picture_faults == {}


def test_equal_pictures_of_an_arm_that_rests(tmp_path):
    """A simulated camera has no noise: it is frozen only if the arm moves meanwhile, also over the seam of a turn."""
    for name, rad in (("rests", lambda t: t * 0 + 1.0), ("jumps", lambda t: np.where(t < 0.5, np.pi, -np.pi))):
        take = make_take(seconds=1.0, size=(4, 4), path=lambda t, rad=rad: np.repeat(rad(t)[:, None], 6, axis=1))
        write_bag(tmp_path / name / "a", spoiled(freeze, take).messages())
        assert read(tmp_path / name)[0].picture_faults == {}, name


def late_bag(path, delay_ms, joint_stamps=True):
    """A camera whose pictures are received so long after their stamps, and joints that are received at once."""
    camera = [
        (CAMERA_TOPIC, int(t), image(int(t) - round(delay_ms * 1e6), p))
        for t, p in zip(TAKE.camera_ns, TAKE.images, strict=True)
    ]
    joints = [
        (JOINT_TOPIC, int(t), joint_state(int(t) - 2_000_000 if joint_stamps else 0, q))
        for t, q in zip(TAKE.joint_ns, TAKE.joint_rad, strict=True)
    ]
    write_bag(path, sorted(joints + camera, key=lambda m: m[1]))


def test_a_camera_that_is_late(tmp_path, capsys):
    """Header stamps against receive times, beside the joints': said with the setting that heals it, which does."""
    late_bag(tmp_path / "bags" / "a", 250)
    assert main([str(tmp_path / "bags")]) == 0
    said = "note: camera color: by header stamps, its pictures are up to 248 ms older than the joints"
    assert said in (out := capsys.readouterr().out) and "in 1 of 1 episodes; data.time_source: header pairs" in out
    for _ in ("decoded", "from the cache"):
        ((late,), _) = load(settings(tmp_path / "bags"))
        assert late.sync_report["late_ms"] == {"color": 248.0} and said in sync_table([late.sync_report])
    ((healed,), _) = load(settings(tmp_path / "bags", time_source="header"))
    assert healed.sync_report["late_ms"] == {} and "older than" not in sync_table([healed.sync_report])
    truth = np.interp(healed.time_ns + 2_000_000, TAKE.joint_ns, TAKE.joint_rad[:, 0])
    np.testing.assert_allclose(healed.state[:, 0], truth, atol=1e-6)


@pytest.mark.parametrize(
    ("delay_ms", "joint_stamps", "late"),
    [(20, True, {"color": 18.0}), (-100, True, {"color": -102.0}), (3_600_000, True, {}), (250, False, {})],
    ids=["a-little", "joints-late", "another-clock", "no-stamps"],
)
def test_what_stamps_say_of_other_cameras(tmp_path, delay_ms, joint_stamps, late):
    """Nothing is said of a few ms, nor of stamps that were never set or are another clock's."""
    late_bag(tmp_path / "bags" / "a", delay_ms, joint_stamps)
    ((episode,), _) = load(settings(tmp_path / "bags"))
    assert episode.sync_report["late_ms"] == late
    assert ("102 ms newer than the joints" in sync_table([episode.sync_report])) == (delay_ms == -100)
    assert ("by header stamps" in sync_table([episode.sync_report])) == (delay_ms == -100)


def test_entries_from_before_faults_were_counted(tmp_path):
    """They are valid, and say nothing of them: no bag is decoded again."""
    write_bag(tmp_path / "bags" / "a", spoiled(freeze).messages())
    ((episode,), _) = load(settings(tmp_path / "bags"))
    meta = json.loads((episode.entry / "meta.json").read_text())
    for key in ("picture_faults", "stamp_delay_ms"):
        del meta[key]
    (episode.entry / "meta.json").write_text(json.dumps(meta))
    pixels = (episode.entry / "color.rgb").stat().st_mtime_ns
    ((again,), _) = load(settings(tmp_path / "bags"))
    assert (again.sync_report["picture_faults"], again.sync_report["late_ms"]) == ({}, {})
    assert (again.entry / "color.rgb").stat().st_mtime_ns == pixels
