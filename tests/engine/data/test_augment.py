"""Augmentation: two of four, within range, from the given generator only, as torchvision does it."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pspg.engine.data import augment as module
from pspg.engine.data.augment import Crop, Jitter, Plan, Warp, apply, draw


@pytest.fixture
def image():
    # a smooth blob off the centre, so that every operation shows
    y, x = np.mgrid[0:64, 0:64]
    blob = 200 * np.exp(-((x - 25) ** 2 + (y - 36) ** 2) / 200) + 30
    return Image.fromarray(blob.astype(np.uint8))


def rng(seed):
    return torch.Generator().manual_seed(seed)


def augment(image, seed, flip=0.5, bicubic=False):
    return apply(image, draw(rng(seed), image.size[0], augment=True, flip=flip, bicubic=bicubic))


def test_exactly_two_different_operations_in_every_order_alike(monkeypatch):
    stubs = [lambda rng, side, name=name: name for name in "abcd"]
    monkeypatch.setattr(module, "OPERATIONS", stubs)
    plans = Counter("".join(draw(rng(seed), 64, augment=True, flip=0.5).steps) for seed in range(2400))
    assert set(plans) == {a + b for a in "abcd" for b in "abcd" if a != b}
    # 200 expected of each of the 12
    assert all(150 < count < 250 for count in plans.values())


def test_only_the_given_generator_matters(image):
    state = torch.get_rng_state()
    first = augment(image, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    np.random.seed(99)
    assert augment(image, 3).tobytes() == first.tobytes()
    assert augment(image, 4).tobytes() != first.tobytes()


def test_flip_probability(image):
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    assert apply(image, Plan(flip=True)).tobytes() == mirrored
    for flip, low, high in [(0, 0, 0), (0.5, 80, 120), (1, 200, 200)]:
        plans = [draw(rng(seed), 64, augment=False, flip=flip) for seed in range(200)]
        assert not any(plan.steps for plan in plans)
        assert low <= sum(plan.flip for plan in plans) <= high


@pytest.mark.parametrize("operation", module.OPERATIONS)
def test_operations_change_the_image_and_keep_its_form(image, operation):
    outputs = [operation(rng(seed), 64).apply(image) for seed in range(20)]
    assert {(output.mode, output.size) for output in outputs} == {("L", image.size)}
    assert len({output.tobytes() for output in outputs}) > 15


def uniform(rng, low, high):
    return low + (high - low) * torch.rand((), generator=rng, dtype=torch.float64).item()


def torchvision_crop(image, rng, bicubic):
    side = image.size[0]
    for _ in range(10):
        area, ratio = side * side * uniform(rng, 0.8, 1), np.exp(uniform(rng, np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if w <= side and h <= side:
            break
    else:
        w = h = side
    top, left = (int(torch.randint(side - length + 1, (), generator=rng)) for length in (h, w))
    return F.resized_crop(image, top, left, h, w, [side, side], mode(bicubic, "bilinear"))


def torchvision_rotation(image, rng, bicubic):
    return F.rotate(image, uniform(rng, -10, 10), InterpolationMode.NEAREST)


def torchvision_affine(image, rng, bicubic):
    side, angle = image.size[0], uniform(rng, -10, 10)
    shift = [round(side * uniform(rng, -0.0625, 0.0625)) for _ in range(2)]
    return F.affine(image, angle, shift, uniform(rng, 0.9, 1.1), [0.0, 0.0], mode(bicubic, "nearest"))


def torchvision_jitter(image, rng, bicubic):
    brightness, contrast = uniform(rng, 0.8, 1.2), uniform(rng, 0.8, 1.2)
    if uniform(rng, 0, 1) < 0.5:
        return F.adjust_contrast(F.adjust_brightness(image, brightness), contrast)
    return F.adjust_brightness(F.adjust_contrast(image, contrast), brightness)


def mode(bicubic, otherwise):
    return InterpolationMode.BICUBIC if bicubic else InterpolationMode(otherwise)


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("side", [64, 97])
def test_the_same_bytes_as_torchvision(side, bicubic):
    names = (torchvision_crop, torchvision_rotation, torchvision_affine, torchvision_jitter)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8))
    for seed in range(200):
        generator, expected = rng(seed), image
        for number in torch.randperm(4, generator=generator)[:2].tolist():
            expected = names[number](expected, generator, bicubic)
        if uniform(generator, 0, 1) < 0.5:
            expected = F.horizontal_flip(expected)
        assert augment(image, seed, bicubic=bicubic).tobytes() == expected.tobytes(), seed


def test_ranges_of_plans():
    steps = [step for seed in range(3000) for step in draw(rng(seed), 224, augment=True, flip=0.5).steps]
    crops = [step for step in steps if isinstance(step, Crop)]
    areas = [(s.right - s.left) * (s.bottom - s.top) / 224**2 for s in crops]
    assert all(0 <= s.left < s.right <= 224 and 0 <= s.top < s.bottom <= 224 for s in crops)
    assert 0.79 < min(areas) < 0.82
    assert 0.97 < max(areas) <= 1
    scales = [np.hypot(s.matrix[0], s.matrix[1]) for s in steps if isinstance(s, Warp)]
    angles = [np.degrees(np.arctan2(s.matrix[1], s.matrix[0])) for s in steps if isinstance(s, Warp)]
    assert 1 / 1.1 <= min(scales) < 0.93
    assert 1.07 < max(scales) <= 1 / 0.9
    assert -10 <= min(angles) < -9.8
    assert 9.8 < max(angles) <= 10
    jitters = [s for s in steps if isinstance(s, Jitter)]
    for values in ([s.brightness for s in jitters], [s.contrast for s in jitters]):
        assert 0.8 <= min(values) < 0.81
        assert 1.19 < max(values) < 1.2
    assert 0.45 < np.mean([s.brightness_first for s in jitters]) < 0.55


def moments(image):
    """Mean position and angle-free spread of the blob."""
    weight = np.asarray(image).astype(float) - 30
    weight[weight < 0] = 0
    y, x = np.mgrid[0:64, 0:64]
    cx, cy = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
    spread = (weight * ((x - cx) ** 2 + (y - cy) ** 2)).sum() / weight.sum()
    return cx, cy, spread


def test_ranges(image):
    blob = Image.fromarray(np.maximum(np.asarray(image), 30))
    x, y, spread = moments(blob)
    radius = np.hypot(x - 31.5, y - 31.5)
    turned = [moments(module.rotation(rng(seed), 64).apply(blob)) for seed in range(60)]
    angles = [np.hypot(cx - x, cy - y) / radius for cx, cy, _ in turned]
    assert 0.12 < max(angles) < np.radians(10) + 0.05
    scales = [np.sqrt(moments(module.affine(rng(seed), 64).apply(blob))[2] / spread) for seed in range(60)]
    assert 0.87 < min(scales) < 0.95
    assert 1.05 < max(scales) < 1.12
    crops = [np.sqrt(moments(module.resized_crop(rng(seed), 64).apply(blob))[2] / spread) for seed in range(60)]
    assert min(crops) > 0.98
    assert 1.05 < max(crops) < 1.2
    flat = Image.new("L", (8, 8), 100)
    levels = [module.brightness_contrast(rng(seed), 8).apply(flat).getpixel((0, 0)) for seed in range(60)]
    assert 80 <= min(levels) < 85
    assert 115 < max(levels) <= 120
