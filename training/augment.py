"""Random changes of training images, for a whole batch at once, on the images' device.

Every sample and every camera gets changes of its own: the exposure and the mount of one camera do not move with
another's. The amounts are drawn on the CPU from a generator of their own, so that a resumed run draws the same ones,
and dropout's noise is the same with augmentation and without.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .settings import setting

LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601 as torchvision rounds it in rgb_to_grayscale
# Turning YIQ's chroma plane (I, Q) turns the hue and leaves the luma Y alone (FCC NTSC 1953).
RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


@dataclass
class AugmentationConfig:
    """The section `augmentation`: changes of training images, never of held-out episodes, nor of anything but images.

    A factor is drawn from [1 - x, 1 + x], the others from [-x, x]; 0 leaves a change out.
    """

    enabled: bool = setting(False, "change training images at random")
    brightness: float = setting(0.2, "factor from 1 -/+ this", low=0.0)
    contrast: float = setting(0.2, "factor from 1 -/+ this", low=0.0)
    saturation: float = setting(0.5, "factor from 1 -/+ this", low=0.0)
    hue: float = setting(0.05, "turn of -/+ this part of the colour circle", low=0.0)
    rotate_deg: float = setting(5.0, "rotation of -/+ this, degrees", low=0.0)
    translate: float = setting(0.05, "shift of -/+ this part of height and width", low=0.0)
    scale: float = setting(0.0, "factor from 1 -/+ this", low=0.0)


FACTORS = ("brightness", "contrast", "saturation", "scale")
GEOMETRY = ("rotate_deg", "translate_x", "translate_y", "scale")


def draw(section: AugmentationConfig, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Uniform amounts for a batch, {name: (B,) float32 on the CPU}.

    The names are the section's, except that `translate` gives translate_x and translate_y. A change whose strength is
    0 is not drawn.
    """
    limits = {
        "brightness": section.brightness, "contrast": section.contrast, "saturation": section.saturation,
        "hue": section.hue, "rotate_deg": section.rotate_deg, "scale": section.scale,
        "translate_x": section.translate, "translate_y": section.translate,
    }  # fmt: skip
    amounts = {}
    for name, limit in limits.items():
        if limit > 0:
            offset = (torch.rand(batch_size, generator=generator) * 2 - 1) * limit
            amounts[name] = (1 + offset).clamp(min=0) if name in FACTORS else offset
    return amounts


def draw_for(section: AugmentationConfig, cameras: int, batch_size: int, seed: int) -> list[dict[str, Tensor]]:
    """Amounts for each camera of a batch; [] when the section is not enabled."""
    if not section.enabled:
        return []
    generator = torch.Generator().manual_seed(seed)
    return [draw(section, batch_size, generator) for _ in range(cameras)]


def apply(images: Tensor, amounts: dict[str, Tensor]) -> Tensor:
    """Change images (B, 3, H, W), floats in [0, 1], by amounts as `draw` makes them; the result is in [0, 1] too.

    Brightness, contrast and saturation are torchvision's adjust_* in this order, but clamped once, at the end. Hue is a
    turn of the chroma plane. Rotation (clockwise), shift and scale are torchvision's affine: about the image's centre,
    bilinear, black where there was nothing.
    """
    amounts = {name: values.to(images.device, images.dtype, non_blocking=True) for name, values in amounts.items()}
    if any(name in amounts for name in ("brightness", "contrast", "saturation", "hue")):
        images = _change_colours(images, amounts)
    if any(name in amounts for name in GEOMETRY):
        images = _move(images, amounts)
    return images.clamp(0, 1)


def _change_colours(images: Tensor, amounts: dict[str, Tensor]) -> Tensor:
    """All four are affine in the colour, so that each image needs one 3x3 matrix and one offset, and one pass."""
    B = images.shape[0]
    luma = images.new_tensor(LUMA)
    matrix = torch.eye(3, dtype=images.dtype, device=images.device).expand(B, 3, 3)
    offset = images.new_zeros(B, 1, 1)
    if "brightness" in amounts:
        matrix = matrix * amounts["brightness"].view(B, 1, 1)
    if "contrast" in amounts:  # towards the image's mean grey, after the change of brightness
        factor = amounts["contrast"].view(B, 1, 1)
        grey = torch.einsum("r,brc,bc->b", luma, matrix, images.mean(dim=(2, 3))).view(B, 1, 1)
        matrix, offset = matrix * factor, (1 - factor) * grey
    if "saturation" in amounts:  # towards each pixel's grey: a grey offset passes through
        factor = amounts["saturation"].view(B, 1, 1)
        matrix = (factor * torch.eye(3, device=images.device) + (1 - factor) * luma.expand(3, 3)) @ matrix
    if "hue" in amounts:
        angle = amounts["hue"] * (2 * math.pi)
        cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
        turn = torch.stack([one, zero, zero, zero, cos, sin, zero, -sin, cos], dim=1).view(B, 3, 3)
        to_yiq = images.new_tensor(RGB_TO_YIQ)
        matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq @ matrix
    return torch.einsum("brc,bchw->brhw", matrix, images) + offset.unsqueeze(-1)


def _move(images: Tensor, amounts: dict[str, Tensor]) -> Tensor:
    """Sample each output pixel where the inverse of (rotate, scale, then shift) says, in pixels about the centre."""
    B, _, height, width = images.shape
    zeros = images.new_zeros(B)
    angle = torch.deg2rad(amounts.get("rotate_deg", zeros))
    scale = amounts.get("scale", zeros + 1).clamp(min=1e-3)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    dx, dy = amounts.get("translate_x", zeros) * width, amounts.get("translate_y", zeros) * height
    # affine_grid counts from -1 to 1 over each axis, hence the ratio of the sides.
    row_x = torch.stack([cos, sin * height / width, -(cos * dx + sin * dy) * 2 / width], dim=1)
    row_y = torch.stack([-sin * width / height, cos, (sin * dx - cos * dy) * 2 / height], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), mode="bilinear", padding_mode="zeros", align_corners=False)
