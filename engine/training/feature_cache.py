"""Image features of the frozen tower, computed once and kept in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.loaders.evaluation import EvalLoader
from ..data.sampler import EpochSampler
from ..distributed.collectives import all_gather_object, broadcast_host, is_main
from ..distributed.watch import advance
from ..models.clip import ImageFeatures
from ..models.features import FeatureBatch, ImageEncoder, frozen_features
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
    model: ImageEncoder, loader: EvalLoader, device: torch.device, autocast: torch.dtype | None, *, title: str
) -> CachedBatches:
    """Run the frozen image tower over a data set once, each rank a part, and keep all features in memory.

    That is N·(S+1)·D floats on every rank. Batches stay whole, so features have the same bits for any number of ranks.

    Args:
        model: has the tower.
        loader: this rank's batches of the data set.
        title: of the progress bar.

    Raises:
        UserError: no image could be read, on any rank.
    """
    own: dict[int, _Part] = {}
    hidden = None if is_main() else True
    for batch in tqdm(loader, title, unit="batch", leave=False, dynamic_ncols=True, disable=hidden):
        features = frozen_features(model, batch, device, autocast)
        kept = ImageFeatures(*(tensor.float().cpu().clone() for tensor in features))
        own[batch.place] = _Part(batch.ids, kept, batch.labels)
        advance()
    listing = [(place, len(part.ids)) for place, part in own.items()]
    found = all_gather_object((listing, {place: part.ids for place, part in own.items()}, dict(loader.bad), _form(own)))
    bad = {name: why for *_, of_rank, _ in found for name, why in of_rank.items()}
    form = next((form for *_, form in found if form is not None), None)
    if form is None:
        raise UserError(next(iter(bad.values()), "there are no images"))
    places = sorted((place, count, rank) for rank, (of_rank, *_) in enumerate(found) for place, count in of_rank)
    total = sum(count for _, count, _ in places)
    tensors = [torch.empty(total, *shape) for shape in form]
    start = 0
    for place, count, rank in places:
        part = own.pop(place, None)
        mine = () if part is None else part.tensors
        for number, tensor in enumerate(tensors):
            rows = tensor[start : start + count]
            if mine:
                rows.copy_(mine[number])
            broadcast_host(rows, rank)
        start += count
    ids = [name for place, _, rank in places for name in found[rank][1][place]]
    return CachedBatches(ids, ImageFeatures(*tensors[:2]), tensors[2] if len(tensors) > 2 else None, bad)


class _Part(NamedTuple):
    """A batch of the data set."""

    ids: list[str]
    features: ImageFeatures
    labels: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.features if self.labels is None else (*self.features, self.labels)


def _form(parts: dict[int, _Part]) -> list[tuple[int, ...]] | None:
    """Shapes of a row of each tensor; None: this rank has read nothing."""
    return next(([tuple(tensor.shape[1:]) for tensor in part.tensors] for part in parts.values()), None)
