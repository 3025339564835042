"""Batches from a manifest with torch's DataLoader and Pillow.

Nothing here has a state that a checkpoint must hold: the order of an epoch is a function of (seed, epoch),
the augmentation of a sample a function of (seed, epoch, sample id), and an epoch can start at any batch. The
number of worker processes changes the speed and nothing else, and the global random generators are never
drawn from.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from ...utils.errors import UserError
from ...utils.workers import die_with_parent, loader_deaths
from ..augment import Plan, apply, draw
from ..cache.pixel_cache import PixelCache
from ..images import MAX_MEGAPIXELS, BadImage, Resize, normalize, square_image, to_uint8
from ..manifest import Sample

T = TypeVar("T")
Key = tuple[int, int]
"""(epoch, row of the manifest)"""
Keys = Sampler[list[Key]] | Sequence[list[Key]]
"""The batches of an epoch; iterated anew each time."""
Tokenize = Callable[[list[str]], Tensor]


@dataclass
class Batch:
    """B samples. Pixels stay 8-bit grey until `images` is asked for: 12 times less to move between processes
    and devices, so move the batch first (`batch.to(device).images`)."""

    ids: list[str]
    index: Tensor
    """int64 (B,): rows of the manifest"""
    pixels: Tensor
    """uint8 (B,h,w)"""
    labels: Tensor | None
    """float32 (B,C) in {1, 0, -1}, -1 masked"""
    tokens: Tensor | None
    """int64 (B,77)"""
    mean: float
    std: float
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(id, reason) of the samples left out since the last batch"""
    stand_in: bool = False
    """its one image is not of this batch: none of those could be read"""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def images(self) -> Tensor:
        """float32 (B,3,h,w), normalised with mean and std."""
        return normalize(self.pixels, self.mean, self.std)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (DataLoader calls this)."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            index=function(self.index),
            pixels=function(self.pixels),
            labels=None if self.labels is None else function(self.labels),
            tokens=None if self.tokens is None else function(self.tokens),
        )


