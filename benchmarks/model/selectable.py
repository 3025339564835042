"""Forms of a step that can be chosen and are not the default before a GPU has run them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from pspg.kernels.launch import overlapped
from pspg.kernels.prompt_decoder.triton import host

from .assumptions import Assumptions
from .price import kind, price, used
from .trace import IMAGE, OPTIMIZER, Operation, Step, trace_step

DECODERS: tuple[host.Choice, ...] = ("overlapped", "one")


@cache
def selectable_step(classes: int, batch: int, decoder: host.Choice = "overlapped") -> Step:
    """A step of phase 2 with convolutions of the image tower that take bias, residual and ReLU with them, and kernels
    of the text tower each of which is set up while the one before ends.

    Args:
        decoder: how its kernels are launched.
    """
    with overlapped(), host.use(decoder):
        step = trace_step(classes, batch)
    return replace(step, operations=[*_fused(step.operations)])


def faster_decoder(classes: int, batch: int, table: Assumptions) -> tuple[host.Choice, dict[str, float]]:
    """The decoder's launches that take least on a GPU, and seconds of each."""
    seconds: dict[str, float] = {
        choice: sum(
            price(operation, table)
            for operation in selectable_step(classes, batch, choice).operations
            if kind(operation) == "prompt_decoder"
        )
        for choice in DECODERS
    }
    return min(DECODERS, key=lambda choice: seconds[choice]), seconds


@dataclass(frozen=True)
class Ahead:
    """The image tower of the next batch beside the text side of this one (`images_ahead`), seconds."""

    images: float
    """of the tower alone"""
    texts: float
    """of what it runs beside, alone: all but the optimizer"""
    used: float
    """of processors or bandwidth, by both"""

    @property
    def saved(self) -> float:
        return self.images + self.texts - max(self.images, self.texts, self.used)


def images_ahead(step: Step, table: Assumptions) -> Ahead:
    """Both take as long as the longer alone, and as what they use together of the GPU, as if all of it were one thing.

    So a pass over memory is never hidden behind a product; only gaps, latency and idle processors are.
    """
    tower = [operation for operation in step.operations if operation.part == IMAGE]
    beside = [operation for operation in step.operations if operation.part not in (IMAGE, OPTIMIZER)]
    return Ahead(
        sum(price(operation, table) for operation in tower),
        sum(price(operation, table) for operation in beside),
        sum(used(operation, table) for operation in [*tower, *beside]),
    )


def _fused(operations: list[Operation]) -> list[Operation]:
    found = []
    for operation in operations:
        if operation.part == IMAGE and operation.name in ("relu_", "add_"):
            continue
        found.append(replace(operation, kernels=1) if operation.name.startswith("convolution") else operation)
    return found
