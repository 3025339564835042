"""Samples of a manifest as pixels, labels and tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ..utils.errors import UserError
from .augment import Augmentation, Plan, apply
from .bad_image import BadImage
from .batch import Batch
from .images import square_image, to_uint8
from .manifest import Sample
from .pixels import Pixels, Reading
from .sampler import Key

T = TypeVar("T")
Tokenize = Callable[[list[str]], Tensor]


class ImageDataset(Dataset[Batch]):
    """Samples as pixels, labels and tokens, fetched batch by batch with lists of (epoch, row) keys.

    Args:
        samples: N samples.
        pixels: what becomes of an image.
        reading: how files are read.
        labels: (N,C) in {1, 0, -1}, or None.
        tokenize: texts to int64 (B,77); picklable where workers are spawned. None: no tokens.
        augmentation: of training; None: the images as they are.

    Raises:
        UserError: labels of another length, a sample without text where `tokenize` is given, or an unusable cache.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        pixels: Pixels,
        reading: Reading | None = None,
        *,
        labels: NDArray[np.float32] | None = None,
        tokenize: Tokenize | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
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
        self.rule, self.reading, self.tokenize = pixels, reading or Reading(), tokenize
        # An augmentation that changes nothing is none: loaders then skip it.
        self.augmentation = augmentation or None
        self.cache = self.reading.open_cache(samples, pixels.size, pixels.resize)

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
        side = self.rule.size
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
                if self.reading.on_bad_image == "error":
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
            mean=self.rule.mean,
            std=self.rule.std,
            bad=bad,
        )

    def plan(self, epoch: int, row: int) -> Plan:
        """The augmentation of one sample in one epoch."""
        if self.augmentation is None:
            return Plan()
        return self.augmentation.plan(epoch, self.ids[row], self.rule.size)

    def pixels(self, epoch: int, row: int) -> Tensor:
        """uint8 (h,w) of one sample in one epoch.

        Raises:
            BadImage: it cannot be read.
        """
        if self.cache is not None:
            image = self.cache.image(row)
        else:
            image = square_image(self.paths[row], self.rule.size, self.rule.resize, **self.reading.limits)
        return to_uint8(apply(image, self.plan(epoch, row)))
