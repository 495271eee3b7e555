"""The image backbone's weights to start from: torchvision's ImageNet weights, or those in a file."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision

from act_model import ACT

from .errors import ConfigError


def backbone_weights(vision_backbone: str, pretrained: bool | str) -> dict[str, torch.Tensor] | None:
    """State dict of the image backbone as model.pretrained_backbone says, or None for random weights.

    Args:
        vision_backbone: torchvision's name of the network.
        pretrained: True for the ImageNet weights (downloaded, once), False for none, or a file of weights.

    Raises:
        ConfigError: no download, no such file, or not a file of weights; says how to go on.
    """
    if pretrained is False:
        return None
    weights = torchvision.models.get_model_weights(vision_backbone)["IMAGENET1K_V1"]
    if pretrained is True:
        try:
            return weights.get_state_dict(progress=False, check_hash=True)
        except Exception as exc:  # URLError, HTTPError, timeouts, hash mismatch: all mean "no weights"
            raise ConfigError(
                f"model.pretrained_backbone: true needs torchvision's {vision_backbone} ImageNet weights, and "
                f"the download failed ({' '.join(str(exc).split())}); fetch {Path(weights.url).name} where there is a "
                "network and set model.pretrained_backbone to its path, or to false to start from random weights"
            ) from None
    try:
        if pretrained.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(pretrained)
        return torch.load(pretrained, map_location="cpu", weights_only=True)
    except Exception as exc:  # missing, a folder, not a pickle, not tensors: torch raises many types
        reason = " ".join(str(exc).split())[:120]
        raise ConfigError(f"model.pretrained_backbone: {pretrained}: not a file of weights ({reason})") from None


def load_backbone(model: ACT, weights: dict[str, torch.Tensor], source: bool | str) -> None:
    """Put the weights into the model's backbone. Raises ConfigError when they do not fit, naming their `source`."""
    try:
        model.load_backbone(weights)
    except ValueError as error:
        raise ConfigError(f"model.pretrained_backbone: {source}: {error}") from None
