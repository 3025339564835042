"""The contract of pair losses, and what they are given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from pspg.kernels.pairs import PairSample, PairSelection
from pspg.kernels.spcl import ImageBatch, spcl
from pspg.kernels.text_tower import TextTower

from ....models.pspg import PsPGOutput


class GlobalBatch(NamedTuple):
    """The batch that a rank has a share of. The loss is then the rank's part of the whole one: parts add up."""

    labels: Tensor
    """(M,C) of all images"""
    pairs: tuple[int, int] | None
    """start and stop of the pairs (of all, or of those sampled) that this rank takes; None: the sample is its own"""
    window: Tensor | None = None
    """rows of its own sample, as of `PairSelection`"""
    present: Tensor | None = None
    """(M,) bool, images that count, where some of the M do not; their labels are -1. None: all"""


@dataclass(frozen=True)
class PairInputs:
    """A forward pass and its labels."""

    output: PsPGOutput
    """output of the head, for B images; its image vectors are those of all M images under `global_batch`"""
    labels: Tensor
    """(B,C) in {1, 0, -1}"""
    tower: TextTower
    """frozen text tower"""
    reduction: Literal["sum", "mean"]
    sample: PairSample | None = None
    """pairs to estimate the loss from; None: all"""
    global_batch: GlobalBatch | None = None
    """None: the B images are all there is"""
    memory: int | None = None
    """bytes of activations to hold at a time; None: the operator's default"""
    impl: str = "auto"
    """implementation of the operators"""


class PairLoss(ABC):
    """Loss of pairs of classes, or of all labels of an image together."""

    name: ClassVar[str]
    """value of `loss.pair`"""
    needs_pairs: ClassVar[bool] = False
    """it encodes pair prompts and compares them with one vector an image"""
    paper_reduction: ClassVar[Literal["sum", "mean"]] = "sum"
    """under preset paper"""
    published_weight: ClassVar[float] = 1.0
    """under preset published"""

    @abstractmethod
    def __call__(self, inputs: PairInputs) -> Tensor | None:
        """Scalar, float32 or better; None: no loss."""


class PairPromptLoss(PairLoss):
    """The operator `spcl` with one of its targets."""

    needs_pairs = True
    target: ClassVar[Literal["batch", "sample"]]

    def __call__(self, inputs: PairInputs) -> Tensor:
        """Pair loss as in `PairLoss`; labels of -1 count as 0.

        Raises:
            ValueError: the output has no image vectors.
        """
        output, batch = inputs.output, inputs.global_batch
        if output.image_vectors is None:
            raise ValueError(f"{self.name}: the output has no image vectors to compare pairs with")
        labels = inputs.labels if batch is None else batch.labels
        pairs = PairSelection(labels.shape[1], inputs.sample, window=None if batch is None else batch.window)
        if batch is not None and batch.pairs is not None:
            pairs = pairs.part(*batch.pairs)
        return spcl(
            inputs.tower,
            output.prompts,
            ImageBatch(output.image_vectors, output.logit_scale, labels, None if batch is None else batch.present),
            target=self.target,
            reduction=inputs.reduction,
            pairs=pairs,
            memory=inputs.memory,
            impl=inputs.impl,
        )
