"""Decisions of a run's seed: the order of its images, cached or not, and the pixels of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pspg.engine.data.augment import Augmentation
from pspg.engine.data.dataset import ImageDataset
from pspg.engine.data.loaders.training import make_train_loader
from pspg.engine.data.manifest import Sample
from pspg.engine.data.pixels import Pixels
from pspg.engine.data.sampler import EpochSampler
from pspg.engine.models.clip import ImageFeatures
from pspg.engine.training.feature_cache import CachedBatches

N = 9


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    noise = np.random.default_rng(0)
    for number in range(N):
        Image.fromarray(noise.integers(0, 256, (16, 16), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    return [Sample(id=str(number), path=tmp_path / f"{number}.png") for number in range(N)]


def dataset(samples: list[Sample], seed: int) -> ImageDataset:
    pixels = Pixels(size=16, resize="stretch", mean=0.5, std=0.25)
    return ImageDataset(samples, pixels, augmentation=Augmentation(flip=0.5, seed=seed))


def rows(batches: Any) -> list[int]:
    return torch.cat([batch.index for batch in batches]).tolist()


def test_orders_of_two_seeds_differ() -> None:
    first, same, other = (EpochSampler(N, batch_size=3, seed=seed).order(0) for seed in (1, 1, 2))
    assert first == same != other
    assert sorted(first) == sorted(other) == list(range(N))


def test_loaders_of_images_and_of_cached_features_take_the_order_of_their_seed(samples: list[Sample]) -> None:
    cached = CachedBatches(
        [sample.id for sample in samples], ImageFeatures(torch.ones(N, 2), torch.ones(N, 1, 2)), None, {}
    )
    for seed in (1, 2):
        order = EpochSampler(N, batch_size=3, seed=seed).order(4)
        assert rows(make_train_loader(dataset(samples, 0), batch_size=3, seed=seed).batches(4)) == order
        assert rows(cached.train_loader(batch_size=3, seed=seed).batches(4)) == order


def test_pixels_of_two_seeds_differ(samples: list[Sample]) -> None:
    def pixels(seed: int) -> torch.Tensor:
        loader = make_train_loader(dataset(samples, seed), batch_size=3, seed=0)
        return torch.cat([batch.pixels for batch in loader.batches(0)])

    assert torch.equal(pixels(1), pixels(1))
    assert not torch.equal(pixels(1), pixels(2))