class ImageDataset(Dataset[Batch]):
    """Samples as pixels, labels and tokens, fetched batch by batch with lists of (epoch, row) keys."""

    def __init__(
        self,
        samples: Sequence[Sample],
        labels: NDArray[np.float32] | None = None,
        *,
        image_size: int,
        mean: float,
        std: float,
        resize: Resize = "stretch",
        tokenize: Tokenize | None = None,
        augment: bool = False,
        flip: float = 0.0,
        seed: int = 0,
        on_bad_image: Literal["error", "skip"] = "error",
        cache: PixelCache | None = None,
        max_megapixels: float = MAX_MEGAPIXELS,
    ) -> None:
        """
        Args:
            samples: N samples.
            labels: (N,C) in {1, 0, -1}, or None.
            image_size: side of the square, pixels.
            mean, std: pixel mean and standard deviation in [0, 1].
            resize: see `images.resize`.
            tokenize: texts to int64 (B,77); picklable where workers are spawned. None: no tokens.
            augment: two of four augmentations, see `augment.draw`.
            flip: probability of a horizontal flip, also without `augment`; 0 for evaluation.
            seed: of the augmentation.
            on_bad_image: stop at an unreadable image, or leave it out and list it.
            cache: the pixels of these samples, opened with this size and resize; None: decode the files.
            max_megapixels: see `images.read_image`.

        Raises:
            UserError: labels of another length, or a sample without text where `tokenize` is given.
        """
        if labels is not None and len(labels) != len(samples):
            raise UserError(f"{len(labels)} rows of labels for {len(samples)} samples")
        # Plain lists: they are copied to the workers.
        self.ids = [sample.id for sample in samples]
        self.paths = [str(sample.path) for sample in samples]
        self.labels = None if labels is None else torch.from_numpy(np.asarray(labels, dtype=np.float32))
        self.texts: list[str] = []
        if tokenize is not None:
            for sample in samples:
                if not sample.text:
                    raise UserError(f"sample {sample.id!r} has no text")
                self.texts.append(sample.text)
        self.image_size, self.mean, self.std, self.resize = image_size, mean, std, resize
        self.tokenize, self.augment, self.flip, self.seed = tokenize, augment, flip, seed
        self.on_bad_image, self.cache, self.max_megapixels = on_bad_image, cache, max_megapixels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: Key) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """The batch of `keys`, less the unreadable images.

        Raises:
            UserError: an unreadable image, if `on_bad_image` is error.
        """
        rows, pixels, bad = self.readable(keys, self.pixels)
        side = self.image_size
        return self.batch(rows, torch.stack(pixels) if pixels else torch.empty(0, side, side, dtype=torch.uint8), bad)

    def readable(
        self, keys: Sequence[Key], load: Callable[[int, int], T]
    ) -> tuple[list[int], list[T], list[tuple[str, str]]]:
        """Rows of the readable images, what `load(epoch, row)` makes of them, and (id, reason) of the others.

        Raises:
            UserError: an unreadable image, if `on_bad_image` is error.
        """
        rows: list[int] = []
        loaded: list[T] = []
        bad: list[tuple[str, str]] = []
        for epoch, row in keys:
            try:
                loaded.append(load(epoch, row))
                rows.append(row)
            except BadImage as error:
                if self.on_bad_image == "error":
                    raise UserError(f"{error} (sample {self.ids[row]!r}); or set data.on_bad_image to skip") from None
                bad.append((self.ids[row], str(error)))
        return rows, loaded, bad

    def batch(self, rows: list[int], pixels: Tensor, bad: list[tuple[str, str]]) -> Batch:
        """The batch of `rows`, whose pixels are given."""
        return Batch(
            ids=[self.ids[row] for row in rows],
            index=torch.tensor(rows, dtype=torch.int64),
            pixels=pixels,
            labels=None if self.labels is None else self.labels[rows],
            tokens=self.tokenize([self.texts[row] for row in rows]) if self.tokenize and rows else None,
            mean=self.mean,
            std=self.std,
            bad=bad,
        )

    def plan(self, epoch: int, row: int) -> Plan:
        """The augmentation of one sample in one epoch."""
        rng = generator(self.seed, epoch, self.ids[row])
        return draw(rng, self.image_size, augment=self.augment, flip=self.flip)

    def pixels(self, epoch: int, row: int) -> Tensor:
        """uint8 (h,w) of one sample in one epoch."""
        if self.cache is not None:
            image = self.cache.image(row)
        else:
            image = square_image(self.paths[row], self.image_size, self.resize, max_megapixels=self.max_megapixels)
        if self.augment or self.flip:
            image = apply(image, self.plan(epoch, row))
        return to_uint8(image)


