"""Weights to start from: a file, or torchvision's download with a way out when there is no network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

import train
from tests.tiny import run
from training.initial_weights import backbone_weights


def test_pretrained_weights_come_from_a_file(sample_bags: Path, tmp_path: Path):
    """model.pretrained_backbone: PATH starts from these weights (an offline cluster cannot download them)."""
    weights = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    model = train.ACT(train.act_config(train.Config()))
    cfg = train.ModelConfig(pretrained_backbone=str(tmp_path / "resnet18.pth"))
    model.load_backbone(backbone_weights(cfg.vision_backbone, cfg.pretrained_backbone))
    assert torch.equal(model.backbone.conv1.weight, weights["conv1.weight"])
    run(sample_bags, tmp_path, model__pretrained_backbone=tmp_path / "resnet18.pth", training__steps=1)


def test_weights_that_cannot_be_downloaded_say_how_to_go_on(monkeypatch):
    """Offline: the file to fetch, the key to set, and the way without. (The download itself is torchvision's; only
    the refusal of the network is staged here.)"""

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", "/nonexistent")
    with pytest.raises(train.ConfigError) as error:
        backbone_weights(train.ModelConfig().vision_backbone, True)
    line = str(error.value)
    assert "resnet18-f37072fd.pth" in line and "model.pretrained_backbone" in line and "false" in line
