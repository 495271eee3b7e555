"""Random changes of training images, for a whole batch at once, on the images' device.

Every sample and every camera gets changes of its own: the exposure and the mount of one camera do not move with
another's. The amounts are drawn on the CPU from a generator of their own, so that a resumed run draws the same ones,
and dropout's noise is the same with augmentation and without.
"""

from __future__ import annotations

import functools
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
    """Change images (B, 3, H, W), float32 in [0, 1], by amounts as `draw` makes them; the result is in [0, 1] too.

    Brightness, contrast and saturation are torchvision's adjust_* in this order, but clamped once, at the end. Hue is a
    turn of the chroma plane. Rotation (clockwise), shift and scale are torchvision's affine: about the image's centre,
    bilinear, black where there was nothing. The host does not wait for the device.
    """
    if amounts:
        drawn = torch.stack(list(amounts.values()))
        if images.is_cuda:
            drawn = drawn.pin_memory()  # a copy of other memory may wait for what the GPU has to do
        amounts = dict(zip(amounts, drawn.to(images.device, non_blocking=True), strict=True))
    if any(name in amounts for name in ("brightness", "contrast", "saturation", "hue")):
        images = _change_colours(images, amounts)
    if any(name in amounts for name in GEOMETRY):
        images = _move(images, amounts)
    return images.clamp(0, 1)


@functools.cache
def _colour_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """-> (luma (3,), four colour matrices (4, 9)): of what a turn keeps, of its cosine, of its sine; and to grey."""
    to_yiq = torch.tensor(RGB_TO_YIQ, dtype=torch.float64)
    planes = torch.tensor([
        [[1, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0, 0, 0], [0, 0, 1], [0, -1, 0]],
    ], dtype=torch.float64)  # fmt: skip
    luma = torch.tensor(LUMA, dtype=torch.float64)
    matrices = torch.cat([torch.linalg.inv(to_yiq) @ planes @ to_yiq, luma.expand(1, 3, 3)])
    return luma.float().to(device), matrices.flatten(1).float().to(device)


def _change_colours(images: Tensor, amounts: dict[str, Tensor]) -> Tensor:
    """All four are affine in the colour, so that each image needs one 3x3 matrix and one offset, and one pass."""
    luma, matrices = _colour_constants(images.device)
    one, offset = images.new_ones(len(images)), None
    gain = amounts.get("brightness", one)
    if "contrast" in amounts:  # towards the image's mean grey, after the change of brightness
        grey = gain * (images.mean(dim=(2, 3)) * luma).sum(1)
        offset = (1 - amounts["contrast"]) * grey  # grey, which neither of the next two changes
        gain = gain * amounts["contrast"]
    colour = gain * amounts["saturation"] if "saturation" in amounts else gain  # the rest is each pixel's grey
    angle = amounts["hue"] * (2 * math.pi) if "hue" in amounts else one - one
    shares = torch.stack([colour, colour * angle.cos(), colour * angle.sin(), gain - colour], dim=1)  # (B, 4)
    matrix = (shares.unsqueeze(2) * matrices).sum(1).view(-1, 3, 3)
    changed = torch.einsum("brc,bchw->brhw", matrix, images)
    return changed if offset is None else changed + offset.view(-1, 1, 1, 1)


@functools.cache
def _place_constants(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """-> (matrices (6, 6), x (width,), y (height,)) of images of this size; places count from -1 to 1 over each axis.

    The matrices make of cos, cos * dx, cos * dy, sin, sin * dx and sin * dy, in this order and with shifts as parts of
    width and height, the six numbers that say where each output pixel comes from: the inverse of (rotate, then shift).
    """
    tall = height / width
    matrices = torch.tensor([
        [1, 0, 0, 0, 1, 0],
        [0, 0, -2, 0, 0, 0],
        [0, 0, 0, 0, 0, -2],
        [0, tall, 0, -1 / tall, 0, 0],
        [0, 0, 0, 0, 0, 2 / tall],
        [0, 0, -2 * tall, 0, 0, 0],
    ])  # fmt: skip
    x, y = ((torch.arange(n) * 2 + 1) / n - 1 for n in (width, height))
    return matrices.to(device), x.to(device), y.to(device)


def _move(images: Tensor, amounts: dict[str, Tensor]) -> Tensor:
    """Sample each output pixel where the inverse of (rotate, scale, then shift) says."""
    B, _, height, width = images.shape
    matrices, x, y = _place_constants(height, width, images.device)
    one = images.new_ones(B)
    angle = torch.deg2rad(amounts["rotate_deg"]) if "rotate_deg" in amounts else one - one
    turn = torch.stack([angle.cos(), angle.sin()])
    if "scale" in amounts:
        turn = turn / amounts["scale"].clamp(min=1e-3)
    shift = [one, *(amounts.get(name, one - one) for name in ("translate_x", "translate_y"))]
    products = (turn.unsqueeze(1) * torch.stack(shift)).flatten(0, 1)  # (6, B)
    rows = (products.unsqueeze(2) * matrices.unsqueeze(1)).sum(0).view(B, 2, 3)
    # Not by F.affine_grid, whose matrix product is in TF32 on a GPU: a third of a pixel at a width of 640.
    across = rows[:, :, 0:1] * x  # (B, 2, width)
    down = rows[:, :, 1:2] * y + rows[:, :, 2:]  # (B, 2, height)
    places = (across.unsqueeze(2) + down.unsqueeze(3)).permute(0, 2, 3, 1)  # (B, height, width, 2)
    return F.grid_sample(images, places, mode="bilinear", padding_mode="zeros", align_corners=False)
