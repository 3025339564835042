"""Batches of evaluation: in the order of the manifest, the last one partial."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..batch import Batch
from ..dataset import ImageDataset
from .torch_loader import Load, TorchBatches


class EvalLoader:
    """Batches of one rank in the order of the manifest, the last one partial; make it with `make_eval_loader`.

    Args:
        batches: how many there are.
        loaded: the batches, those without a readable image included, anew at each iteration.

    Attributes:
        bad: id → reason of the samples left out so far; a batch without any readable image is not yielded.
    """

    def __init__(self, batches: int, loaded: Iterable[Batch]) -> None:
        self.batches, self.loaded = batches, loaded
        self.bad: dict[str, str] = {}

    def __len__(self) -> int:
        """Batches at most."""
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        waiting: list[tuple[str, str]] = []
        for batch in self.loaded:
            self.bad.update(batch.bad)
            waiting += batch.bad
            if len(batch):
                batch.bad, waiting = waiting, []
                yield batch


def make_eval_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    load: Load = TorchBatches,
) -> EvalLoader:
    """Batches in the order of the manifest, see `EvalLoader`.

    Args:
        dataset: N samples.
        batch_size: images a batch.
        rank, world_size: this process and how many there are; each takes every `world_size`-th batch, whole.
        workers: loader processes of this rank; 0: load in this process.
        load: how.
    """
    rows = range(len(dataset))
    batches = [[(0, row) for row in rows[i : i + batch_size]] for i in rows[::batch_size]]
    keys = batches[rank::world_size]
    return EvalLoader(len(keys), load(dataset, keys, workers))
