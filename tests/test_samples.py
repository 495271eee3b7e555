"""Episodes to samples: the right pixels at random, chunks that end where segments end, nothing heavy to pickle."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from rosbag_dataset import ChunkDataset
from tests.bags import CAMERA_TOPIC, image, make_take, noise_images, settings, write_bag
from tests.checks import TAKE, load
from tests.episodes import one_joint, sync, with_pixels, without


def test_random_access_equals_the_source(bag_dir):
    """Any frame of any episode shows the recorded image that is nearest in time, bit by bit."""
    (episode, _), _ = load(settings(bag_dir, fps=60))
    samples = ChunkDataset([episode], chunk_size=4)
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
    sample = ChunkDataset([episode], 4)[3]
    assert list(episode.image_shape) == ["wrist", "color"]
    np.testing.assert_array_equal(sample["observation.images.wrist"], wrist[3])
    np.testing.assert_array_equal(sample["observation.images.color"], TAKE.images[3])


def test_pickled_dataset_holds_no_pixels(tmp_path):
    """What a data loader's worker is sent is small, and gives the same batch there."""
    take = make_take(seconds=1.0, size=(60, 80))
    write_bag(tmp_path / "bags" / "a", take.messages())
    (episode,), _ = load(settings(tmp_path / "bags"))
    samples = ChunkDataset([episode], chunk_size=8)
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


@pytest.mark.parametrize("mode", ["delta", "absolute"])
def test_no_action_and_no_chunk_crosses_a_gap_or_an_episode(tmp_path, mode):
    """Joint 0 grows by 0.01 rad a frame, jumps in a gap and differs by episode, so that a crossing would show."""
    episodes = []
    for number in range(3):
        take = one_joint(lambda t, n=number: 0.3 * t + np.where(t >= 1.5, 1.0, 0.0) + 0.05 * n, seconds=3.0)
        episode = sync(without(take, camera=(1.2, 1.8), joints=(1.3, 1.7)), action_mode=mode)
        assert len(episode.segments) == 2
        episodes.append(with_pixels(episode, tmp_path / str(number)))
    samples = ChunkDataset(episodes, chunk_size=20)
    assert len(samples) == sum(len(e.time_ns) - 2 for e in episodes)
    for i in range(len(samples)):
        sample = samples[i]
        name, t = samples.locate(i)
        episode = episodes[i * 3 // len(samples)]
        start, stop = next(s for s in episode.segments if s[0] <= t < s[1])
        valid = min(20, stop - 1 - t)
        assert valid > 0
        assert sample["action_is_pad"].tolist() == [False] * valid + [True] * (20 - valid)
        assert (sample["action"][valid:] == 0).all()
        action = sample["action"][:valid, 0]
        if mode == "delta":
            np.testing.assert_allclose(action, 0.01, atol=1e-5)
        else:
            want = sample["observation.state"][0] + 0.01 * np.arange(1, valid + 1)
            np.testing.assert_allclose(action, want, atol=1e-5)


@pytest.mark.parametrize("wrap", [True, False])
def test_the_three_kinds_of_action_describe_one_motion(tmp_path, wrap):
    """From a state on, a chunk of deltas adds up to, and relative offsets lead to, the positions of the absolute one;
    across the seam at pi as anywhere."""
    chunks, take = {}, one_joint(lambda t: 2.6 + 0.4 * t)
    for mode in ("delta", "absolute", "relative"):
        episode = with_pixels(sync(take, action_mode=mode, wrap_angles=wrap), tmp_path / mode)
        samples = ChunkDataset([episode], chunk_size=30)
        batch = samples.__getitems__(range(len(samples)))
        valid = ~batch["action_is_pad"]
        chunks[mode] = np.where(valid[..., None], batch["action"].astype(np.float64), 0.0)
        assert (batch["action"][~valid] == 0).all()
    first = chunks["absolute"][:, :1] - chunks["delta"][:, :1]
    np.testing.assert_allclose(chunks["relative"], np.where(valid[..., None], chunks["absolute"] - first, 0), atol=1e-5)
    added = np.where(valid[..., None], np.cumsum(chunks["delta"], axis=1), 0)
    np.testing.assert_allclose(chunks["relative"], added, atol=1e-5)
    assert np.abs(chunks["relative"]).max() == pytest.approx(0.4, abs=1e-3)  # 30 frames at 0.4 rad/s


def test_episode_shorter_than_a_chunk(tmp_path):
    """Allowed: every sample is padded, and the padding starts where the episode ends."""
    take = make_take(seconds=0.4)
    episode = with_pixels(sync(take), tmp_path / "entry")
    samples = ChunkDataset([episode], chunk_size=100)
    frames = len(episode.time_ns)
    assert len(samples) == frames - 1 < 100
    batch = samples.__getitems__(list(range(len(samples))))
    assert (~batch["action_is_pad"]).sum(axis=1).tolist() == list(range(frames - 1, 0, -1))
    assert batch["action"].shape == (frames - 1, 100, 6)
    for t in range(frames - 1):
        np.testing.assert_array_equal(batch["action"][t, : frames - 1 - t], episode.action[t:-1])
    assert batch["observation.images.color"][:, 0, 0, 0].tolist() == list(range(frames - 1))


def test_pixels_are_read_without_mapping_them(tmp_path):
    """No page of a file is mapped, whatever was read of it; descriptors end with the dataset; a file that is cut short
    under a running training is an error that names it, not a signal that kills."""
    episode = with_pixels(sync(make_take(seconds=2.0)), tmp_path / "entry")
    samples = ChunkDataset([episode], chunk_size=4)
    descriptors = len(os.listdir("/proc/self/fd"))
    batch = samples.__getitems__(range(len(samples)))
    assert batch["observation.images.color"].max() > 0
    assert "color.rgb" not in Path("/proc/self/maps").read_text()
    assert len(os.listdir("/proc/self/fd")) == descriptors + 1
    os.truncate(tmp_path / "entry/color.rgb", 100)
    with pytest.raises(OSError, match=r"cut short; remove this folder, it is decoded again: '.*color.rgb'"):
        samples.__getitems__(range(len(samples)))
    del samples
    assert len(os.listdir("/proc/self/fd")) == descriptors
