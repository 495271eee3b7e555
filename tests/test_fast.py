"""What makes training fast must not make it another training; and augmentation changes what it says, nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch._inductor.config

import train
from lerobot_checkpoint import load_training_state
from tests.test_resume import assert_same_run, weights
from tests.tiny import arguments, metrics, run
from training import augment, device, feed, trackers

BF16 = {"training__precision": "bf16"}
AUGMENTED = {"augmentation__enabled": "true"}
PLAIN = {"model__dropout": 0, "model__use_vae": "false", "training__log_freq": 1}


def trainer(bags: Path, folder: Path, **overrides: object) -> train.Trainer:
    """A Trainer that is ready for its first step."""
    argv = arguments(bags, folder, **overrides)
    cfg = train.load_config(Path(argv[1]), [a.removeprefix("--override=") for a in argv[2:]])
    stop = train.StopSignal()
    stop.restore()
    ready = train.Trainer(cfg, train.detect_ddp(), stop, overwrite=True)
    ready.loader, ready.tracker = ready.start(), trackers.NoTracker()
    return ready


# -- precision ----------------------------------------------------------------------------------------------------


def test_bf16_follows_fp32_and_keeps_weights_and_optimizer_in_fp32(sample_bags: Path, tmp_path: Path, capsys):
    """The same samples, the same noise: losses within 2 %, and not equal, or nothing ran in bfloat16."""
    full = run(sample_bags, tmp_path / "fp32", training__log_freq=1)
    half = run(sample_bags, tmp_path / "bf16", **BF16, training__log_freq=1)
    ours, theirs = ([m["loss"] for m in metrics(d)] for d in (half, full))
    assert ours == pytest.approx(theirs, rel=0.02) and ours != theirs
    assert all(w.dtype in (torch.float32, torch.int64) for w in weights(half).values())
    state = load_training_state(half / "last")
    assert all(v.dtype == torch.float32 for s in state["optimizer"]["state"].values() for v in s.values())
    assert state["environment"]["precision"] == "bfloat16"
    assert "on cpu in bfloat16" in capsys.readouterr().out


def test_bf16_and_augmented_runs_resume_bit_for_bit(sample_bags: Path, tmp_path: Path):
    settings = {**BF16, **AUGMENTED, "training__log_freq": 1}
    unbroken = run(sample_bags, tmp_path / "a", **settings)
    run(sample_bags, tmp_path / "b", **settings, training__steps=3)
    assert_same_run(run(sample_bags, tmp_path / "b", "--resume", **settings), unbroken)


def test_validation_is_in_fp32_whatever_training_is(sample_bags: Path, tmp_path: Path):
    """The robot runs the policy in float32, so that is what is validated."""
    for precision in ("fp32", "bf16"):
        ready = trainer(sample_bags, tmp_path / precision, training__precision=precision)
        ready._validate()
    ours, theirs = (metrics(tmp_path / p / "run", "val_l1_loss")[0]["val_l1_loss"] for p in ("fp32", "bf16"))
    assert ours == theirs


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_where_the_hardware_computes_it(fast, dtype, monkeypatch):
    told = {"avx512_bf16": fast, "avx512_f": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)  # torch up to 2.10 has none
    assert device.choose_precision("auto", torch.device("cpu")) == dtype
    assert device.choose_precision("fp32", torch.device("cpu")) == torch.float32


def test_bf16_that_would_be_emulated_is_said(sample_bags: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(device, "has_fast_bf16", lambda device: False)
    trainer(sample_bags, tmp_path, **BF16)
    assert "no bfloat16 instructions" in capsys.readouterr().out


def test_another_precision_on_resume_is_said(sample_bags: Path, tmp_path: Path, capsys):
    run(sample_bags, tmp_path, training__steps=2)
    run(sample_bags, tmp_path, "--resume", training__steps=3, **BF16)
    assert "not bit for bit" in (said := capsys.readouterr().out) and "precision (was float32, is bfloat16)" in said


# -- frames on the device -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("free", "fits"), [(10**9, True), (1000, False)])
def test_frames_stay_on_the_device_only_when_they_fit(
    sample_bags: Path, tmp_path: Path, monkeypatch, capsys, free, fits
):
    """The decision, with a stand-in for the GPU's memory (no GPU here): at most half of what is free, and said."""
    ready = trainer(sample_bags, tmp_path)
    assert ready.frames is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    monkeypatch.setattr(feed, "DeviceFrames", lambda *_: "frames")
    feed.DeviceFrames.size_bytes, feed.DeviceFrames.SHARE = (lambda _: 10**6), 0.5
    ready.world.device = torch.device("cuda", 0)
    assert ready._frames_on_device() == ("frames" if fits else None)
    assert ("kept" if fits else "too much to keep") in capsys.readouterr().out
    ready.cfg.data.frames_on_device = "never"
    assert ready._frames_on_device() is None


