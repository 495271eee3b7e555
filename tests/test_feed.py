"""The order of samples, and frames that live on the device: neither may change what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import train
from tests.tiny import assert_same_run, run, trainer
from training import feed
from training.feed import SampleStream


def test_every_epoch_is_a_permutation_of_its_own():
    """N samples in a row are each sample once; the next N are another order."""
    stream = iter(SampleStream(10, 5, rank=0, world_size=1, seed=3))
    epochs = [next(stream) + next(stream) for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


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
    """Staged on the CPU, where no GPU is: the loader sends indices, and every weight is the same to the last bit."""
    usual = run(sample_bags, tmp_path / "usual")
    sent = []
    original = feed.to_device
    monkeypatch.setattr(feed, "to_device", lambda batch, where: (sent.append(set(batch)), original(batch, where))[1])
    monkeypatch.setattr(
        train.Trainer, "_frames_on_device", lambda self: feed.DeviceFrames(self.train_episodes, self.world.device)
    )
    assert_same_run(run(sample_bags, tmp_path / "device"), usual)
    assert {"image_index.color"} == {n for names in sent[:3] for n in names if "image" in n}


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
