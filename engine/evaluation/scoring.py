"""Scores of a model over batches, and image features of the frozen tower kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..checkpoints.classifier import Classifier
from ..data.loaders.torch_loader import Batch, EpochSampler, EvalLoader
from ..distributed.collectives import gather_object, rank
from ..distributed.watch import advance
from ..models.clip import ImageFeatures
from ..models.prompts import Vocabulary
from ..models.pspg import PromptHead, PsPG, probabilities
from ..utils.errors import UserError

T = TypeVar("T")


@dataclass
class Scores:
    """N scored images; C counts the classes of all lists, one list after the other."""

    ids: list[str]
    probabilities: NDArray[np.float64]
    """(N,C)"""
    labels: NDArray[np.float64] | None
    """(N,C) in {1, 0, -1}; None: unlabelled"""
    features: NDArray[np.float32]
    """(N,2D): global image feature and mean of the local tokens, both raw"""

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """One after the other; at least one."""
        labels = [part.labels for part in parts if part.labels is not None]
        return cls(
            [name for part in parts for name in part.ids],
            np.concatenate([part.probabilities for part in parts]),
            np.concatenate(labels) if labels else None,
            np.concatenate([part.features for part in parts]),
        )


@dataclass(frozen=True)
class FeatureBatch:
    """B images whose frozen features are already known."""

    ids: list[str]
    features: ImageFeatures
    labels: Tensor | None
    """float32 (B,C) in {1, 0, -1}, -1 masked"""
    index: Tensor
    """int64 (B,): rows of the data set"""


@torch.no_grad()
def frozen_features(
    model: PsPG | Classifier, batch: Batch | FeatureBatch, device: torch.device, autocast: torch.dtype | None
) -> ImageFeatures:
    """Image features of a batch: the cached ones it brings, or those of the frozen tower."""
    if isinstance(batch, FeatureBatch):
        return ImageFeatures(*(tensor.to(device, non_blocking=True) for tensor in batch.features))
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        return model.image_features(batch.to(device, non_blocking=True).images)


def score(
    model: PsPG,
    head: PromptHead,
    vocabularies: Sequence[Vocabulary],
    batches: Iterable[Batch | FeatureBatch],
    device: torch.device,
    autocast: torch.dtype | None,
    *,
    context: Tensor | None,
    bad: Mapping[str, str] | None = None,
) -> Scores:
    """Probabilities of every image for every class list, each list prompted by itself.

    Args:
        model: frozen towers.
        head: the prompt head to use (the model's own, or a running average of it).
        vocabularies: class lists; none: only labels and features.
        context: (M,D) context bank; None: each batch is its own context.
        bad: reasons of images left out so far, to tell if none is left.

    Raises:
        UserError: no image could be read.
    """
    parts = score_batches(model, head, vocabularies, batches, device, autocast, context=context)
    if not parts:
        raise UserError(next(iter((bad or {}).values()), "there are no images"))
    return Scores.join([scores for _, scores in parts])


@torch.inference_mode()
def score_batches(
    model: PsPG,
    head: PromptHead,
    vocabularies: Sequence[Vocabulary],
    batches: Iterable[Batch | FeatureBatch],
    device: torch.device,
    autocast: torch.dtype | None,
    *,
    context: Tensor | None,
) -> list[tuple[int, Scores]]:
    """Place and scores of each batch, none or more; arguments as `score`."""
    parts: list[tuple[int, Scores]] = []
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        # Under a bank the text side is the same for every image.
        texts = [None if context is None else head.text_features(context, v, model.tower) for v in vocabularies]
        for batch in batches:
            features = frozen_features(model, batch, device, autocast)
            outputs = [
                head(features, vocabulary, model.tower, text=text)
                for vocabulary, text in zip(vocabularies, texts, strict=True)
            ]
            pooled = torch.cat([features.global_, features.tokens[:, 1:].mean(1)], dim=1)
            scored = [probabilities(output.logits.double()) for output in outputs]
            scores = Scores(
                batch.ids,
                torch.cat(scored, 1).cpu().numpy() if scored else np.empty((len(batch.ids), 0)),
                None if batch.labels is None else batch.labels.double().cpu().numpy(),
                pooled.float().cpu().numpy(),
            )
            parts.append((place(batch), scores))
    return parts


def place(batch: Batch | FeatureBatch) -> int:
    """Where a batch stands among those of all ranks: its first row."""
    return int(batch.index[0])


def in_order(of_ranks: Iterable[Iterable[tuple[int, T]]]) -> list[T]:
    """What the ranks made of their batches, in the order of the data set: the same for any number of ranks."""
    return [part for _, part in sorted((pair for own in of_ranks for pair in own), key=lambda pair: pair[0])]


def score_together(
    score_each: Callable[[Iterable[Batch]], Iterable[Scores]], loader: EvalLoader, *, title: str
) -> tuple[Scores, dict[str, str]] | None:
    """Scores and the images left out, over the batches that all ranks have; None on other ranks than the first.

    Args:
        score_each: this rank's batches to the scores of each.
        loader: this rank's batches.
        title: of the progress bar.

    Raises:
        UserError: an image that this rank cannot read, if it may not be left out; or none could be read.
    """
    silent = None if rank() == 0 else True
    places: list[int] = []

    def batches() -> Iterator[Batch]:
        for batch in tqdm(loader, title, unit="batch", leave=False, dynamic_ncols=True, disable=silent):
            places.append(place(batch))
            yield batch

    try:
        scored = list(score_each(batches()))
    except UserError as error:
        error.local = True
        raise
    advance()  # a rank that has not come so far keeps the others waiting
    of_ranks = gather_object((list(zip(places, scored, strict=True)), loader.bad))
    if of_ranks is None:
        return None
    parts = in_order(parts for parts, _ in of_ranks)
    bad = {name: reason for _, bad_of_rank in of_ranks for name, reason in bad_of_rank.items()}
    if not parts:
        raise UserError(next(iter(bad.values()), "there are no images"))
    return Scores.join(parts), bad


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
            features=ImageFeatures(*(tensor[rows] for tensor in self.features)),
            labels=None if self.labels is None else self.labels[rows],
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
