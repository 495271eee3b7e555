"""Statistics for normalisation: those of all training frames and of no other, kept beside the pixels."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest

from rosbag_dataset import compute_stats, split_episodes
from tests.bags import make_take, settings, smooth_path, write_bag
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


@pytest.mark.parametrize("mode", ["delta", "absolute"])
def test_statistics_are_those_of_all_training_frames(tmp_path, mode):
    """Streamed statistics equal numpy's over everything at once: states, actions that exist, every stored pixel."""
    episodes, images = episodes_with_pixels(tmp_path, range(3), action_mode=mode)
    for _ in range(2):  # the second time from the moments that are kept beside the pixels
        stats, floored = compute_stats(episodes, "dataset", mode)
        state = np.concatenate([e.state for e in episodes]).astype(np.float64)
        action = np.concatenate([e.action[a : b - 1] for e in episodes for a, b in e.segments]).astype(np.float64)
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
    color = compute_stats(episodes, "imagenet", "delta")[0]["observation.images.color"]
    np.testing.assert_allclose(color["mean"].ravel(), [0.485, 0.456, 0.406], rtol=1e-6)
    np.testing.assert_allclose(color["std"].ravel(), [0.229, 0.224, 0.225], rtol=1e-6)


@pytest.mark.parametrize(("mode", "floor"), [("delta", 1e-4), ("absolute", 1e-2)])
def test_deviations_have_a_floor(tmp_path, mode, floor):
    """A joint that never moves gets the documented floor, is named, and nothing is infinite; black images too."""
    episode = with_pixels(sync(one_joint(turning), action_mode=mode), tmp_path / "entry")
    (tmp_path / "entry" / "color.rgb").write_bytes(bytes((tmp_path / "entry" / "color.rgb").stat().st_size))
    stats, floored = compute_stats([episode], "dataset", mode)
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
    first = {key: getattr(episode, key)[:1] for key in ("time_ns", "state", "action")}
    alone = dataclasses.replace(episode, **first, segments=np.array([[0, 1]]))
    assert "no action to learn" in error_of(lambda: compute_stats([alone], "imagenet", "delta"))


def test_validation_episodes_do_not_touch_the_statistics(tmp_path):
    """Statistics of the training side are the same whatever the held-out episode holds."""
    episodes, _ = episodes_with_pixels(tmp_path, range(6))
    training, validation = split_episodes(episodes, 0.2, 0)
    before = compute_stats(training, "dataset", "delta")[0]
    for episode in validation:
        episode.state += 100
        (episode.entry / "color.rgb").write_bytes(b"\xff" * (episode.entry / "color.rgb").stat().st_size)
    after = compute_stats(split_episodes(episodes, 0.2, 0)[0], "dataset", "delta")[0]
    for key in before:
        np.testing.assert_array_equal(before[key]["mean"], after[key]["mean"])
        np.testing.assert_array_equal(before[key]["std"], after[key]["std"])


def test_damaged_statistics_are_computed_again(bag_dir):
    episodes, _ = load(settings(bag_dir))
    expected, _ = compute_stats(episodes, "dataset", "delta")
    cut(episodes[0].entry / "color.moments.json")
    again, _ = compute_stats(episodes, "dataset", "delta")
    np.testing.assert_array_equal(
        again["observation.images.color"]["mean"], expected["observation.images.color"]["mean"]
    )


def test_statistics_on_a_full_disk(tmp_path, small_disk):
    """Image statistics are kept beside the pixels if there is room, and are right if there is none."""
    write_bag(tmp_path / "bags" / "a", TAKE.messages())
    episodes, _ = load(settings(tmp_path / "bags", small_disk / "cache"))
    with contextlib.suppress(OSError):
        (small_disk / "ballast").write_bytes(bytes(1 << 20))
    color = compute_stats(episodes, "dataset", "delta")[0]["observation.images.color"]
    np.testing.assert_allclose(color["mean"].ravel(), TAKE.images.mean(axis=(0, 1, 2)) / 255, rtol=1e-5)
    assert not list(episodes[0].entry.glob("*moments*"))
