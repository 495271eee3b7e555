"""training.ema_decay: the policy is a moving average of the weights, and training does not notice it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import train
from lerobot_checkpoint import load_training_state
from tests.tiny import arguments, assert_same_run, metrics, run, trainer, weights

EMA = {"training__ema_decay": 0.6, "training__save_freq": 2}


@pytest.fixture(scope="module")
def averaged(sample_bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with an average, without interruption; read-only for the tests."""
    return run(sample_bags, tmp_path_factory.mktemp("averaged"), **EMA)


@pytest.fixture(scope="module")
def plain(sample_bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without."""
    return run(sample_bags, tmp_path_factory.mktemp("plain"), training__save_freq=2)


def test_the_average_is_the_one_by_hand(sample_bags: Path, tmp_path: Path):
    """In step n a part min(decay, 1 - n^-0.75) of the average stays: nothing of the start, later most of it."""
    ready = trainer(sample_bags, tmp_path, training__ema_decay=0.6, training__lr=1e-2, training__lr_backbone=1e-2)
    batches = iter(ready.loader)
    by_hand: dict[str, torch.Tensor] = {}
    parts = []
    for n in range(1, 6):
        ready.train_step(ready.prepare(next(batches)))
        parts.append(min(0.6, 1 - 1 / n**0.75))
        for name, weight in ready.model.state_dict().items():
            before = by_hand.get(name, torch.zeros(()))
            by_hand[name] = parts[-1] * before + (1 - parts[-1]) * weight.double()
    assert parts[0] == 0 and 0.40 < parts[1] < 0.41 and parts[-1] == 0.6  # warming up, and arrived
    policy = ready.average.policy.state_dict()
    assert all(torch.allclose(policy[name].double(), tensor, rtol=1e-5, atol=1e-7) for name, tensor in by_hand.items())
    assert not torch.allclose(policy["action_head.weight"], ready.model.action_head.weight, rtol=1e-3)


def test_the_average_is_the_policy_and_training_does_not_notice(
    averaged: Path, plain: Path, sample_bags: Path, tmp_path: Path
):
    """What is written for LeRobot and the robot, and validated, is the average; losses, gradients and the weights that
    go on are those of a run without."""
    own = load_training_state(averaged / "last")["own_weights"]
    assert all(torch.equal(own[name], tensor) for name, tensor in weights(plain).items())
    policy = weights(averaged)
    assert not torch.equal(policy["action_head.weight"], own["action_head.weight"])
    assert [m["loss"] for m in metrics(averaged)] == [m["loss"] for m in metrics(plain)]
    ready = trainer(sample_bags, tmp_path)
    ready.model.load_state_dict(policy)
    assert ready._validate() == metrics(averaged, "val_l1_loss")[-1]["val_l1_loss"]
    assert "own_weights" not in load_training_state(plain / "last")


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_average_is_the_same(averaged: Path, sample_bags: Path, tmp_path: Path, step: int):
    """Killed behind a checkpoint and resumed: the average, the weights and every loss to the last bit."""
    broken = Path(shutil.copytree(averaged, tmp_path / "run", symlinks=True))
    for checkpoint in broken.glob("checkpoint_*"):
        if int(checkpoint.name[-6:]) > step:
            shutil.rmtree(checkpoint)
    for link in ("last", "best"):
        (broken / link).unlink()
    run(sample_bags, tmp_path, "--resume", **EMA)
    assert_same_run(broken, averaged)
    ours, theirs = (load_training_state(d / "last")["own_weights"] for d in (broken, averaged))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_switched_off_and_on_by_a_resume(averaged: Path, plain: Path, sample_bags: Path, tmp_path: Path, capsys):
    """Off: the policy is what is trained, as if there had never been an average. On: it begins with the weights of that
    step. Both are said."""
    off = Path(shutil.copytree(averaged, tmp_path / "off/run", symlinks=True))
    shutil.rmtree(off / "checkpoint_000006")
    (off / "last").unlink()
    run(sample_bags, tmp_path / "off", "--resume", training__save_freq=2)
    assert "training.ema_decay (was 0.6, is None)" in capsys.readouterr().out
    assert all(torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(off).items())
    on = Path(shutil.copytree(plain, tmp_path / "on/run", symlinks=True))
    run(sample_bags, tmp_path / "on", "--resume", training__steps=7, **EMA)
    assert "training.ema_decay (was None, is 0.6)" in capsys.readouterr().out
    own, before = load_training_state(on / "last")["own_weights"], weights(plain)
    by_hand = {name: 0.6 * before[name] + 0.4 * own[name] for name in before}
    assert all(torch.allclose(weights(on)[name], by_hand[name], atol=1e-6) for name in before)


@pytest.mark.parametrize("decay", ["0", "1"])
def test_a_decay_is_between_0_and_1(decay: str, sample_bags: Path, tmp_path: Path, capsys):
    """0 would be an average of one step, 1 one that never moves: off is null."""
    assert train.main(arguments(sample_bags, tmp_path, training__ema_decay=decay)) == 1
    assert "training.ema_decay: found" in (line := capsys.readouterr().err) and "or null" in line
