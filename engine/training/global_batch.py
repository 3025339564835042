"""Training tasks whose batch is that of all ranks: N ranks with B/N images compute the step of one process with B."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import open_clip
import torch
from torch import Tensor

from pspg.kernels.pairs import PairSample, PairSelection, balanced_parts, number_of_pairs, pad_sample
from pspg.kernels.text_tower import Prompts, PromptTemplate, TextTower

from ..distributed.batch_norm import convert_sync_batch_norm
from ..distributed.collectives import all_gather_host, all_gather_rows, local_slice, split
from ..distributed.watch import advance
from ..distributed.world import World
from ..models.clip import ImageFeatures
from ..models.decoders import DECODERS
from ..models.pspg import PsPGOutput
from ..utils.device import pin
from .cuda_graph import Outcome
from .early_mean import Cut, mean_gradients
from .losses import GlobalBatch, contrastive_loss
from .tasks import (
    ContrastiveTask,
    PromptTask,
    image_tensors,
    round_up,
    sample_of,
    temperature,
    token_count,
    with_tensors,
)


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
    share: int = 0
    """images that a rank has at most"""
    most_tokens: int = 0
    """of texts, on the rank that has most"""
    context: Tensor | None = None
    """(ranks·share, D) global features of all images, where they are known already"""
    present: Tensor | None = None
    """(ranks·share,) bool, on the device: what counts, where shares are padded for a recorded step"""

    @property
    def full(self) -> bool:
        """Every rank has its whole share."""
        return min(self.counts) == self.share

    @property
    def places(self) -> Tensor:
        """(sum of counts,) places of the images that count among `share` of every rank."""
        room = torch.arange(len(self.counts) * self.share).split(self.share)
        return torch.cat([own[:count] for own, count in zip(room, self.counts, strict=True)])


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
            yield self._exchange(batch)

    def _exchange(self, batch: Any) -> SharedBatch:
        """The batch with images and labels, or numbers of tokens, of every rank.

        That is one message of 1 + share·C floats, or 2, by way of the hosts.
        """
        known = batch.labels
        if known is None:
            known = torch.tensor([[float(token_count(batch.tokens))]])
        room = 1 if batch.labels is None else self._share * known.shape[1]
        message = torch.zeros(1 + room)
        message[0] = 0 if getattr(batch, "dummy", False) else len(batch.ids)
        message[1 : 1 + known.numel()] = known.flatten()
        advance()  # where a rank's loader stands still, the others are ahead
        found = all_gather_host(message)
        counts = [int(part[0]) for part in found]
        if not any(counts):
            counts[-1] = 1  # the image that stands in for the whole batch of one process
        own = counts[self._rank]
        if batch.labels is None:
            return SharedBatch(batch, own, counts, None, self._share, max(int(part[1]) for part in found))
        rows = [part[1:].view(self._share, -1)[:count] for part, count in zip(found, counts, strict=True)]
        return SharedBatch(batch, own, counts, pin(torch.cat(rows)), self._share)


class GlobalContrastiveTask(ContrastiveTask):
    """Phase 1 over the batch of all ranks: every image against every text, batch norm over all images.

    A dummy batch counts nowhere but in the statistics of batch norm.
    """

    def __init__(self, clip: open_clip.CLIP, world: World, *arguments: Any, **settings: Any) -> None:
        super().__init__(convert_sync_batch_norm(clip, world.device), world, *arguments, **settings)

    def inputs(self, batch: Any) -> tuple[Tensor, ...]:
        return super().inputs(batch.own)

    def tensors(self, batch: Any) -> dict[str, Tensor] | None:
        """As of one process, with the same room for texts on all ranks."""
        return self._packed(batch.own, batch.most_tokens) if batch.full else None

    def _images(self, batch: Any, pixels: Tensor) -> Tensor:
        return super()._images(batch.own, pixels)

    def loss(self, output: tuple[Tensor, Tensor, Tensor], batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        images, texts, scale = output
        loss = contrastive_loss(images[: batch.count], texts[: batch.count], scale, batch.counts)
        return loss * self._world.size, temperature(scale)


class GlobalPromptTask(PromptTask):
    """Phase 2 over the batch of all ranks: context, co-occurrence and pooling; each rank takes its part of the pairs.

    All ranks draw the same random numbers, so they hold the same prompts and the same sample of pairs.

    Shapes of a recorded step stay where images are missing: a share is filled up with copies of one of its images,
    which `present` leaves out of the context and of the pair loss, and labels of -1 out of the others.

    Args:
        may_miss: images may be missing from a batch; else one of which some are is not recorded.
    """

    def __init__(self, *arguments: Any, may_miss: bool = False, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._pads = may_miss and DECODERS[self._model.config.decoder].takes_present
        self._rows = 0  # that the recorded pairs of a rank may lie in, the same on all
        self._all_pairs = self._parts(None)

    def features(self, batch: SharedBatch) -> ImageFeatures:
        return super().features(batch.own)

    def pixels(self, batch: SharedBatch) -> Tensor | None:
        pixels = super().pixels(batch.own) if self._pads or batch.full else None
        return None if pixels is None else _filled_up(pixels, batch.share)

    def with_pixels(self, batch: SharedBatch, pixels: Tensor) -> SharedBatch:
        return replace(batch, own=super().with_pixels(batch.own, pixels))

    def gathered(self, batch: SharedBatch, features: ImageFeatures) -> dict[str, Tensor]:
        """The context: (ranks·share, D) global features of all ranks' images, and of copies where some are missing."""
        own = _filled_up(features.global_, batch.share)
        return {"context": all_gather_rows(own, [batch.share] * self._world.size)}

    def with_features(self, batch: SharedBatch, known: dict[str, Tensor]) -> SharedBatch:
        return replace(batch, own=super().with_features(batch.own, known), context=known["context"])

    def inputs(self, batch: SharedBatch) -> tuple[Any, ...]:
        features, class_set, tower = super().inputs(batch)
        context = self.gathered(batch, features)["context"] if batch.context is None else batch.context
        if batch.present is None and not batch.full:
            context = context[pin(batch.places).to(context.device, non_blocking=True)]
        return features, class_set, tower, context, self._encode, batch.present

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
        parts = self._all_pairs if sample is None else self._parts(sample)
        return self._shared_loss(output, batch, batch.labels, sample, pairs=parts[self._world.rank])

    def _shared_loss(
        self, output: PsPGOutput, batch: SharedBatch, labels: Tensor, sample: PairSample | None, **own: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's part of the loss times the number of ranks; `own` says which pairs are its, as `GlobalBatch`."""
        output, mine, share = self._share(output, batch, labels, **own)
        loss, parts = self._prompt_loss(output, mine, sample, share)
        return loss * self._world.size, {name: part * self._world.size for name, part in parts.items()}

    def _share(
        self, output: PsPGOutput, batch: SharedBatch, labels: Tensor, **own: Any
    ) -> tuple[PsPGOutput, Tensor, GlobalBatch]:
        """Output of the images that count, with the vectors of all, and the labels of both."""
        vectors = output.image_vectors
        if vectors is not None:
            vectors = vectors[: batch.count]
            if self._loss.needs_pairs:
                vectors = all_gather_rows(vectors, batch.counts)
        labels = labels.to(self._world.device, non_blocking=True)
        first = sum(batch.counts[: self._world.rank])
        output = replace(output, logits=output.logits[: batch.count], image_vectors=vectors)
        return output, labels[first : first + batch.count], GlobalBatch(labels, present=batch.present, **own)

    def _parts(self, sample: PairSample | None) -> list[tuple[int, int]]:
        """Start and stop of every rank's pairs, so that all take about as long."""
        template = self._model.class_set.template
        n = self._model.config.prompt_length
        # Both are padded to the longest name, so the number of sequences tells the cost: a prefix, or a pair's suffix.
        row_cost = (template.single_tokens(n) - 1) / (n + 1 + template.longest_name)
        return balanced_parts(PairSelection(len(self._model.class_set), sample), self._world.size, row_cost)

    def tensors(self, batch: SharedBatch) -> dict[str, Tensor] | None:
        """As of one process, for a share of the batch; the labels are those of all ranks, -1 where one is missing."""
        if batch.labels is None or not (self._pads or batch.full):
            return None
        tensors = {name: _filled_up(tensor, batch.share) for name, tensor in image_tensors(batch.own).items()}
        if batch.context is not None:
            tensors["context"] = batch.context
        if self._pads:
            room = len(batch.counts) * batch.share
            labels = batch.labels.new_full((room, batch.labels.shape[1]), -1.0)
            labels[batch.places] = batch.labels
            present = torch.zeros(room, dtype=torch.bool)
            present[batch.places] = True
            tensors |= {"labels": pin(labels), "present": pin(present)}
        else:
            tensors["labels"] = batch.labels
        return {**tensors, **self._own_pairs(batch.labels)}

    def _own_pairs(self, labels: Tensor) -> dict[str, Tensor]:
        """This rank's part of the sampled pairs, and `row`, the first of the rows that they lie in, once for each row.

        Both have the same room on all ranks: when it grows, all record anew.
        """
        sample = self._sample(labels)
        if sample is None:
            return {}
        classes = labels.shape[1]
        whole, parts = PairSelection(classes, sample), self._parts(sample)
        spans = [whole.part(*part).rows for part in parts]
        count, rows = max(stop - start for start, stop in parts), max(high - low for low, high in spans)
        if count > self._room:
            self._room = min(round_up(count * 5 // 4, 64), number_of_pairs(classes))
        if rows > self._rows:
            self._rows = min(round_up(rows * 5 // 4, 8), max(classes - 1, 1))
        start, stop = parts[self._world.rank]
        low = max(min(spans[self._world.rank][0], classes - 1 - self._rows), 0)
        own = PairSample(*(tensor[start:stop] for tensor in sample))
        padded = pad_sample(own, self._room, classes, (low, low + self._rows))
        return {**padded._asdict(), "row": pin(torch.full((self._rows,), low))}

    def _recorded(self, batch: SharedBatch, tensors: dict[str, Tensor]) -> tuple[SharedBatch, dict[str, Any]]:
        """The batch with the tensors of a step, and which pairs are this rank's."""
        batch = replace(
            batch,
            own=with_tensors(batch.own, tensors),
            count=batch.share,
            counts=[batch.share] * self._world.size,
            context=tensors.get("context", batch.context),
            present=tensors.get("present"),
        )
        if "row" not in tensors:
            return batch, {"pairs": self._all_pairs[self._world.rank]}
        rows = torch.arange(len(tensors["row"]), device=self._world.device)
        return batch, {"pairs": None, "window": tensors["row"] + rows}

    def step(self, batch: SharedBatch, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        batch, own = self._recorded(batch, tensors)
        with self._precision():
            output = self.module.forward(*self.inputs(batch))
        return self._shared_loss(output, batch, tensors["labels"], sample_of(tensors), **own)

    def outcome(self, batch: SharedBatch, tensors: dict[str, Tensor], *, reduce: bool) -> Outcome:
        if not reduce:
            return super().outcome(batch, tensors, reduce=False)
        batch, own = self._recorded(batch, tensors)
        cut, ranks = Cut(self._encode), self._world.size
        with self._precision():
            features, class_set, tower, context, _, present = self.inputs(batch)
            output = self.module.forward(features, class_set, tower, context, cut, present)
            output, mine, share = self._share(output, batch, tensors["labels"], **own)
            loss, parts = self._loss.classification(output, mine, share, impl=self.module.impl)
        pair: Tensor | None = None

        def pairs() -> Tensor | None:
            nonlocal pair
            with self._precision():
                sample = sample_of(tensors)
                options: dict[str, Any] = {"memory": self.module.text_memory, "impl": self.module.impl}
                pair, part = self._loss.pairs(output, mine, self._model.tower, sample, share, **options)
            parts.update(part)
            return None if pair is None else pair * ranks

        if self._loss.needs_pairs:
            gradients = mean_gradients(self.module, cut, loss * ranks, pairs)
        else:  # such a pair loss reaches all prompts
            second = pairs()
            gradients = mean_gradients(self.module, cut, loss * ranks if second is None else loss * ranks + second)
        total = (loss if pair is None else loss + pair).detach() * ranks
        return total, {name: part * ranks for name, part in parts.items()}, gradients


def _filled_up(rows: Tensor, count: int) -> Tensor:
    """Rows, and copies of the first up to `count`."""
    if len(rows) == count:
        return rows
    filled = torch.cat([rows, rows[:1].expand(count - len(rows), *rows.shape[1:])])
    return pin(filled) if filled.device.type == "cpu" else filled