# -- augmentation -------------------------------------------------------------------------------------------------


def test_augmentation_changes_training_images_only(sample_bags: Path, tmp_path: Path):
    """Images differ, the rest of the batch and the validation do not; the next step draws other amounts."""
    plain, changed = (trainer(sample_bags, tmp_path / n, **s) for n, s in (("a", {}), ("b", AUGMENTED)))
    raw = next(iter(plain.loader))
    ours, theirs = changed.prepare(raw), plain.prepare(raw)
    assert {n for n in ours if not torch.equal(ours[n], theirs[n])} == {"observation.images.color"}
    again = changed.prepare(raw)
    assert torch.equal(again["observation.images.color"], ours["observation.images.color"])
    changed.step += 1
    assert not torch.equal(changed.prepare(raw)["observation.images.color"], ours["observation.images.color"])
    for each in (plain, changed):
        each._validate()
    ours, theirs = (metrics(tmp_path / n / "run", "val_l1_loss")[0]["val_l1_loss"] for n in "ab")
    assert ours == theirs


def test_augmentation_leaves_dropouts_noise_alone(sample_bags: Path, tmp_path: Path, monkeypatch):
    """With augmentation that changes nothing (strengths 0), the run is the run without, bit for bit."""
    plain = run(sample_bags, tmp_path / "plain")
    calls, original = [], augment.draw
    monkeypatch.setattr(augment, "draw", lambda *a: (calls.append(a), torch.rand(3), original(*a))[2])
    zero = {f"augmentation__{name}": 0 for name in augment.Strengths.__dataclass_fields__}
    assert_same_run(run(sample_bags, tmp_path / "zero", **AUGMENTED, **zero), plain)
    assert len(calls) == 6


def test_changed_augmentation_on_resume_counts_and_is_said(sample_bags: Path, tmp_path: Path, capsys):
    run(sample_bags, tmp_path, training__steps=2)
    run(sample_bags, tmp_path, "--resume", training__steps=3, **AUGMENTED)
    assert "with other settings: augmentation (" in capsys.readouterr().out


# -- torch.compile ------------------------------------------------------------------------------------------------


def test_compiled_training_follows_the_uncompiled_one(sample_bags: Path, tmp_path: Path):
    """Dropout and VAE off: the same losses within 1e-4, and a checkpoint with the same names."""
    usual = run(sample_bags, tmp_path / "usual", **PLAIN, training__steps=3)
    compiled = run(sample_bags, tmp_path / "compiled", **PLAIN, training__steps=3, training__compile="true")
    ours, theirs = ([m["loss"] for m in metrics(d)] for d in (compiled, usual))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert list(weights(compiled)) == list(weights(usual))
    assert load_training_state(compiled / "last")["environment"]["compiled"]


def test_a_missing_compiler_is_one_line(sample_bags: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert train.main(arguments(sample_bags, tmp_path, training__compile="true")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "training.compile: true needs a C++ compiler, and no-such-compiler is not on the PATH" in error


def test_a_compiler_that_fails_is_one_line(sample_bags: Path, tmp_path: Path, monkeypatch, capsys):
    """A real failure of a real compiler; of a one-line function, because ACT takes torch.compile a minute."""
    (broken := tmp_path / "c++").write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (str(broken),))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    tiny = torch.compile(lambda x: x.sin() + 1)
    monkeypatch.setattr(train.ACT, "compile", lambda self: None)
    monkeypatch.setattr(train.ACT, "forward", lambda self, batch: tiny(batch["observation.state"]))
    assert train.main(arguments(sample_bags, tmp_path, training__compile="true")) == 1
    assert "error: training.compile: true: torch.compile failed (" in capsys.readouterr().err


def test_wandb_gets_the_images_that_the_network_sees(sample_bags: Path, tmp_path: Path, monkeypatch):
    """uint8, height x width x colour, as stored: normalising and back loses at most one level."""
    ready = trainer(sample_bags, tmp_path)
    raw = next(iter(ready.loader))
    logged = {}
    monkeypatch.setattr(
        trackers, "import_wandb", lambda: type("wandb", (), {"Image": staticmethod(lambda image: image)})
    )
    run_stub = type("Run", (), {"log": lambda self, values: logged.update(values)})()
    trackers.log_camera_views(run_stub, ready.prepare(raw), ready.normalizer)
    seen = torch.tensor(logged["observation.images.color"][1])
    assert seen.dtype == torch.uint8
    assert (seen.int() - raw["observation.images.color"][1].int()).abs().max() <= 1
    json.dumps(logged["step"])
