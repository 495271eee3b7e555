"""Augmentation: what torchvision does to one image, for every image of a batch with amounts of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torchvision.transforms import InterpolationMode

from tests.tiny import Operations, assert_same_run, metrics, run, trainer
from training import augment
from training.augment import AugmentationConfig

STRENGTHS = [field.name for field in dataclasses.fields(AugmentationConfig) if field.name != "enabled"]
NONE = AugmentationConfig(True, **dict.fromkeys(STRENGTHS, 0))
SOME = AugmentationConfig(True, 0.2, 0.2, saturation=0.5, hue=0.05, rotate_deg=5, translate=0.05, scale=0.1)


@pytest.fixture
def images() -> torch.Tensor:
    """(4, 3, 40, 56) of mild colours, so that nothing is clamped on the way."""
    smooth = torch.rand(4, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    return 0.3 + 0.3 * torch.nn.functional.interpolate(smooth, (40, 56), mode="bilinear")


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("brightness", tv.adjust_brightness),
        ("contrast", tv.adjust_contrast),
        ("saturation", tv.adjust_saturation),
    ],
)
def test_a_colour_change_is_torchvisions(name, reference, images):
    factors = torch.tensor([0.8, 0.95, 1.0, 1.3])
    ours = augment.apply(images, {name: factors})
    theirs = torch.stack([reference(image, float(f)) for image, f in zip(images, factors, strict=True)])
    assert torch.allclose(ours, theirs, atol=2e-4)
    assert not torch.allclose(ours, images, atol=1e-2)


def test_colour_changes_compose_in_torchvisions_order(images):
    amounts = {"brightness": torch.full((4,), 1.2), "contrast": torch.full((4,), 0.7), "saturation": torch.zeros(4)}
    theirs = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(images, 1.2), 0.7), 0.0)
    assert torch.allclose(augment.apply(images, amounts), theirs, atol=2e-4)


def test_hue_turns_the_chroma_and_keeps_the_luma(images):
    luma = torch.tensor(augment.RGB_TO_YIQ[0]).view(1, 3, 1, 1)
    quarter = augment.apply(images, {"hue": torch.full((4,), 0.25)})
    assert torch.allclose((quarter * luma).sum(1), (images * luma).sum(1), atol=1e-4)
    assert (quarter - images).abs().max() > 0.05
    back = augment.apply(quarter, {"hue": torch.full((4,), 0.75)})
    assert torch.allclose(back, images, atol=1e-4)
    grey = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert torch.allclose(augment.apply(grey, {"hue": torch.full((4,), 0.3)}), grey, atol=2e-3)


def test_hue_turns_the_way_that_torchvisions_does():
    red = torch.tensor([0.6, 0.3, 0.3]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    for image in (augment.apply(red, {"hue": torch.tensor([0.08])}), tv.adjust_hue(red, 0.08)):
        _, green, blue = image[0, :, 0, 0]
        assert green > blue + 0.1  # towards yellow, not pink


def test_augmentation_never_waits_for_the_device(images):
    """No operation reads from the device, inverts a matrix there or is given constants anew; and they stay few."""
    amounts = augment.draw(SOME, 4, torch.Generator().manual_seed(0))
    augment.apply(images, amounts)
    with Operations() as done:
        augment.apply(images, amounts)
    assert not done.waiting and len(done.launched) <= 67, len(done.launched)


@pytest.mark.parametrize(
    ("amounts", "affine"),
    [
        ({"rotate_deg": 20.0}, {"angle": 20.0}),
        ({"translate_x": 0.125, "translate_y": -0.05}, {"translate": [7.0, -2.0]}),
        ({"scale": 1.3}, {"scale": 1.3}),
        (
            {"rotate_deg": -9.0, "translate_x": 0.125, "translate_y": 0.05, "scale": 0.8},
            {"angle": -9.0, "translate": [7.0, 2.0], "scale": 0.8},
        ),
    ],
)
def test_moving_the_image_is_torchvisions_affine(amounts, affine, images):
    ours = augment.apply(images, {name: torch.full((4,), value) for name, value in amounts.items()})
    plain = {"angle": 0.0, "translate": [0.0, 0.0], "scale": 1.0, "shear": [0.0, 0.0]}
    theirs = tv.affine(images, **plain | affine, interpolation=InterpolationMode.BILINEAR)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_every_image_has_amounts_of_its_own_and_stays_in_range():
    images = torch.rand(6, 3, 24, 32, generator=torch.Generator().manual_seed(1))[:1].expand(6, -1, -1, -1)
    changed = augment.apply(images, augment.draw(SOME, 6, torch.Generator().manual_seed(2)))
    assert changed.min() >= 0 and changed.max() <= 1
    assert all((changed[i] - changed[j]).abs().mean() > 0.01 for i in range(6) for j in range(i))


def test_draws_are_uniform_within_their_strengths_and_repeat_with_the_seed():
    def amounts(seed: int) -> dict[str, torch.Tensor]:
        return augment.draw(SOME, 5000, torch.Generator().manual_seed(seed))

    first = amounts(3)
    assert all(torch.equal(first[name], values) for name, values in amounts(3).items())
    assert not torch.equal(first["hue"], amounts(4)["hue"])
    for name, (low, high) in {
        "brightness": (0.8, 1.2), "contrast": (0.8, 1.2), "saturation": (0.5, 1.5), "hue": (-0.05, 0.05),
        "rotate_deg": (-5, 5), "translate_x": (-0.05, 0.05), "translate_y": (-0.05, 0.05), "scale": (0.9, 1.1),
    }.items():  # fmt: skip
        values = first[name]
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)


def test_a_strength_of_zero_leaves_the_image_alone(images):
    assert augment.draw(NONE, 4, torch.Generator()) == {}
    assert torch.equal(augment.apply(images, {}), images)
    for name in STRENGTHS:
        only = dataclasses.replace(NONE, **{name: getattr(SOME, name)})
        assert {drawn.split("_")[0] for drawn in augment.draw(only, 4, torch.Generator())} == {name.split("_")[0]}


AUGMENTED = {"augmentation__enabled": "true"}


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
    zero = {f"augmentation__{name}": 0 for name in STRENGTHS}
    assert_same_run(run(sample_bags, tmp_path / "zero", **AUGMENTED, **zero), plain)
    assert len(calls) == 6


def test_changed_augmentation_on_resume_counts_and_is_said(sample_bags: Path, tmp_path: Path, capsys):
    run(sample_bags, tmp_path, training__steps=2)
    run(sample_bags, tmp_path, "--resume", training__steps=3, **AUGMENTED)
    assert "with other settings: augmentation (" in capsys.readouterr().out
