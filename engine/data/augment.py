"""Random augmentation of one image (paper A.2): drawn as a plan, then applied.

A plan is a function of a generator only. `apply` carries it out with Pillow; other loaders carry out the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageEnhance

from .seeding import generator

DEGREES = 10.0
TRANSLATE = 0.0625
SCALE = (0.9, 1.1)
CROP_AREA = (0.8, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
JITTER = (0.8, 1.2)


@dataclass(frozen=True, slots=True)
class Crop:
    """Take a part of the image and resize it to the image's size, bilinear or bicubic."""

    left: int
    top: int
    right: int
    bottom: int
    bicubic: bool = False

    def apply(self, image: Image.Image) -> Image.Image:
        box = (self.left, self.top, self.right, self.bottom)
        kernel = Image.Resampling.BICUBIC if self.bicubic else Image.Resampling.BILINEAR
        return image.crop(box).resize(image.size, kernel)


@dataclass(frozen=True, slots=True)
class Warp:
    """Move the image, nearest neighbour or bicubic; what comes in from outside is black.

    `matrix` (a, b, c, d, e, f): the pixel at (x, y) comes from (ax + by + c, dx + ey + f), where the first pixel's
    centre is (0.5, 0.5).
    """

    matrix: tuple[float, float, float, float, float, float]
    bicubic: bool = False

    def apply(self, image: Image.Image) -> Image.Image:
        kernel = Image.Resampling.BICUBIC if self.bicubic else Image.Resampling.NEAREST
        return image.transform(image.size, Image.Transform.AFFINE, self.matrix, kernel)


@dataclass(frozen=True, slots=True)
class Jitter:
    """Scale the distance of pixels from black (brightness) and from the image's mean (contrast)."""

    brightness: float
    contrast: float
    brightness_first: bool

    def apply(self, image: Image.Image) -> Image.Image:
        if self.brightness_first:
            image = ImageEnhance.Brightness(image).enhance(self.brightness)
            return ImageEnhance.Contrast(image).enhance(self.contrast)
        image = ImageEnhance.Contrast(image).enhance(self.contrast)
        return ImageEnhance.Brightness(image).enhance(self.brightness)


Step = Crop | Warp | Jitter


@dataclass(frozen=True, slots=True)
class Plan:
    """Changes to one image: the steps in order, then a horizontal flip or none."""

    steps: tuple[Step, ...] = ()
    flip: bool = False


def draw(rng: torch.Generator, side: int, *, augment: bool, flip: float, bicubic: bool = False) -> Plan:
    """Draw the plan of a square image.

    With `augment`, exactly two of {resized crop, rotation, affine, brightness and contrast} in random order. Resized
    crop: area 0.8–1.0, ratio 3/4–4/3. Rotation: ±10°. Affine: ±10°, translation up to 0.0625 of the side, scale
    0.9–1.1. Brightness and contrast: factors 0.8–1.2, in random order. Ranges: paper A.2. Rotation is nearest
    neighbour, as in the authors' implementation; that of the resized crop and affine is bicubic there.

    Args:
        rng: the only source of randomness.
        side: of the image, pixels.
        augment: whether there are steps.
        flip: probability of the horizontal flip.
        bicubic: resized crop and affine, instead of bilinear and nearest neighbour; what is drawn stays the same.
    """
    chosen = torch.randperm(len(OPERATIONS), generator=rng)[:2].tolist() if augment else []
    steps = []
    for operation in (OPERATIONS[number] for number in chosen):
        step = operation(rng, side)
        if bicubic and operation in (resized_crop, affine) and not isinstance(step, Jitter):
            step = replace(step, bicubic=True)
        steps.append(step)
    return Plan(tuple(steps), _uniform(rng)[0] < flip)


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Changes that training makes to its images; those of one depend on the seed, the epoch and its id alone."""

    augment: bool = True
    """two of four random steps, see `draw`"""
    flip: float = 0.0
    """probability of a horizontal flip, also without `augment`"""
    bicubic: bool = False
    """see `draw`"""
    seed: int = 0

    def __bool__(self) -> bool:
        """Does it change anything?"""
        return self.augment or self.flip > 0

    def plan(self, epoch: int, identifier: str, side: int) -> Plan:
        """The plan of one sample in one epoch; `side` of its square image, pixels."""
        rng = generator(self.seed, epoch, identifier)
        return draw(rng, side, augment=self.augment, flip=self.flip, bicubic=self.bicubic)


def apply(image: Image.Image, plan: Plan) -> Image.Image:
    """Carry out a plan on a square mode "L" image of the side it was drawn for."""
    for step in plan.steps:
        image = step.apply(image)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if plan.flip else image


def resized_crop(rng: torch.Generator, side: int) -> Step:
    """A random part of the image."""
    width = height = side
    for _ in range(10):
        first, second = _uniform(rng, 2)
        area = side * side * _between(first, *CROP_AREA)
        ratio = math.exp(_between(second, math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= side and 0 < h <= side:
            width, height = w, h
            break
    top, left = _integer(rng, side - height + 1), _integer(rng, side - width + 1)
    return Crop(left, top, left + width, top + height)


def rotation(rng: torch.Generator, side: int) -> Step:
    """Rotation about the centre."""
    return _moved(_between(_uniform(rng)[0], -DEGREES, DEGREES), side)


def affine(rng: torch.Generator, side: int) -> Step:
    """Rotation, translation and scale together."""
    angle, x, y, scale = _uniform(rng, 4)
    shift = [round(side * _between(share, -TRANSLATE, TRANSLATE)) for share in (x, y)]
    # Clockwise, as in the authors' implementation; a rotation alone is counter-clockwise.
    return _moved(-_between(angle, -DEGREES, DEGREES), side, shift[0], shift[1], _between(scale, *SCALE))


def brightness_contrast(rng: torch.Generator, side: int) -> Step:
    """Brightness and contrast, in random order."""
    brightness, contrast, order = _uniform(rng, 3)
    return Jitter(_between(brightness, *JITTER), _between(contrast, *JITTER), order < 0.5)


OPERATIONS: tuple[Callable[[torch.Generator, int], Step], ...] = (resized_crop, rotation, affine, brightness_contrast)


def _moved(degrees: float, side: int, x: int = 0, y: int = 0, scale: float = 1.0) -> Warp:
    """The warp that turns the image counter-clockwise about its centre, scales it and shifts it by (x, y) pixels."""
    cos, sin = math.cos(math.radians(degrees)) / scale, math.sin(math.radians(degrees)) / scale
    centre = side / 2
    c = centre - cos * (centre + x) + sin * (centre + y)
    f = centre - sin * (centre + x) - cos * (centre + y)
    return Warp((cos, -sin, c, sin, cos, f))


def _uniform(rng: torch.Generator, count: int = 1) -> list[float]:
    """`count` draws from [0, 1)."""
    drawn: list[float] = torch.rand(count, generator=rng, dtype=torch.float64).tolist()
    return drawn


def _between(share: float, low: float, high: float) -> float:
    return low + (high - low) * share


def _integer(rng: torch.Generator, high: int) -> int:
    return int(torch.randint(high, (), generator=rng))
