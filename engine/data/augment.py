"""Random augmentation of one image (paper A.2), a function of the image and a generator only."""

from __future__ import annotations

import math

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

DEGREES = 10.0
TRANSLATE = 0.0625
SCALE = (0.9, 1.1)
CROP_AREA = (0.8, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
JITTER = (0.8, 1.2)


def augment(image: Image.Image, rng: torch.Generator, flip: float) -> Image.Image:
    """Exactly two of {resized crop, rotation, affine, brightness and contrast} in random order, then
    `random_flip`.

    Resized crop: area 0.8–1.0, ratio 3/4–4/3, bilinear. Rotation: ±10°, nearest. Affine: ±10°, translation
    up to 0.0625 of the side, scale 0.9–1.1, nearest. Brightness and contrast: factors 0.8–1.2, in random
    order. What comes in from outside the image is black. Ranges: paper A.2; interpolation as in the authors'
    implementation.

    Args:
        image: mode "L", already resized.
        rng: the only source of randomness.
        flip: probability of the horizontal flip.
    """
    for number in torch.randperm(len(OPERATIONS), generator=rng)[:2].tolist():
        image = OPERATIONS[number](image, rng)
    return random_flip(image, rng, flip)


def random_flip(image: Image.Image, rng: torch.Generator, flip: float) -> Image.Image:
    """Mirror left and right with probability `flip`."""
    return F.horizontal_flip(image) if _uniform(rng, 0, 1) < flip else image


def resized_crop(image: Image.Image, rng: torch.Generator) -> Image.Image:
    """A random part of the image, resized back to the image's size."""
    width, height = image.size
    crop_width, crop_height = width, height
    for _ in range(10):
        area = width * height * _uniform(rng, *CROP_AREA)
        ratio = math.exp(_uniform(rng, math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            crop_width, crop_height = w, h
            break
    top = _integer(rng, height - crop_height + 1)
    left = _integer(rng, width - crop_width + 1)
    return F.resized_crop(image, top, left, crop_height, crop_width, [height, width], InterpolationMode.BILINEAR)


def rotation(image: Image.Image, rng: torch.Generator) -> Image.Image:
    """Rotation about the centre."""
    return F.rotate(image, _uniform(rng, -DEGREES, DEGREES), InterpolationMode.NEAREST)


def affine(image: Image.Image, rng: torch.Generator) -> Image.Image:
    """Rotation, translation and scale together."""
    width, height = image.size
    angle = _uniform(rng, -DEGREES, DEGREES)
    shift = [round(side * _uniform(rng, -TRANSLATE, TRANSLATE)) for side in (width, height)]
    scale = _uniform(rng, *SCALE)
    return F.affine(image, angle, shift, scale, [0.0, 0.0], InterpolationMode.NEAREST)


def brightness_contrast(image: Image.Image, rng: torch.Generator) -> Image.Image:
    """Brightness and contrast, in random order."""
    brightness, contrast = _uniform(rng, *JITTER), _uniform(rng, *JITTER)
    if _uniform(rng, 0, 1) < 0.5:
        return F.adjust_contrast(F.adjust_brightness(image, brightness), contrast)
    return F.adjust_brightness(F.adjust_contrast(image, contrast), brightness)


OPERATIONS = (resized_crop, rotation, affine, brightness_contrast)


def _uniform(rng: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=rng, dtype=torch.float64).item()


def _integer(rng: torch.Generator, high: int) -> int:
    return int(torch.randint(high, (), generator=rng))