class EpochSampler(Sampler[list[Key]]):
    """One rank's batches of (epoch, row) keys; set `epoch` and `start_batch`, then iterate.

    An epoch is the permutation of (seed, epoch), cut into global batches of `batch_size`; rank r takes rows
    r·b to (r+1)·b of each, b = batch_size / world_size. So the union of the ranks' k-th batches is the k-th
    batch of one process. Only whole optimizer steps are kept: a multiple of `accumulate` batches.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        seed: int = 0,
    ) -> None:
        """
        Raises:
            UserError: `batch_size` is not divisible by `world_size`, or the samples do not fill one
                optimizer step.
        """
        if batch_size % world_size:
            raise UserError(f"batch_size: {batch_size} images cannot be split over {world_size} processes")
        if length < batch_size * accumulate:
            raise UserError(
                f"data.train: {length} images are fewer than one optimizer step of batch_size {batch_size}"
                f" × optim.accumulate {accumulate}"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.share = rank, batch_size // world_size
        self.batches_per_epoch = length // (batch_size * accumulate) * accumulate
        self.epoch = self.start_batch = 0

    def __len__(self) -> int:
        return self.batches_per_epoch - self.start_batch

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = self.epoch, self.order(self.epoch)
        for batch in range(self.start_batch, self.batches_per_epoch):
            first = batch * self.batch_size + self.rank * self.share
            yield [(epoch, row) for row in order[first : first + self.share]]

    def order(self, epoch: int) -> list[int]:
        """The permutation of an epoch."""
        permutation: list[int] = torch.randperm(self.length, generator=generator(self.seed, epoch, "order")).tolist()
        return permutation


class TrainLoader:
    """Shuffled batches of one rank; make it with `make_train_loader`.

    Attributes:
        batches_per_epoch: the same on every rank, and exactly as many are yielded in a whole epoch.
        bad: id → reason of the samples left out so far on this rank.
    """

    def __init__(self, dataset: ImageDataset, sampler: EpochSampler, loaded: Iterable[Batch]) -> None:
        """`loaded`: the batches of `sampler`, those without a readable image included, anew at each iteration."""
        self.dataset, self.sampler, self.loaded = dataset, sampler, loaded
        self.batches_per_epoch = sampler.batches_per_epoch
        self.bad: dict[str, str] = {}

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from number `start_batch` on; one iteration at a time.

        Where all images of a batch are unreadable (and skipped), the next readable ones of the epoch's order
        stand in (one image), so that the count of batches, and with it accumulation, resuming and the
        lock-step of the ranks, does not depend on the state of the files.

        Raises:
            UserError: an unreadable image under on_bad_image = error, no readable image at all, or a dead
                worker.
        """
        if not 0 <= start_batch <= self.batches_per_epoch:
            raise ValueError(f"start_batch {start_batch} of {self.batches_per_epoch}")
        self.sampler.epoch, self.sampler.start_batch = epoch, start_batch
        for number, batch in enumerate(self.loaded, start_batch):
            self.bad.update(batch.bad)
            if len(batch):
                yield batch
            else:
                yield self._stand_in(epoch, number, batch.bad)

    def _stand_in(self, epoch: int, number: int, bad: list[tuple[str, str]]) -> Batch:
        order = self.sampler.order(epoch)
        first = number * self.sampler.batch_size + (self.sampler.rank + 1) * self.sampler.share
        for offset in range(len(order)):
            batch = self.dataset[epoch, order[(first + offset) % len(order)]]
            self.bad.update(batch.bad)
            if len(batch):
                batch.bad, batch.stand_in = bad, True
                return batch
        raise UserError(f"none of the {len(order)} training images can be read; the first: {bad[0][1]}")


class EvalLoader:
    """Batches of one rank in the order of the manifest, the last one partial; make it with `make_eval_loader`.

    Attributes:
        bad: id → reason of the samples left out so far; a batch without any readable image is not yielded.
    """

    def __init__(self, batches: int, loaded: Iterable[Batch]) -> None:
        """`loaded`: so many batches, those without a readable image included, anew at each iteration."""
        self.batches, self.loaded = batches, loaded
        self.bad: dict[str, str] = {}

    def __len__(self) -> int:
        """Batches at most."""
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        waiting: list[tuple[str, str]] = []
        for batch in self.loaded:
            self.bad.update(batch.bad)
            waiting += batch.bad
            if len(batch):
                batch.bad, waiting = waiting, []
                yield batch


class TorchBatches:
    """Batches loaded by Pillow in DataLoader's processes.

    Args:
        dataset: the samples.
        keys: the batches of an epoch.
        workers: processes, kept for all epochs; 0: load in this process.
    """

    def __init__(self, dataset: ImageDataset, keys: Keys, workers: int) -> None:
        self.loader = data_loader(dataset, keys, workers)

    def __iter__(self) -> Iterator[Batch]:
        return results(self.loader)


Load = Callable[[ImageDataset, Keys, int], Iterable[Batch]]
"""How batches are loaded: `TorchBatches`, or another with the same arguments."""


def make_train_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    workers: int = 0,
    seed: int = 0,
    load: Load = TorchBatches,
) -> TrainLoader:
    """Shuffled training batches, see `EpochSampler` and `TrainLoader`.

    Args:
        dataset: N samples.
        batch_size: images a batch over all ranks.
        rank, world_size: this process and how many there are.
        accumulate: batches an optimizer step.
        workers: loader processes of this rank, kept for all epochs; 0: load in this process.
        seed: of the order.
        load: how.

    Raises:
        UserError: see `EpochSampler`.
    """
    sampler = EpochSampler(
        len(dataset),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        accumulate=accumulate,
        seed=seed,
    )
    return TrainLoader(dataset, sampler, load(dataset, sampler, workers))


