"""Weights & Biases, the real package in offline mode."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import metrics, run_process, trainer
from training import trackers


def offline_records(folder: Path) -> list:
    """Every record of an offline run's file: blocks of 32 KiB, each record behind 7 bytes of checksum, size, type."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("*.wandb")
    data, position, parts, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or last part
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def test_wandb_logs_what_metrics_jsonl_holds(sample_bags: Path, tmp_path: Path):
    """Offline, read back: project, name, tags, the config, the metrics against our own step, the camera views."""
    result = run_process(
        sample_bags, tmp_path, env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"}, wandb__enabled="true",
        wandb__run_name="001", wandb__tags="[osmo, test]",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    records = offline_records(tmp_path / "run")
    (run_record,) = [r.run for r in records if r.HasField("run")]
    assert run_record.project == "ur10e-act-train" and run_record.display_name == "001"
    assert list(run_record.tags) == ["osmo", "test"]
    config = {c.key or c.nested_key[0]: json.loads(c.value_json) for c in run_record.config.update}
    assert config["training"]["steps"] == 6 and config["conventions"]["image_resize"] == [32, 48]
    history = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    logged = [h for h in history if "l1_loss" in h]
    for ours, theirs in zip(metrics(tmp_path / "run"), logged, strict=True):
        assert {k: theirs[k] for k in ("step", "loss", "l1_loss", "kl_loss", "lr")} == pytest.approx(
            {k: ours[k] for k in ("step", "loss", "l1_loss", "kl_loss", "lr")}
        )
    assert sum("observation.images.color" in h for h in history) == 1
    assert list((tmp_path / "run").rglob("media/images/**/*.png"))
    assert any(r.HasField("metric") and r.metric.step_metric == "step" for r in records)


def test_wandb_is_not_imported_when_disabled(sample_bags: Path, tmp_path: Path):
    """Off means off: no import, no folder."""
    code = (
        "import sys; import train; code = train.main(sys.argv[2:]); assert 'wandb' not in sys.modules; sys.exit(code)"
    )
    result = run_process(sample_bags, tmp_path, launcher=(sys.executable, "-c", code), training__steps=1)
    assert result.returncode == 0, result.stderr
    assert not list((tmp_path / "run").glob("wandb*"))


def test_wandb_continues_the_same_run(sample_bags: Path, tmp_path: Path):
    """The run's id lies in the checkpoint, so that a resumed run draws on the same curve."""
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for steps in (3, 6):
        result = run_process(sample_bags, tmp_path, "--resume", env=env, wandb__enabled="true", training__steps=steps)
        assert result.returncode == 0, result.stderr
    folders = [p.name for p in (tmp_path / "run/wandb").glob("offline-run-*")]
    assert len(folders) == 2 and len({name.rsplit("-", 1)[1] for name in folders}) == 1


def test_wandb_gets_the_images_that_the_network_sees(sample_bags: Path, tmp_path: Path, monkeypatch):
    """uint8, height x width x colour, as stored: normalising and back loses at most one level."""
    ready = trainer(sample_bags, tmp_path)
    raw = next(iter(ready.loader))
    logged = {}
    monkeypatch.setattr(
        trackers, "import_wandb", lambda: type("wandb", (), {"Image": staticmethod(lambda image: image)})
    )
    run_stub = type("Run", (), {"log": lambda self, values: logged.update(values)})()
    both = trackers.Trackers(run_stub, trackers.NoTracker())
    both.log_camera_views(ready.prepare(raw), ready.normalizer)
    seen = torch.tensor(logged["observation.images.color"][1])
    assert seen.dtype == torch.uint8
    assert (seen.int() - raw["observation.images.color"][1].int()).abs().max() <= 1
    json.dumps(logged["step"])
