"""Batches loaded by Pillow in the processes of torch's DataLoader."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ...utils.errors import UserError
from ...utils.workers import STANDS_STILL, Watchman, die_with_parent, ends_after, loader_deaths
from ..batch import Batch
from ..dataset import ImageDataset
from ..sampler import Key, Keys


class TorchBatches:
    """Batches loaded by Pillow in DataLoader's processes.

    Args:
        dataset: N samples.
        keys: the batches of an epoch.
        workers: processes, kept for all epochs; 0: load in this process.
    """

    def __init__(self, dataset: ImageDataset, keys: Keys, workers: int) -> None:
        self.loader = data_loader(dataset, keys, workers)
        self.timeout = dataset.reading.timeout_s

    def __iter__(self) -> Iterator[Batch]:
        return results(self.loader, self.timeout)


Load = Callable[[ImageDataset, Keys, int], Iterable[Batch]]
"""The class that loads batches: `TorchBatches`, or another with the same arguments."""


@dataclass
class _Failed:
    """A user's mistake met in a worker, carried as data: DataLoader would paste the traceback into the
    message."""

    message: str


class _Guarded(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: Sequence[Key]) -> Any:
        try:
            return self.dataset.__getitems__(keys)
        except UserError as error:
            return _Failed(str(error))


def data_loader(dataset: Any, keys: Keys, workers: int, *, pin: bool = True, fork: bool = True) -> DataLoader[Any]:
    """A DataLoader of what `dataset.__getitems__` makes of whole batches of keys; read it with `results`.

    The keys are iterated in this process, anew each epoch. Workers are forked (cheap, no copy of the dataset), but
    where there is a GPU, or `fork` is false, they come from a fork server: a fork of a process that holds CUDA, NCCL or
    other threads is not safe. DataLoader gives each worker one torch thread.
    """
    cuda = torch.cuda.is_available()
    start = "fork" if fork and not cuda else "forkserver"
    context = multiprocessing.get_context(start) if workers else None
    if context and start == "forkserver":
        context.set_forkserver_preload([__name__])  # import torch once, not once a worker
    return DataLoader(
        _Guarded(dataset),
        batch_sampler=keys,
        collate_fn=_same,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context=context,
        worker_init_fn=_start_worker if workers else None,
        pin_memory=cuda and pin,
        # DataLoader draws a seed at every start; from the global generator that would break exact resuming.
        generator=torch.Generator().manual_seed(0),
    )


def results(loader: DataLoader[Any], timeout: float = 600) -> Iterator[Any]:
    """Batches that the workers of a `data_loader` make.

    Args:
        loader: from `data_loader`.
        timeout: seconds that a batch may take; without workers the process then ends, its main thread being held.

    Raises:
        UserError: that of a worker; or a worker was killed, is stopped, or stands still.
    """
    if not loader.num_workers:
        batches = iter(loader)
        while True:
            with ends_after(timeout, STANDS_STILL.format(timeout)):
                result = next(batches, None)
            if result is None:
                return
            yield _checked(result)
    # torch's own timeout cannot be waited out: it ends the iteration.
    with loader_deaths(), Watchman(partial(_pids, loader), timeout) as watchman:
        with watchman.wait():
            batches = iter(loader)
        while True:
            with watchman.wait():
                result = next(batches, None)
            if result is None:
                return
            yield _checked(result)


def _checked(result: Any) -> Any:
    if isinstance(result, _Failed):
        raise UserError(result.message)
    return result


def _pids(loader: Any) -> list[int]:
    """Processes that load, the one whose batch is waited for first; torch says neither."""
    batches = getattr(loader, "_iterator", None)
    workers = [worker.pid for worker in getattr(batches, "_workers", [])]
    task = getattr(batches, "_task_info", {}).get(getattr(batches, "_rcvd_idx", None), ())
    first = task[0] if task and isinstance(task[0], int) and task[0] < len(workers) else 0
    return workers[first:] + workers[:first]


def _start_worker(_: int) -> None:
    # DataLoader's own watch looks at the fork server, which lives as long as its children do.
    die_with_parent()


def _same(result: Any) -> Any:
    return result
