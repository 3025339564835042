"""Augmentation by DALI: Pillow's pixels within a rounding."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali")

from pspg.engine.data.augment import OPERATIONS, Augmentation, Plan, apply
from pspg.engine.data.cache.build import build_cache
from pspg.engine.data.dataset import ImageDataset
from pspg.engine.data.loaders.evaluation import make_eval_loader
from pspg.engine.data.loaders.torch_loader import TorchBatches
from pspg.engine.data.manifest import Sample
from pspg.engine.data.phantoms.dataset import PhantomConfig, write_phantoms
from pspg.engine.data.pixels import Pixels, Reading
from tests.engine.data.loaders.films import DALI, SIDE, assert_close, difference, film, train


def test_phantom_films_agree(tmp_path):
    write_phantoms(PhantomConfig(train=12, val=0, test=0, image_size=256, classes=20), tmp_path / "phantoms", workers=1)
    files = sorted((tmp_path / "phantoms" / "images").rglob("*.png"))
    made = [Sample(id=path.stem, path=path, text="report 1") for path in files]
    assert len(made) == 12
    assert_close(train(made).batches(0), train(made, TorchBatches).batches(0))


class Planned(ImageDataset):
    """With given plans instead of drawn ones."""

    plans: list[Plan]

    def plan(self, epoch, row):
        return self.plans[row]


def both_ways(tmp_path, plans):
    """Pixels of one film under each plan, by DALI and by Pillow; the film from a cache, so that only plans count."""
    path = tmp_path / "film.png"
    film(0).resize((SIDE, SIDE)).save(path)
    made = [Sample(f"s{number}", path) for number in range(len(plans))]
    build_cache(tmp_path / "cache", made, [path.name] * len(made), size=SIDE, resize="stretch")
    pixels = Pixels(size=SIDE, resize="stretch", mean=0.4, std=0.2)
    data = Planned(made, pixels, Reading(cache=tmp_path / "cache"), augmentation=Augmentation(flip=0.5))
    data.plans = plans
    (batch,) = make_eval_loader(data, batch_size=len(plans), load=DALI)
    pillow = [np.asarray(apply(Image.open(path), plan)) for plan in plans]
    return difference(batch.pixels, torch.from_numpy(np.stack(pillow)))


def drawn(operation, seed):
    return operation(torch.Generator().manual_seed(seed), SIDE)


@pytest.mark.parametrize(
    ("operation", "largest", "share"),
    # Grey levels, and the share of pixels that may be further off: nearest neighbours chosen differently by rounding.
    zip(OPERATIONS, (1, 0, 0, 1), (0, 1e-3, 1e-3, 0), strict=True),
    ids=lambda value: getattr(value, "__name__", None),
)
def test_each_operation_is_pillows(tmp_path, operation, largest, share):
    off = both_ways(tmp_path, [Plan((drawn(operation, seed),), seed % 2 == 1) for seed in range(24)])
    assert (off > largest).double().mean() <= share
    assert off.mean() < 0.2


def test_every_pair_of_operations_in_its_order(tmp_path):
    pairs = [(a, b) for a in OPERATIONS for b in OPERATIONS if a is not b]
    steps = [(drawn(a, 1), drawn(b, 2)) for a, b in pairs]
    assert both_ways(tmp_path, [Plan(pair) for pair in steps]).mean((1, 2)).max() < 0.3
    wrong = [apply(film(0), Plan(pair)).tobytes() == apply(film(0), Plan(pair[::-1])).tobytes() for pair in steps]
    assert not any(wrong)


def test_no_operation_leaves_pixels_as_they_are(tmp_path):
    assert both_ways(tmp_path, [Plan(), Plan()]).max() == 0
