"""Scores of a model over batches, on one process or several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..data.batch import Batch
from ..data.loaders.evaluation import EvalLoader
from ..distributed.collectives import gather_object, in_order, rank
from ..distributed.watch import advance
from ..models.blend import blended
from ..models.class_set import ClassSet
from ..models.features import FeatureBatch, frozen_features
from ..models.pspg import PromptHead, PsPG, probabilities
from ..utils.errors import UserError


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

    def of(self, ids: Sequence[str]) -> Scores:
        """A copy for some of the images."""
        place = {name: row for row, name in enumerate(self.ids)}
        rows = [place[name] for name in ids]
        labels = None if self.labels is None else self.labels[rows]
        return Scores(list(ids), self.probabilities[rows], labels, self.features[rows])


@torch.inference_mode()
def score_batches(
    model: PsPG,
    head: PromptHead,
    class_sets: Sequence[ClassSet],
    batches: Iterable[Batch | FeatureBatch],
    device: torch.device,
    autocast: torch.dtype | None,
    *,
    context: Tensor | None,
    blends: Sequence[Tensor | None] | None = None,
) -> list[tuple[int, Scores]]:
    """Place and scores of each batch, none or more: probabilities for every class list, each prompted by itself.

    Args:
        model: frozen towers.
        head: the prompt head to use (the model's own, or a running average of it).
        class_sets: class lists; none: only labels and features.
        batches: images.
        device: where the model is.
        autocast: low precision; None: that of the weights.
        context: (M,D) context bank; None: each batch is its own context.
        blends: for each class list what `make_blend` made; None: nothing is blended.
    """
    added = [None] * len(class_sets) if blends is None else blends
    parts: list[tuple[int, Scores]] = []
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        # Under a bank the text side is the same for every image.
        texts = [None if context is None else head.text_features(context, each, model.tower) for each in class_sets]
        for batch in batches:
            features = frozen_features(model, batch, device, autocast)
            outputs = [
                head(features, class_set, model.tower, text=text)
                for class_set, text in zip(class_sets, texts, strict=True)
            ]
            pooled = torch.cat([features.global_, features.tokens[:, 1:].mean(1)], dim=1)
            scored = [
                probabilities(blended(output.logits, features.tokens, blend).double())
                for output, blend in zip(outputs, added, strict=True)
            ]
            scores = Scores(
                batch.ids,
                torch.cat(scored, 1).cpu().numpy() if scored else np.empty((len(batch.ids), 0)),
                None if batch.labels is None else batch.labels.double().cpu().numpy(),
                pooled.float().cpu().numpy(),
            )
            parts.append((batch.place, scores))
    return parts


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
            places.append(batch.place)
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
