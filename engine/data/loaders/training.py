"""Batches of training: shuffled, stateless, as many in every epoch on every rank.

Nothing here has a state that a checkpoint must hold: the order of an epoch is a function of (seed, epoch), the
augmentation of a sample a function of (seed, epoch, sample id), and an epoch can start at any batch. The number of
worker processes changes the speed and nothing else, and the global random generators are never drawn from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ...utils.errors import UserError
from ..batch import Batch
from ..dataset import ImageDataset
from ..sampler import EpochSampler
from .torch_loader import Load, TorchBatches


class TrainLoader:
    """Shuffled batches of one rank; make it with `make_train_loader`.

    Args:
        dataset: the samples.
        sampler: of this rank.
        loaded: the batches of `sampler`, those without a readable image included, anew at each iteration.

    Attributes:
        batches_per_epoch: the same on every rank, and exactly as many are yielded in a whole epoch.
        bad: id → reason of the samples left out so far on this rank.
    """

    def __init__(self, dataset: ImageDataset, sampler: EpochSampler, loaded: Iterable[Batch]) -> None:
        self.dataset, self.sampler, self.loaded = dataset, sampler, loaded
        self.batches_per_epoch = sampler.batches_per_epoch
        self.bad: dict[str, str] = {}

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from number `start_batch` on; one iteration at a time.

        Where all images of a batch are unreadable (and skipped), a dummy batch of one image takes its place: the next
        readable one in the epoch's order. So the number of batches, and with it accumulation, resuming and the
        lock-step of the ranks, does not depend on the state of the files.

        Raises:
            UserError: an unreadable image under on_bad_image = error, no readable image at all, or a dead
                worker.
        """
        if not 0 <= start_batch <= self.batches_per_epoch:
            raise ValueError(f"start_batch {start_batch} of {self.batches_per_epoch}")
        self.sampler.epoch, self.sampler.start_batch = epoch, start_batch
        for number, batch in enumerate(self.loaded, start_batch):
            self.bad.update(batch.bad)
            if len(batch):
                yield batch
            else:
                yield self._dummy(epoch, number, batch.bad)

    def _dummy(self, epoch: int, number: int, bad: list[tuple[str, str]]) -> Batch:
        order = self.sampler.order(epoch)
        first = number * self.sampler.batch_size + (self.sampler.rank + 1) * self.sampler.share
        for offset in range(len(order)):
            batch = self.dataset[epoch, order[(first + offset) % len(order)]]
            self.bad.update(batch.bad)
            if len(batch):
                batch.bad, batch.dummy = bad, True
                return batch
        raise UserError(f"none of the {len(order)} training images can be read; the first: {bad[0][1]}")


def make_train_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    workers: int = 0,
    seed: int = 0,
    load: Load = TorchBatches,
) -> TrainLoader:
    """Shuffled training batches, see `EpochSampler` and `TrainLoader`.

    Args:
        dataset: N samples.
        batch_size: images a batch over all ranks.
        rank, world_size: this process and how many there are.
        accumulate: batches an optimizer step.
        workers: loader processes of this rank, kept for all epochs; 0: load in this process.
        seed: of the order.
        load: how.

    Raises:
        UserError: see `EpochSampler`.
    """
    sampler = EpochSampler(
        len(dataset),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        accumulate=accumulate,
        seed=seed,
    )
    return TrainLoader(dataset, sampler, load(dataset, sampler, workers))
