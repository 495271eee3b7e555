"""Statistics for normalisation: those of all training frames and of no other, kept beside the pixels."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rosbag_dataset import (
    ChunkDataset,
    angle_references,
    compute_stats,
    refer_angles,
    split_episodes,
    statistics,
    wrap_to_pi,
)
from tests.bags import T0_NS, make_take, settings, smooth_path, write_bag
from tests.checks import TAKE, cut, error_of, load
from tests.episodes import one_joint, sync, turning, with_pixels, without


def episodes_with_pixels(tmp_path, seeds, **changes):
    """Episodes of different paths, lengths and images, with a gap in each, and their stored images."""
    out, images = [], []
    for seed in seeds:
        take = make_take(
            seconds=1.5 + seed / 2, path=lambda t, s=seed: smooth_path(t * (1 + s)) + 0.1 * s, seed=seed, size=(5, 7)
        )
        take = without(take, camera=(0.5, 0.8))
        episode = sync(take, **changes)
        entry = tmp_path / f"entry{seed}"
        entry.mkdir()
        (take.images // (1 + seed)).tofile(entry / "color.rgb")
        out.append(dataclasses.replace(episode, entry=entry, name=f"e{seed}"))
        images.append(take.images // (1 + seed))
    return out, images


@pytest.mark.parametrize("mode", ["delta", "absolute", "relative"])
def test_statistics_are_those_of_all_training_frames(tmp_path, mode):
    """Streamed statistics equal numpy's over everything at once: states, actions that exist, every stored pixel."""
    episodes, images = episodes_with_pixels(tmp_path, range(3), action_mode=mode)
    for _ in range(2):  # the second time from the moments that are kept beside the pixels
        stats, floored = compute_stats(episodes, "dataset", 8)
        state = np.concatenate([e.state for e in episodes]).astype(np.float64)
        action = np.concatenate([e.action[a : b - 1] for e in episodes for a, b in e.segments]).astype(np.float64)
        if mode == "relative":  # every action of every chunk
            samples = ChunkDataset(episodes, 8)
            batch = samples.__getitems__(range(len(samples)))
            action = batch["action"][~batch["action_is_pad"]].astype(np.float64)
        pixels = np.concatenate([i.reshape(-1, 3) for i in images]) / 255
        for key, rows in (("observation.state", state), ("action", action)):
            np.testing.assert_allclose(stats[key]["mean"], rows.mean(axis=0), rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(stats[key]["std"], rows.std(axis=0), rtol=1e-5)
        color = stats["observation.images.color"]
        np.testing.assert_allclose(color["mean"].ravel(), pixels.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(color["std"].ravel(), pixels.std(axis=0), rtol=1e-5)
        assert color["mean"].shape == (3, 1, 1) and not floored


def test_imagenet_statistics(tmp_path):
    """The default: ImageNet's numbers, and no pixel is read."""
    episodes, _ = episodes_with_pixels(tmp_path, [0])
    (tmp_path / "entry0" / "color.rgb").unlink()
    color = compute_stats(episodes, "imagenet", 8)[0]["observation.images.color"]
    np.testing.assert_allclose(color["mean"].ravel(), [0.485, 0.456, 0.406], rtol=1e-6)
    np.testing.assert_allclose(color["std"].ravel(), [0.229, 0.224, 0.225], rtol=1e-6)


@pytest.mark.parametrize(("mode", "floor"), [("delta", 1e-4), ("absolute", 1e-2)])
def test_deviations_have_a_floor(tmp_path, mode, floor):
    """A joint that never moves gets the documented floor, is named, and nothing is infinite; black images too."""
    episode = with_pixels(sync(one_joint(turning), action_mode=mode), tmp_path / "entry")
    (tmp_path / "entry" / "color.rgb").write_bytes(bytes((tmp_path / "entry" / "color.rgb").stat().st_size))
    stats, floored = compute_stats([episode], "dataset", 8)
    np.testing.assert_allclose(stats["observation.state"]["std"][1:], 1e-2)
    np.testing.assert_allclose(stats["action"]["std"][1:], floor)
    np.testing.assert_allclose(stats["observation.images.color"]["std"], 1 / 255)
    assert stats["observation.state"]["std"][0] > 0.1
    resting = {f"{key}[{j}]" for key in ("observation.state", "action") for j in range(1, 6)}
    steady = {"action[0]"} if mode == "delta" else set()  # joint 0 turns at one speed: its deltas do not vary
    assert {line.split(":")[0] for line in floored} == resting | steady


def test_statistics_without_any_action():
    """Single frames only: nothing to learn, said in one line."""
    episode = sync(make_take(seconds=2.0), fps=30)
    first = {key: getattr(episode, key)[:1] for key in ("time_ns", "path_rad")}
    alone = dataclasses.replace(episode, **first, segments=np.array([[0, 1]]))
    assert "no action to learn" in error_of(lambda: compute_stats([alone], "imagenet", 8))


@pytest.mark.parametrize("many_frames", [1, 100_000], ids=["one by one", "together"])
def test_angle_references_are_those_of_all_frames_at_once(many_frames, monkeypatch):
    """Kept by bins of the circle, they are what sorting every frame of all episodes gives, to the last bit."""
    monkeypatch.setattr(statistics, "MANY_FRAMES", many_frames)
    random = np.random.default_rng(0)
    for spread in (0.01, 1.0, 3.0):
        paths = [random.normal(random.uniform(-9, 9), spread, (n, 6)) for n in (1, 7, 500)]
        angles = np.sort(wrap_to_pi(np.concatenate(paths)), axis=0)
        gaps = np.diff(angles, axis=0, append=angles[:1] + 2 * np.pi)
        widest, joints = gaps.argmax(axis=0), np.arange(6)
        expected = np.round(wrap_to_pi(angles[widest, joints] + gaps[widest, joints] / 2 + np.pi), 3)
        np.testing.assert_array_equal(angle_references([SimpleNamespace(path_rad=path) for path in paths]), expected)


def test_validation_episodes_do_not_touch_the_statistics(tmp_path):
    """Statistics of the training side are the same whatever the held-out episode holds."""
    episodes, _ = episodes_with_pixels(tmp_path, range(6))
    training, validation = split_episodes(episodes, 0.2, 0)
    before = compute_stats(training, "dataset", 8)[0]
    for episode in validation:
        episode.path_rad += 100
        (episode.entry / "color.rgb").write_bytes(b"\xff" * (episode.entry / "color.rgb").stat().st_size)
    after = compute_stats(split_episodes(episodes, 0.2, 0)[0], "dataset", 8)[0]
    for key in before:
        np.testing.assert_array_equal(before[key]["mean"], after[key]["mean"])
        np.testing.assert_array_equal(before[key]["std"], after[key]["std"])


def test_damaged_statistics_are_computed_again(bag_dir):
    episodes, _ = load(settings(bag_dir))
    expected, _ = compute_stats(episodes, "dataset", 8)
    cut(episodes[0].entry / "color.moments.json")
    again, _ = compute_stats(episodes, "dataset", 8)
    np.testing.assert_array_equal(
        again["observation.images.color"]["mean"], expected["observation.images.color"]["mean"]
    )


def test_statistics_on_a_full_disk(tmp_path, small_disk):
    """Image statistics are kept beside the pixels if there is room, and are right if there is none."""
    write_bag(tmp_path / "bags" / "a", TAKE.messages())
    episodes, _ = load(settings(tmp_path / "bags", small_disk / "cache"))
    with contextlib.suppress(OSError):
        (small_disk / "ballast").write_bytes(bytes(1 << 20))
    color = compute_stats(episodes, "dataset", 8)[0]["observation.images.color"]
    np.testing.assert_allclose(color["mean"].ravel(), TAKE.images.mean(axis=(0, 1, 2)) / 255, rtol=1e-5)
    assert not list(episodes[0].entry.glob("*moments*"))


# -- turns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "reference", "crosses"),
    [
        ([lambda t: 0.8 * np.sin(t)], 0.0, False),
        ([lambda t: -2.5 + 0.3 * np.sin(2 * t)], -2.5, False),
        ([lambda t: 3.1 + 0.01 * t, lambda t: -3.1 - 0.01 * t], np.pi, False),  # one pose, on either side of the seam
        ([lambda t: 2.6 + 0.3 * t], 3.2 - 2 * np.pi, False),  # across it, to 3.8
        ([lambda t: 0.1 * np.sin(9 * t), lambda t: 0.825 * t], 1.6, False),  # works at 0, reaches 3.3
        ([lambda t: 1.7 * t], None, True),  # more than a turn: there is no place for a seam
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["delta", "absolute"])
def test_one_reference_turn_for_all_episodes(mode, paths, reference, crosses):
    """The seam lies where no training episode comes: states and absolute targets are continuous within and between
    episodes, and a joint for which there is no such place is named."""
    episodes = [sync(one_joint(path, joint=2), action_mode=mode) for path in paths]
    references = angle_references(episodes)
    if reference is not None:
        assert abs(references[2] - reference) < 0.15 and np.abs(np.delete(references, 2)).max() == 0
    for episode, path in zip(episodes, paths, strict=True):
        refer_angles(episode, references, settings(Path("bags"), action_mode=mode))
        assert episode.sync_report["joints_across_the_seam"] == (["elbow_joint"] if crosses else [])
        t = (episode.time_ns - T0_NS) / 1e9
        np.testing.assert_allclose(np.exp(1j * episode.state[:, 2]), np.exp(1j * path(t)), atol=1e-4)
        if not crosses:
            assert np.abs(np.diff(episode.state[:, 2])).max() < 0.1
            assert np.abs(episode.state[:, 2] - references[2]).max() < np.pi
        expected = episode.state[1:, 2] if mode == "absolute" else np.diff(path(t))
        if not (crosses and mode == "absolute"):
            np.testing.assert_allclose(episode.action[:-1, 2], expected, atol=1e-4)


def test_a_pose_near_pi_has_one_target_and_its_motion_is_visible():
    """Two episodes that hold the same pose, recorded as 3.1 and as -3.18 rad: with a reference of 0 their absolute
    targets are a turn apart and hide a motion of 0.1 rad in a deviation of 3."""
    paths = [lambda t: 3.1 + 0.1 * np.sin(3 * t), lambda t: 3.1 - 2 * np.pi + 0.1 * np.sin(3 * t)]
    episodes = [sync(one_joint(path), action_mode="absolute") for path in paths]
    assert compute_stats(episodes, "imagenet", 8)[0]["observation.state"]["std"][0] > 2
    for episode in episodes:
        refer_angles(episode, angle_references(episodes), settings(Path("bags"), action_mode="absolute"))
    stats, _ = compute_stats(episodes, "imagenet", 8)
    assert stats["action"]["std"][0] < 0.08 and stats["observation.state"]["std"][0] < 0.08
    np.testing.assert_allclose(episodes[0].action, episodes[1].action, atol=1e-5)


def test_unwrapped_joints_have_no_turn():
    """With wrap_angles false nothing is shifted: neither states, nor actions, nor the report."""
    plain = settings(Path("bags"), wrap_angles=False)
    episode = sync(one_joint(turning), wrap_angles=False)
    before = episode.state.copy(), episode.action.copy()
    refer_angles(episode, np.full(6, 3.0), plain)
    np.testing.assert_array_equal(episode.state, before[0])
    np.testing.assert_array_equal(episode.action, before[1])
