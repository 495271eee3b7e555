"""The order of samples, and frames that live on the device: neither may change what is trained."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from rosbag_dataset import ChunkDataset
from tests.bags import JOINT_TOPIC, T0_NS, make_take, settings, smooth_path, write_bag
from tests.checks import load
from tests.tiny import assert_same_run, run, trainer
from training import feed, identity
from training.feed import SampleStream

COMMANDS = "/commands"
ORDER_3 = [6, 9, 1, 3, 2, 7, 0, 4, 5, 8]


orders = pytest.mark.parametrize("order", feed.ORDERS)


@orders
@pytest.mark.parametrize("n_samples", [1, 2, 10, 16, 17, 5000])
def test_every_epoch_is_a_permutation_of_its_own(n_samples: int, order: int):
    """N samples in a row are each sample once; the next N are another order, and so are another seed's."""
    streams = [iter(SampleStream(n_samples, n_samples, 0, 1, seed, order=order)) for seed in (3, 4)]
    epochs = [next(streams[0]) for _ in range(3)]
    assert all(sorted(epoch) == list(range(n_samples)) for epoch in epochs)
    if n_samples >= 10:  # else two may be equal by chance
        assert epochs[0] != epochs[1] != epochs[2] and next(streams[1]) not in epochs[:1]


def test_the_order_is_as_good_as_chance():
    """Over 2000 epochs of 50 samples each sample is at each place equally often, and so is each at the next place after
    each other one: chi-squared within five deviations of its mean, as torch.randperm's is."""
    for order in feed.ORDERS.values():
        permutations = order(50, seed=1)
        epochs = np.array([[permutations.at(epoch, place) for place in range(50)] for epoch in range(2000)])
        places, pairs = np.zeros((50, 50)), np.zeros((50, 50))
        np.add.at(places, (np.arange(50), epochs), 1)
        np.add.at(pairs, (epochs[:, :-1], epochs[:, 1:]), 1)
        pairs = pairs[~np.eye(50, dtype=bool)]
        for counts, free in ((places, 49 * 49), (pairs, 50 * 49 - 1)):
            chi_squared = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
            assert abs(chi_squared - free) < 5 * np.sqrt(2 * free), (order, chi_squared, free)


def test_no_epoch_takes_memory():
    """Of 50 million samples any place is there at once: no array of all of them, in no epoch."""
    tracemalloc.start()
    stream = SampleStream(50_000_000, 8, 0, 1, seed=0)
    seen = [stream.at(position) for position in (0, 49_999_999, 50_000_000, 10**12)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000 and len(set(seen)) == 4 and max(seen) < 50_000_000


def test_a_run_keeps_the_order_that_it_began_with():
    """A checkpoint says which; from before it said any, or of the second version, it is torch.randperm's."""
    said = {version: identity.sample_order({"sample order": version}) for version in (2, 3, 4)}
    assert said == {2: 2, 3: 3, 4: 3} and identity.sample_order({}) == 2 and identity.sample_order(None) == 3
    first = torch.randperm(10, generator=torch.Generator().manual_seed(5 + 1)).tolist()
    assert next(iter(SampleStream(10, 10, 0, 1, seed=5, start=10, order=2))) == first
    # To the letter: a new order is a new version.
    assert next(iter(SampleStream(10, 10, 0, 1, seed=5, start=10, order=3))) == ORDER_3


@pytest.mark.parametrize("n_samples", [7, 8, 100])
def test_ranks_share_what_one_process_would_see(n_samples: int):
    """2 ranks x batch b see, in each step, the samples of 1 rank x batch 2b; no uneven last batch, ever."""
    alone = iter(SampleStream(n_samples, 6, 0, 1, seed=0))
    ranks = [iter(SampleStream(n_samples, 3, r, 2, seed=0)) for r in range(2)]
    for _ in range(50):
        first, second = next(ranks[0]), next(ranks[1])
        assert [i for pair in zip(first, second, strict=True) for i in pair] == next(alone)


def test_the_place_in_the_data_survives_another_batch_size():
    """Starting at 12 samples gives what the unbroken stream gives after 12, whatever the batch."""
    unbroken = iter(SampleStream(10, 4, 0, 1, seed=0))
    for _ in range(3):
        next(unbroken)
    expected = next(unbroken) + next(unbroken)
    assert next(iter(SampleStream(10, 8, 0, 1, seed=0, start=12))) == expected


def test_every_step_of_every_rank_draws_noise_of_its_own(sample_bags: Path, tmp_path: Path, monkeypatch):
    """Dropout and the latent's noise: else all steps, or all ranks, would drop the same elements."""
    ready, seeds, original = trainer(sample_bags, tmp_path), [], torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: (seeds.append(torch.initial_seed()), original(x))[1])
    batch = ready.prepare(next(iter(ready.loader)))
    for ready.step, ready.world.rank in ((0, 0), (1, 0), (0, 1), (1, 1)):
        ready.train_step(batch)
    assert len(set(seeds)) == 4
    uses = [feed.step_seed(*of) for of in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 2, 3, "x"), (12, 3, 3))]
    assert len(set(uses)) == len(uses) and all(0 <= seed < 2**63 for seed in uses)


