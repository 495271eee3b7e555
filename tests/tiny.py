"""A training run small enough for tests: a few seconds on one core, through the entry that users call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from lerobot_checkpoint import load_policy, load_training_state
from training import trackers

ROOT = Path(__file__).resolve().parent.parent

TINY = {
    "conventions.image_resize": "[32, 48]",
    "model.chunk_size": 8,
    "model.n_action_steps": 8,
    "model.dim_model": 32,
    "model.n_heads": 2,
    "model.dim_feedforward": 64,
    "model.n_encoder_layers": 1,
    "model.n_vae_encoder_layers": 1,
    "model.latent_dim": 4,
    "model.pretrained_backbone": "false",
    "training.steps": 6,
    "training.batch_size": 2,
    "training.lr": 1e-4,
    "training.lr_backbone": 1e-4,
    "training.num_workers": 0,
    "training.log_freq": 2,
    "training.save_freq": 3,
    "training.device": "cpu",
    "training.precision": "fp32",  # on every machine; bfloat16 is in test_device.py
}


class Operations(TorchDispatchMode):
    """Inside, `names` collects the operations that are dispatched, those of backward passes included.

    `launched` are those of them that a GPU's host launches: not views, and not what only reserves memory.
    """

    # What makes the host wait for the device, or copy its own numbers there: torch.tensor begins with "lift_fresh".
    WAITING = ("_local_scalar", "nonzero", "is_nonzero", "equal", "masked_select", "_unique", "lift", "linalg_inv")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.launched: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(name := str(operation))
        only_memory = operation.is_view or "empty" in name or "_unsafe_view" in name
        if name.startswith("aten.") and not only_memory:
            self.launched.append(name)
        return operation(*args, **(kwargs or {}))

    @property
    def waiting(self) -> list[str]:
        """Those that a step must not have."""
        return [name for name in self.names if any(name.startswith(f"aten.{word}") for word in self.WAITING)]


def arguments(bags: Path, folder: Path, flags: tuple[str, ...] = (), **overrides: object) -> list[str]:
    """Command-line arguments of a tiny run on `bags` into folder/run, with a cache shared by runs on these bags.

    Overrides are given as training__steps=4.
    """
    settings = {
        **TINY,
        "data.bag_dir": bags,
        "data.cache_dir": bags.parent / "tiny-cache",
        "training.output_dir": folder / "run",
        **{name.replace("__", "."): value for name, value in overrides.items()},
    }
    pairs = [f"--override={name}={value}" for name, value in settings.items()]
    return ["--config", str(ROOT / "config.yaml"), *pairs, *flags]


def run(bags: Path, folder: Path, *flags: str, **overrides: object) -> Path:
    """Train in this process; -> the output directory. Fails the test when training does."""
    assert train.main(arguments(bags, folder, flags, **overrides)) == 0
    return folder / "run"


def run_process(
    bags: Path,
    folder: Path,
    *flags: str,
    launcher: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    **overrides,
) -> subprocess.CompletedProcess:
    """Train in a process of its own, as a user does; `launcher` replaces `python`, for example by torchrun."""
    command = [*(launcher or (sys.executable,)), str(ROOT / "train.py"), *arguments(bags, folder, flags, **overrides)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=240
    )


def torchrun(processes: int = 2, *options: str) -> tuple[str, ...]:
    """Launcher for several ranks on this machine; each call gets a port of its own."""
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *options)


def metrics(output_dir: Path, field: str = "loss") -> list[dict]:
    """The lines of metrics.jsonl that have `field`."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if field in line]


def error_line(result: subprocess.CompletedProcess) -> str:
    """The one line that a failed run must leave on stderr; no traceback, non-zero exit."""
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stderr, result.stderr
    errors = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    return errors[0]


def trainer(bags: Path, folder: Path, dtype: torch.dtype = torch.float32, **overrides: object) -> train.Trainer:
    """A Trainer that is ready for its first step, its weights in `dtype`; one rank of several under torchrun."""
    argv = arguments(bags, folder, **overrides)
    cfg = train.load_config(Path(argv[1]), [a.removeprefix("--override=") for a in argv[2:]])
    stop = train.StopSignal()
    stop.restore()
    world = train.detect_ddp()
    train.join_ddp(world, cfg.training.device)
    ready = train.Trainer(cfg, world, stop, overwrite=True)
    ready.model.to(dtype)
    ready.loader = ready.start()
    ready.trackers = trackers.Trackers(trackers.NoTracker(), trackers.NoTracker())
    return ready


def start(bags: Path, folder: Path, *flags: str, **overrides) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *arguments(bags, folder, flags, **overrides)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(output_dir: Path, step: int, process: subprocess.Popen, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    path = output_dir / "metrics.jsonl"
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not come this far"
        time.sleep(0.02)


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_policy(output_dir).model.state_dict()


def assert_same_run(one: Path, other: Path) -> None:
    """Final weights, optimizer state and every logged loss are equal to the last bit."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (load_training_state(d / "last")["optimizer"]["state"] for d in (one, other))
    assert all(torch.equal(ours[i][key], theirs[i][key]) for i in ours for key in ours[i])
    for field in ("loss", "val_l1_loss"):
        exact = ("step", "loss", "l1_loss", "kl_loss", "lr", "grad_norm", "val_l1_loss")
        lines = [[{k: m[k] for k in exact if k in m} for m in metrics(d, field)] for d in (one, other)]
        assert lines[0] == lines[1]
