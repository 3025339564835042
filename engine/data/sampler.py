"""Samples of each batch of an epoch, on each rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from ..utils.errors import UserError
from .seeding import generator

Key = tuple[int, int]
"""(epoch, row of the manifest)"""
Keys = Sampler[list[Key]] | Sequence[list[Key]]
"""The batches of an epoch; iterated anew each time."""


def share_of(batch_size: int, world_size: int) -> int:
    """Images of a batch that each process takes.

    Raises:
        UserError: `batch_size` is not divisible by `world_size`.
    """
    if batch_size % world_size:
        raise UserError(f"batch_size: {batch_size} images cannot be split over {world_size} processes")
    return batch_size // world_size


class EpochSampler(Sampler[list[Key]]):
    """Batches of (epoch, row) keys of one rank; set `epoch` and `start_batch`, then iterate.

    An epoch is the permutation of (seed, epoch), cut into global batches of `batch_size`; rank r takes rows
    r·b to (r+1)·b of each, b = batch_size / world_size. So the union of the ranks' k-th batches is the k-th
    batch of one process. Only whole optimizer steps are kept: a multiple of `accumulate` batches.

    Args:
        length: samples.
        batch_size: images a batch over all ranks.
        rank, world_size: this process and how many there are.
        accumulate: batches an optimizer step.
        seed: of the order.

    Raises:
        UserError: `batch_size` is not divisible by `world_size`, or the samples do not fill one optimizer step.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        seed: int = 0,
    ) -> None:
        share = share_of(batch_size, world_size)
        if length < batch_size * accumulate:
            raise UserError(
                f"data.train: {length} images are fewer than one optimizer step of batch_size {batch_size}"
                f" × optim.accumulate {accumulate}"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.share = rank, share
        self.batches_per_epoch = length // (batch_size * accumulate) * accumulate
        self.epoch = self.start_batch = 0

    def __len__(self) -> int:
        return self.batches_per_epoch - self.start_batch

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = self.epoch, self.order(self.epoch)
        for batch in range(self.start_batch, self.batches_per_epoch):
            first = batch * self.batch_size + self.rank * self.share
            yield [(epoch, row) for row in order[first : first + self.share]]

    def order(self, epoch: int) -> list[int]:
        """The permutation of an epoch."""
        permutation: list[int] = torch.randperm(self.length, generator=generator(self.seed, epoch, "order")).tolist()
        return permutation
