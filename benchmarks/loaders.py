"""Loaders: seconds a batch from JPEG, PNG and the pixel cache, behind a comparison with Pillow's pixels.

Phantom radiographs, drawn once and read over and over, so from the system's page cache: the disk is not measured. A
repetition is an epoch of augmented training batches, moved to the device and counted from the arrival of the first.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pspg.engine.data.augment import Augmentation
from pspg.engine.data.batch import Batch
from pspg.engine.data.cache.build import build_cache
from pspg.engine.data.cache.pixel_cache import PixelCache
from pspg.engine.data.dataset import ImageDataset
from pspg.engine.data.loaders.choose import load_with, pick_loader
from pspg.engine.data.loaders.training import make_train_loader
from pspg.engine.data.manifest import Sample
from pspg.engine.data.phantoms.dataset import PhantomConfig, write_phantoms
from pspg.engine.data.pixels import Pixels
from pspg.engine.utils.errors import UserError

from .harness import Call, Counts, Sizes, Unavailable, Verdict
from .jobs import Entry

JPEG_QUALITY = 90
GREY = 0.5
"""grey levels in the mean that pixels may be away from Pillow's"""


class Loading:
    """Epochs of one source through a loader."""

    def __init__(self, source: str, sizes: Sizes, dtype: str, device: torch.device) -> None:
        self._sizes, self._device = sizes, device
        self._folder = tempfile.TemporaryDirectory(prefix="benchmarks-")  # goes with this object
        self._dataset = _dataset(source, sizes, Path(self._folder.name))
        self._found: dict[str, tuple[float, float]] = {}

    def prepare(self, impl: str) -> Call:
        try:
            pick_loader("--impl", impl, self._device)  # type: ignore[arg-type]
        except UserError as error:
            raise Unavailable(str(error)) from None
        s, load = self._sizes, load_with(impl, self._device)  # type: ignore[arg-type]
        loader = make_train_loader(self._dataset, batch_size=s.B, workers=s.workers, load=load)
        off = grey_levels(self._dataset, next(iter(loader.batches(0)))) / GREY

        def call(turn: int) -> dict[str, float]:
            start, seconds = _epoch(loader.batches(turn), self._device)
            self._found[impl] = off, start
            return {"both": seconds}

        return call

    def verdicts(self, ran: Sequence[str]) -> dict[str, Verdict]:
        found = {impl: self._found[impl] for impl in ran}
        return {impl: Verdict(error, f"first batch after {start:.1f} s") for impl, (error, start) in found.items()}

    def counts(self) -> Counts:
        return {"both": (None, None)}


def grey_levels(dataset: ImageDataset, batch: Batch) -> float:
    """Mean difference between a batch of epoch 0 and what Pillow makes of it."""
    pillow = torch.stack([dataset.pixels(0, row) for row in batch.index.tolist()])
    return (batch.pixels.cpu().int() - pillow.int()).abs().double().mean().item()


def _dataset(source: str, s: Sizes, folder: Path) -> ImageDataset:
    """Images as often as an epoch needs them, each time with another id and so another augmentation."""
    write_phantoms(PhantomConfig(train=s.files, val=0, test=0, image_size=s.size), folder / "phantoms", workers=1)
    paths = sorted((folder / "phantoms" / "images").rglob("*.png"))
    if source == "jpeg":
        for number, path in enumerate(paths):
            paths[number] = folder / f"{path.stem}.jpg"
            Image.open(path).save(paths[number], quality=JPEG_QUALITY)
    samples, cache = [Sample(path.stem, path) for path in paths], None
    times = -(-s.B * s.batches // len(samples))
    if source == "cache":
        build = partial(build_cache, folder / "cache", samples, [path.name for path in paths])
        build(size=s.image_size, resize="stretch")
        cache = PixelCache.open(folder / "cache", samples, size=s.image_size, resize="stretch")
        cache = PixelCache(cache.folder, cache.header, np.tile(cache.rows, times), {})
    repeated = [Sample(f"{sample.id}/{number}", sample.path) for number in range(times) for sample in samples]
    pixels = Pixels(size=s.image_size, resize="stretch", mean=0.5, std=0.25)
    dataset = ImageDataset(repeated, pixels, augmentation=Augmentation(flip=0.5))
    dataset.cache = cache
    return dataset


def _epoch(batches: Iterator[Batch], device: torch.device) -> tuple[float, float]:
    """Seconds to the first batch, and a batch from there on."""
    start, count = time.perf_counter(), 0
    next(batches).to(device)
    first = time.perf_counter()
    for batch in batches:
        batch.to(device, non_blocking=True)
        count += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return first - start, (time.perf_counter() - first) / count


def entries() -> dict[str, Entry]:
    """Entries of the registry."""
    letters = {"B": 64, "workers": 2, "batches": 5, "files": 12, "size": 1024, "image_size": 224}
    return {
        f"load_{source}": Entry("loaders", letters, ("torch", "dali"), partial(Loading, source), dtypes=("uint8",))
        for source in ("jpeg", "png", "cache")
    }
