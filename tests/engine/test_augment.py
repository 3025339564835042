"""Augmentation: two of four, within range, from the given generator only."""

import numpy as np
import pytest
import torch
from PIL import Image

from pspg.engine.data import augment as module
from pspg.engine.data.augment import augment, random_flip


@pytest.fixture
def image():
    # a smooth blob off the centre, so that every operation shows
    y, x = np.mgrid[0:64, 0:64]
    blob = 200 * np.exp(-((x - 25) ** 2 + (y - 36) ** 2) / 200) + 30
    return Image.fromarray(blob.astype(np.uint8))


def rng(seed):
    return torch.Generator().manual_seed(seed)


def test_exactly_two_different_operations_in_every_order(image, monkeypatch):
    calls = []
    stubs = [lambda im, _, name=name: calls.append(name) or im for name in "abcd"]
    monkeypatch.setattr(module, "OPERATIONS", stubs)
    orders = set()
    for seed in range(300):
        calls.clear()
        augment(image, rng(seed), 0.5)
        orders.add("".join(calls))
    assert orders == {a + b for a in "abcd" for b in "abcd" if a != b}


def test_only_the_given_generator_matters(image):
    state = torch.get_rng_state()
    first = augment(image, rng(3), 0.5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    np.random.seed(99)
    assert augment(image, rng(3), 0.5).tobytes() == first.tobytes()
    assert augment(image, rng(4), 0.5).tobytes() != first.tobytes()


def test_flip_probability(image):
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    for flip, low, high in [(0, 0, 0), (0.5, 80, 120), (1, 200, 200)]:
        flips = sum(random_flip(image, rng(seed), flip).tobytes() == mirrored for seed in range(200))
        assert low <= flips <= high


@pytest.mark.parametrize("operation", module.OPERATIONS)
def test_operations_change_the_image_and_keep_its_form(image, operation):
    outputs = [operation(image, rng(seed)) for seed in range(20)]
    assert {(output.mode, output.size) for output in outputs} == {("L", image.size)}
    assert len({output.tobytes() for output in outputs}) > 15


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
    turned = [moments(module.rotation(blob, rng(seed))) for seed in range(60)]
    angles = [np.hypot(cx - x, cy - y) / radius for cx, cy, _ in turned]
    assert 0.12 < max(angles) < np.radians(10) + 0.05
    scales = [np.sqrt(moments(module.affine(blob, rng(seed)))[2] / spread) for seed in range(60)]
    assert 0.87 < min(scales) < 0.95
    assert 1.05 < max(scales) < 1.12
    crops = [np.sqrt(moments(module.resized_crop(blob, rng(seed)))[2] / spread) for seed in range(60)]
    assert min(crops) > 0.98
    assert 1.05 < max(crops) < 1.2
    flat = Image.new("L", (8, 8), 100)
    levels = [module.brightness_contrast(flat, rng(seed)).getpixel((0, 0)) for seed in range(60)]
    assert 80 <= min(levels) < 85
    assert 115 < max(levels) <= 120
