"""Training tasks whose batch is that of all ranks: N ranks with B/N images compute the step of one process with B."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import open_clip
import torch
from torch import Tensor

from pspg.kernels.pairs import number_of_pairs
from pspg.kernels.text_tower import Prompts, PromptTemplate, TextTower

from ..distributed.batch_norm import convert_sync_batch_norm
from ..distributed.collectives import all_gather_host, all_gather_rows, local_slice, split
from ..distributed.watch import advance
from ..distributed.world import World
from ..models.pspg import PsPGOutput
from ..utils.device import pin
from .losses import GlobalBatch, contrastive_loss
from .tasks import ContrastiveTask, PromptTask, temperature


@dataclass(frozen=True)
class SharedBatch:
    """This rank's share of a batch, and what the host knows of the others'."""

    own: Any
    count: int
    """how many of its images, the first, count; 0: it is a dummy batch, for a share of which nothing can be read"""
    counts: list[int]
    """that of every rank; the batch is their shares, one after the other"""
    labels: Tensor | None
    """float32 (sum of counts, C), on the CPU"""


class SharedBatches:
    """The batches of a loader, each with what ranks tell one another about it before anything is computed.

    Args:
        loader: training batches of this rank, `share` images each, fewer where unreadable ones are skipped.
        share: images of a rank's batch at most.
        rank: number of this rank.
    """

    def __init__(self, loader: Any, share: int, rank: int) -> None:
        self._loader, self._share, self._rank = loader, share, rank
        self.batches_per_epoch = loader.batches_per_epoch
        self.bad = loader.bad

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[SharedBatch]:
        for batch in self._loader.batches(epoch, start_batch):
            counts, labels = self._exchange(batch)
            yield SharedBatch(batch, counts[self._rank], counts, labels)

    def _exchange(self, batch: Any) -> tuple[list[int], Tensor | None]:
        """Images of every rank, and the labels of all: one message of (1 + share·C) floats, by way of the hosts."""
        labels = torch.empty(len(batch.ids), 0) if batch.labels is None else batch.labels
        message = torch.zeros(1 + self._share * labels.shape[1])
        message[0] = 0 if getattr(batch, "dummy", False) else len(batch.ids)
        message[1 : 1 + labels.numel()] = labels.flatten()
        advance()  # where a rank's loader stands still, the others are ahead
        found = all_gather_host(message)
        counts = [int(part[0]) for part in found]
        if not any(counts):
            counts[-1] = 1  # the image that stands in for the whole batch of one process
        if batch.labels is None:
            return counts, None
        rows = [part[1:].view(self._share, -1)[:count] for part, count in zip(found, counts, strict=True)]
        return counts, pin(torch.cat(rows))


class GlobalContrastiveTask(ContrastiveTask):
    """Phase 1 over the batch of all ranks: every image against every text, batch norm over all images.

    A dummy batch counts nowhere but in the statistics of batch norm.
    """

    def __init__(self, clip: open_clip.CLIP, world: World, *arguments: Any, **settings: Any) -> None:
        super().__init__(convert_sync_batch_norm(clip, world.device), world, *arguments, **settings)

    def inputs(self, batch: Any) -> tuple[Tensor, Tensor]:
        # Batches of validation are whole, each on one rank.
        return super().inputs(batch.own if isinstance(batch, SharedBatch) else batch)

    def loss(self, output: tuple[Tensor, Tensor, Tensor], batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        images, texts, scale = output
        loss = contrastive_loss(images[: batch.count], texts[: batch.count], scale, batch.counts)
        return loss * self._world.size, temperature(scale)


class GlobalPromptTask(PromptTask):
    """Phase 2 over the batch of all ranks: context, co-occurrence and pooling; each rank takes its part of the pairs.

    All ranks draw the same random numbers, so they hold the same prompts and the same sample of pairs.
    """

    def inputs(self, batch: SharedBatch) -> tuple[Any, ...]:
        features, class_set, tower = super().inputs(batch.own)
        context = all_gather_rows(features.global_[: batch.count], batch.counts)
        return features, class_set, tower, context, self._encode

    def _encode(self, prompts: Tensor, template: PromptTemplate, tower: TextTower) -> tuple[Tensor, Prompts]:
        """Encode the single prompts of this rank's part of the classes, and gather the others' features.

        That costs a text tower less a class that others encode, and two collectives of (2,C,D). The decoders run on
        every rank, as classes attend to one another at each step. Each rank encodes the prefixes of its own pairs.
        """
        classes, ranks = prompts.shape[1], self._world.size
        if classes < ranks:
            return self.module.encode(prompts, template, tower)
        counts = [stop - start for start, stop in split(classes, ranks)]
        start, stop = local_slice(classes)
        sides, _ = self.module.encode(prompts[:, start:stop], template.rows(start, stop), tower, keep_cache=False)
        return all_gather_rows(sides.transpose(0, 1), counts).transpose(0, 1), Prompts(prompts[0], template)

    def loss(self, output: PsPGOutput, batch: SharedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.labels is not None
        sample = self._sample(batch.labels)
        pairs = number_of_pairs(len(self._model.class_set)) if sample is None else len(sample.first)
        vectors = output.image_vectors
        if vectors is not None:
            vectors = vectors[: batch.count]
            if self._loss.needs_pairs:
                vectors = all_gather_rows(vectors, batch.counts)
        output = replace(output, logits=output.logits[: batch.count], image_vectors=vectors)
        share = GlobalBatch(batch.labels.to(self._world.device, non_blocking=True), local_slice(pairs))
        loss, parts = self._prompt_loss(output, batch.own.labels[: batch.count], sample, share)
        return loss * self._world.size, {name: part * self._world.size for name, part in parts.items()}
