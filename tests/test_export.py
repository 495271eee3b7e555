"""A policy as one file: what a runtime without our code gives is what the checkpoint gives, and it knows its robot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from ur10e_deploy import export, runtimes
from ur10e_deploy.policy_runner import PolicyError, PolicyRunner

from act_model import ACTION
from tests.policies import TWO_CAMERAS, contract_of, random_observation, save_ours, trained, two_cameras_contract

__all__ = ["trained"]  # a fixture


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """Random weights, two cameras of different size, statistics that matter."""
    return save_ours(tmp_path / "ours", two_cameras_contract(contract_of(trained)))


def runner_of(checkpoint: Path, backend: str) -> PolicyRunner:
    return PolicyRunner(checkpoint, backend=backend, device="cpu")


def exported(checkpoint: Path, folder: Path, kind: str) -> Path:
    """The file that the command writes."""
    file = folder / f"policy.{kind}"
    assert export.main(["--checkpoint", str(checkpoint), "--format", kind, "--output", str(file)]) == 0
    return file


def sigma(policy: PolicyRunner, ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float((np.abs(ours - theirs) / policy.policy.stats[ACTION]["std"]).max())


def test_an_onnx_file_needs_nothing_of_ours(checkpoint: Path, tmp_path: Path, capsys):
    """onnxruntime alone, on raw states and pictures of two cameras, gives the checkpoint's chunk to 1e-5 of the
    action's deviation; the contract lies in the file."""
    file = exported(checkpoint, tmp_path, "onnx")
    assert "standard deviations of the action" in capsys.readouterr().out
    runner = runner_of(checkpoint, "native")
    state, images = random_observation(TWO_CAMERAS)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    feeds = {"state": state.astype(np.float32)[None], **{f"image_{c}": image[None] for c, image in images.items()}}
    assert {i.name: i.type for i in session.get_inputs()} == {
        "state": "tensor(float)", "image_wrist": "tensor(uint8)", "image_front": "tensor(uint8)",
    }  # fmt: skip
    (actions,) = session.run(None, feeds)
    assert sigma(runner, runner.predict_chunk(state, images), actions[0]) < 1e-5
    contract = json.loads(session.get_modelmeta().custom_metadata_map["contract"])
    assert contract["state_names"] == list(runner.contract.state_names) and contract["fps"] == runner.contract.fps


def test_a_torch_export_file_runs_without_our_code(checkpoint: Path, tmp_path: Path):
    """In another process, which can import torch and nothing from here."""
    file = exported(checkpoint, tmp_path, "torch-export")
    runner = runner_of(checkpoint, "native")
    state, images = random_observation(TWO_CAMERAS)
    np.savez(tmp_path / "in.npz", state=state.astype(np.float32)[None], **{c: i[None] for c, i in images.items()})
    code = (
        "import numpy as np, torch, sys, json; extra = {'contract': ''}\n"
        "module = torch.export.load(sys.argv[1], extra_files=extra).module(); given = np.load(sys.argv[2])\n"
        "actions = module(*(torch.from_numpy(given[name]) for name in ('state', 'wrist', 'front')))\n"
        "np.save(sys.argv[3], actions.detach().numpy()); print(json.loads(extra['contract'])['action_mode'])"
    )
    command = [sys.executable, "-I", "-c", code, str(file), str(tmp_path / "in.npz"), str(tmp_path / "out.npy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == runner.contract.action_mode
    assert sigma(runner, runner.predict_chunk(state, images), np.load(tmp_path / "out.npy")[0]) < 1e-5


def test_the_runner_runs_it(checkpoint: Path):
    """backend="onnx" gives the native one's actions, step after step, and says what it is."""
    ours_, theirs = runner_of(checkpoint, "native"), runner_of(checkpoint, "onnx")
    assert (theirs.backend, theirs.backend_version) == ("onnx", onnxruntime.__version__)
    for seed in range(3):
        state, images = random_observation(TWO_CAMERAS, seed=seed)
        assert sigma(ours_, ours_.predict_chunk(state, images), theirs.predict_chunk(state, images)) < 1e-5
        assert sigma(ours_, ours_.predict(state, images), theirs.predict(state, images)) < 1e-5


def test_other_actions_are_not_written_and_not_run(checkpoint: Path, tmp_path: Path, monkeypatch, capsys):
    """A file that gives other actions than the checkpoint is refused, by the command and by the runner."""
    forward = runtimes.Deployable.forward
    monkeypatch.setattr(runtimes.Deployable, "forward", lambda self, *inputs: forward(self, *inputs) * 1.01)
    file = tmp_path / "policy.pt2"
    arguments = ["--checkpoint", str(checkpoint), "--format", "torch-export", "--output", str(file)]
    assert export.main(arguments) == 1 and not file.exists()
    assert "standard deviations from the checkpoint's" in capsys.readouterr().err
    with pytest.raises(PolicyError, match="onnxruntime .* gives actions .* standard deviations from ours"):
        runner_of(checkpoint, "onnx")


def test_what_is_missing_is_said(checkpoint: Path, tmp_path: Path, monkeypatch, capsys):
    """One line for a package that is not there, and for a folder that cannot be written."""
    (tmp_path / "file").touch()
    arguments = ["--checkpoint", str(checkpoint), "--format", "torch-export"]
    assert export.main([*arguments, "--output", str(tmp_path / "file/policy.pt2")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/file")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(PolicyError, match="the package onnx is not installed; run: pip install onnx"):
        runner_of(checkpoint, "onnx")
