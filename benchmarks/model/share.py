"""What one of several ranks does of a phase-2 step, on tensors without storage: its part of the loss.

The same pieces as in training, with tensors that nobody fills for what the other ranks send. The rank is the last,
whose pairs lie in the most rows. Of many pairs `TRACED` are run, and `scale.py` adds what the others cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pspg.engine.config import LossConfig
from pspg.engine.distributed.collectives import split
from pspg.engine.models.clip import ImageFeatures
from pspg.engine.training.losses import GlobalBatch, PromptLoss
from pspg.kernels.pairs import PaddedSample, PairSelection, number_of_pairs
from pspg.kernels.spcl import chunked_loss
from pspg.kernels.text_tower import Prompts, PromptTemplate, TextTower

from ..setup import Setup, autocast

TRACED = 1600
"""pairs that are run at most; over three chunks of them"""


@dataclass(frozen=True)
class Share:
    """The part that a rank has of a step.

    Args:
        samples: pairs of a class, positive ones and others each, as `loss.pair_samples`; 0: all pairs.
    """

    classes: int
    batch: int
    ranks: int = 1
    samples: int = 0

    @property
    def images(self) -> int:
        return math.ceil(self.batch / self.ranks)

    @property
    def pairs(self) -> int:
        every = number_of_pairs(self.classes)
        return math.ceil((min(2 * self.samples * self.classes, every) if self.samples else every) / self.ranks)

    @property
    def traced(self) -> int:
        """Of its pairs, those that are run."""
        return min(self.pairs, TRACED)

    @property
    def rows(self) -> tuple[int, int]:
        """First row of its pairs, and the one behind the last; of a sample any row, as a recorded step has it."""
        every = number_of_pairs(self.classes)
        part = PairSelection(self.classes).part(every - self.pairs, every)
        return (0, self.classes) if self.samples else part.rows

    def loss(self, setup: Setup) -> Tensor:
        """The rank's part of the loss of a batch, `setup.images` its own images and `setup.labels` all labels."""
        head, tower, own = setup.head, setup.tower, setup.images.shape[0]

        def encode(prompts: Tensor, template: PromptTemplate, tower: TextTower) -> tuple[Tensor, Prompts]:
            if self.ranks == 1 or self.classes < self.ranks:
                return head.encode(prompts, template, tower)
            start, stop = split(self.classes, self.ranks)[-1]
            sides, _ = head.encode(prompts[:, start:stop], template.rows(start, stop), tower, keep_cache=False)
            return _gathered(sides.transpose(0, 1), self.classes).transpose(0, 1), Prompts(prompts[0], template)

        with autocast(torch.device("cpu"), torch.bfloat16):
            features: ImageFeatures = setup.features()
            context = _gathered(features.global_, self.batch)
            output = head(features, setup.class_set, tower, context, encode)
            assert output.image_vectors is not None
            vectors = _gathered(output.image_vectors, self.batch)
            run, selection = self.traced, self.rows
            sample = PaddedSample(*_sample(run)) if self.samples else None
            first = 0 if sample else number_of_pairs(self.classes) - (self.pairs + run) // 2
            whole = self.ranks == 1 and (sample is not None or run == self.pairs)
            sizes = chunked_loss.chunk_size
            with (
                patch.object(chunked_loss, "chunk_size", lambda _, *rest: sizes(self.pairs, *rest)),
                patch.object(PairSelection, "rows", property(lambda _: selection)),
            ):
                return PromptLoss(LossConfig())(
                    replace(output, image_vectors=vectors),
                    setup.labels[:own],
                    tower,
                    sample=sample,
                    global_batch=None if whole else GlobalBatch(setup.labels, (first, first + run)),
                    memory=head.text_memory,
                    impl=head.impl,
                )[0]


class _Gather(torch.autograd.Function):
    """Rows of all ranks from a rank's own, as `all_gather_rows` has them; only their shapes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, count: int) -> Tensor:
        ctx.own = len(rows)
        return rows.new_empty(count, *rows.shape[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[: ctx.own], None


def _gathered(rows: Tensor, count: int) -> Tensor:
    found: Tensor = rows if len(rows) == count else _Gather.apply(rows, count)
    return found


def _sample(count: int) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.zeros(count, dtype=torch.int64)
    return index, index, torch.zeros(count)