def test_frames_on_the_device_give_the_same_training(sample_bags: Path, tmp_path: Path, monkeypatch):
    """Staged on the CPU, where no GPU is: the loader sends numbers, and every weight is the same to the last bit."""
    usual = run(sample_bags, tmp_path / "usual")
    sent = []
    original = feed.to_device
    monkeypatch.setattr(feed, "to_device", lambda batch, where: (sent.append(set(batch)), original(batch, where))[1])
    monkeypatch.setattr(
        train.Trainer, "_frames_on_device", lambda self: feed.DeviceFrames(self.dataset, self.world.device)
    )
    assert_same_run(run(sample_bags, tmp_path / "device", training__num_workers=2), usual)
    assert sent[0] == {"index"}


@pytest.mark.parametrize("commanded", [False, True], ids=["measured", "commanded"])
@pytest.mark.parametrize("mode", ["delta", "absolute", "relative"])
def test_batches_cut_on_the_device_are_the_samples(tmp_path: Path, mode: str, commanded: bool):
    """Every sample bit for bit, over gaps, short segments and two episodes, whatever actions are."""
    for name, gap_s in (("a", 0.9), ("b", 0.4)):
        messages = make_take(seconds=2.0, path=lambda t, scale=gap_s: scale * smooth_path(t)).messages()
        commands = [(COMMANDS, t - 30_000_000, m) for topic, t, m in messages if topic == JOINT_TOPIC]
        kept = [m for m in messages if not gap_s <= (m[1] - T0_NS) / 1e9 < gap_s + 0.3]
        write_bag(tmp_path / "bags" / name, sorted(kept + commands * commanded, key=lambda m: m[1]))
    changes = {"action_source": COMMANDS} if commanded else {}
    episodes, _ = load(settings(tmp_path / "bags", action_mode=mode, **changes))
    dataset = ChunkDataset(episodes, 7)
    assert sum(len(e.segments) for e in episodes) > 2
    chosen = np.random.default_rng(0).permutation(len(dataset)).tolist()
    wanted = feed.to_tensors(dataset.__getitems__(chosen))
    frames = feed.DeviceFrames(dataset, torch.device("cpu"))
    got = frames.look_up({"index": torch.tensor(chosen)})
    assert got.keys() == wanted.keys()
    kinds = {"absolute": "values", "relative": "offsets", "delta": "steps" if commanded else "values"}
    assert frames.chunks_are == kinds[mode]
    for name, values in wanted.items():
        assert got[name].dtype == values.dtype and torch.equal(got[name], values), name


def in_cache(folder: Path) -> ChunkDataset:
    """Samples whose pictures lie in the frame cache, 38 or so."""
    write_bag(folder / "bags" / "a", make_take(seconds=1.5).messages())
    return ChunkDataset(load(settings(folder / "bags", frames="cache"))[0], 5)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_threads_load_is_in_order_and_the_same(tmp_path: Path, threads: int, monkeypatch):
    """Bit for bit, and whichever of them is done first: here every other batch takes longer than the next ones."""
    dataset, load_now, slow = in_cache(tmp_path), ChunkDataset.__getitems__, itertools.cycle((0.03, 0.0))
    stream = SampleStream(len(dataset), 4, 0, 1, seed=0)
    wanted = [feed.to_tensors(dataset.__getitems__(indices)) for indices in itertools.islice(stream, 12)]
    monkeypatch.setattr(ChunkDataset, "__getitems__", lambda self, i: (time.sleep(next(slow)), load_now(self, i))[1])
    loader = feed.make_loader(dataset, stream, threads, torch.device("cpu"))
    assert isinstance(loader, feed.Threads)
    batches = iter(loader)
    for expected in wanted:
        got = next(batches)
        assert got.keys() == expected.keys()
        assert all(got[name].dtype == of.dtype and torch.equal(got[name], of) for name, of in expected.items())
    feed.end_loader(batches)


def test_threads_end_with_the_loader_and_say_what_went_wrong(tmp_path: Path):
    """...although the stream has work for ever; an error of theirs is raised where the batch is asked for."""
    dataset = in_cache(tmp_path)
    stream = SampleStream(len(dataset), 4, 0, 1, seed=0)
    (pixels,) = (tmp_path / "cache").rglob("*.rgb")
    for size, outcome in (
        (pixels.stat().st_size, contextlib.nullcontext()),
        (1, pytest.raises(OSError, match="short")),
    ):
        os.truncate(pixels, size)
        batches = iter(feed.make_loader(dataset, stream, 2, torch.device("cpu")))
        with outcome:
            next(batches)
        feed.end_loader(batches)
        deadline_s = time.monotonic() + 10
        while alive := [t.name for t in threading.enumerate() if t.name.startswith("loader")]:
            assert time.monotonic() < deadline_s, alive


def test_frames_stay_on_the_device_only_when_they_fit(sample_bags: Path, tmp_path: Path, monkeypatch, capsys):
    """They may take half of the memory that is free, not a byte more, and it is said. (No GPU here: its memory is made
    up; the size of the frames is real.)"""
    ready = trainer(sample_bags, tmp_path)
    assert ready.frames is None
    size = 32 * 48 * 3 * sum(e.stored_images["color"] for e in ready.train_episodes)
    monkeypatch.setattr(feed.DeviceFrames, "__init__", lambda *_: None)
    ready.world.device = torch.device("cuda", 0)
    for free, fits in ((2 * size, True), (2 * size - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * size))
        assert (ready._frames_on_device() is not None) == fits
        assert ("kept" if fits else "too much to keep") in capsys.readouterr().out
    ready.cfg.data.frames_on_device = "never"
    assert ready._frames_on_device() is None