def make_eval_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    load: Load = TorchBatches,
) -> EvalLoader:
    """Batches in the order of the manifest, see `EvalLoader`.

    Args:
        dataset: N samples.
        batch_size: images a batch.
        rank, world_size: this process and how many there are; each takes every `world_size`-th batch, whole.
        workers: loader processes of this rank; 0: load in this process.
        load: how.
    """
    rows = range(len(dataset))
    batches = [[(0, row) for row in rows[i : i + batch_size]] for i in rows[::batch_size]]
    keys = batches[rank::world_size]
    return EvalLoader(len(keys), load(dataset, keys, workers))


def pixel_statistics(
    samples: Sequence[Sample],
    image_size: int,
    resize_mode: Resize = "stretch",
    limit: int = 1024,
    seed: int = 0,
    cache: PixelCache | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> tuple[float, float]:
    """Mean and standard deviation in [0, 1] over the resized pixels of at most `limit` random samples.

    Unreadable images are left out here: the loader that meets them reports them.

    Raises:
        UserError: no readable image among them, or images of one grey level only.
    """
    chosen = torch.randperm(len(samples), generator=generator(seed, "pixel statistics"))[:limit].tolist()
    histogram = np.zeros(256, dtype=np.int64)
    reason = "there are no samples"
    for row in tqdm(chosen, "measuring pixel mean and std", delay=2, disable=None, leave=False):
        try:
            if cache is not None:
                image = cache.image(row)
            else:
                image = square_image(samples[row].path, image_size, resize_mode, max_megapixels=max_megapixels)
        except BadImage as error:
            reason = str(error)
            continue
        histogram += np.array(image.histogram())
    count = histogram.sum()
    if not count:
        raise UserError(f"no image to measure pixel mean and std on: {reason}")
    levels = np.arange(256) / 255
    mean = float(levels @ histogram / count)
    std = float(np.sqrt((levels - mean) ** 2 @ histogram / count))
    if std == 0:
        raise UserError("all training images have one grey level; check data.train and data.image_root")
    return mean, std


def generator(*parts: int | str) -> torch.Generator:
    """A generator seeded by `parts` alone, the same in every process (Python's own hash is salted)."""
    digest = hashlib.blake2b("\n".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass
class _Failed:
    """A user's mistake met in a worker, carried as data: DataLoader would paste the traceback into the
    message."""

    message: str


class _Guarded(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: Sequence[Key]) -> Any:
        try:
            return self.dataset.__getitems__(keys)
        except UserError as error:
            return _Failed(str(error))


def data_loader(dataset: Any, keys: Keys, workers: int, *, pin: bool = True, fork: bool = True) -> DataLoader[Any]:
    """A DataLoader of what `dataset.__getitems__` makes of whole batches of keys; read it with `results`.

    The keys are iterated in this process, anew each epoch. Workers are forked (cheap, no copy of the dataset), but
    where there is a GPU, or `fork` is false, they come from a fork server: a fork of a process that holds CUDA, NCCL or
    other threads is not safe. DataLoader gives each worker one torch thread.
    """
    cuda = torch.cuda.is_available()
    start = "fork" if fork and not cuda else "forkserver"
    context = multiprocessing.get_context(start) if workers else None
    if context and start == "forkserver":
        context.set_forkserver_preload([__name__])  # import torch once, not once a worker
    return DataLoader(
        _Guarded(dataset),
        batch_sampler=keys,
        collate_fn=_same,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context=context,
        worker_init_fn=_start_worker if workers else None,
        pin_memory=cuda and pin,
        # DataLoader draws a seed at every start; from the global generator that would break exact resuming.
        generator=torch.Generator().manual_seed(0),
    )


def results(loader: DataLoader[Any]) -> Iterator[Any]:
    """What the workers of a `data_loader` make.

    Raises:
        UserError: that of a worker, or a worker was killed.
    """
    with loader_deaths():
        for result in loader:
            if isinstance(result, _Failed):
                raise UserError(result.message)
            yield result


def _start_worker(_: int) -> None:
    # DataLoader's own watch looks at the fork server, which lives as long as its children do.
    die_with_parent()


def _same(result: Any) -> Any:
    return result
