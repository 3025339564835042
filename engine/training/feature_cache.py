"""Image features of the frozen tower, computed once and kept in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.loaders.evaluation import EvalLoader
from ..data.sampler import EpochSampler
from ..models.clip import ImageFeatures
from ..models.features import FeatureBatch, frozen_features
from ..models.pspg import PsPG
from ..utils.device import pin
from ..utils.errors import UserError


class CachedBatches:
    """A data set whose image features are held in memory.

    Args:
        ids: N image ids.
        features: global (N,D) and tokens (N,S,D), on the CPU.
        labels: (N,C) or None.
        bad: id → reason of the images left out.
    """

    def __init__(self, ids: list[str], features: ImageFeatures, labels: Tensor | None, bad: dict[str, str]) -> None:
        self.ids, self.features, self.labels, self.bad = ids, features, labels, bad

    def batch(self, index: Sequence[int]) -> FeatureBatch:
        """The batch of these rows."""
        rows = torch.as_tensor(index)
        return FeatureBatch(
            ids=[self.ids[i] for i in index],
            features=ImageFeatures(*(pin(tensor[rows]) for tensor in self.features)),
            labels=None if self.labels is None else pin(self.labels[rows]),
            index=rows,
        )

    def eval_batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> list[FeatureBatch]:
        """Rows in order; the last batch may be smaller. Each rank takes every `world_size`-th batch."""
        return [
            self.batch(range(start, min(start + batch_size, len(self.ids))))
            for start in range(rank * batch_size, len(self.ids), world_size * batch_size)
        ]

    def train_loader(self, **sampling: Any) -> CachedTrainLoader:
        """Batches in the order that the image loader would give them; arguments as `EpochSampler`."""
        return CachedTrainLoader(self, EpochSampler(len(self.ids), **sampling))


class CachedTrainLoader:
    """Training batches of cached features."""

    def __init__(self, cached: CachedBatches, sampler: EpochSampler) -> None:
        self._cached, self._sampler = cached, sampler
        self.batches_per_epoch = sampler.batches_per_epoch
        self.bad = cached.bad

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[FeatureBatch]:
        self._sampler.epoch, self._sampler.start_batch = epoch, start_batch
        for rows in self._sampler:
            yield self._cached.batch([index for _, index in rows])


def cache_features(
    model: PsPG, loader: EvalLoader, device: torch.device, autocast: torch.dtype | None, *, title: str
) -> CachedBatches:
    """Run the frozen image tower over a data set once and keep the features in memory, N·(S+1)·D floats.

    Raises:
        UserError: no image could be read.
    """
    ids: list[str] = []
    parts: list[ImageFeatures] = []
    labels: list[Tensor] = []
    for batch in tqdm(loader, title, unit="batch", leave=False, dynamic_ncols=True, disable=None):
        features = frozen_features(model, batch, device, autocast)
        parts.append(ImageFeatures(*(tensor.float().cpu().clone() for tensor in features)))
        ids += batch.ids
        if batch.labels is not None:
            labels.append(batch.labels)
    if not parts:
        raise UserError(next(iter(loader.bad.values()), "there are no images"))
    joined = ImageFeatures(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    return CachedBatches(ids, joined, torch.cat(labels) if labels else None, loader.bad)
