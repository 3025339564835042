"""Stand-ins for a CUDA graph, and what a step must not do within one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pspg.engine.training.cuda_graph import Outcome

# Operators whose result the host has to know: values, or shapes that depend on values.
READS = {
    "_local_scalar_dense",
    "_unique2",
    "argwhere",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}


class HostReads(TorchDispatchMode):
    """Names of the operators that made the host wait, boolean indexing and copies between devices included.

    Attributes:
        seen: the names.
        collectives: of each collective its name, and by argument the shapes and dtypes of what it sends and gets.
    """

    active: HostReads | None = None

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.collectives: list[tuple[Any, ...]] = []

    def __enter__(self) -> Any:
        HostReads.active = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        HostReads.active = None
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if function.namespace == "c10d":
            self.collectives.append((name, *filter(None, map(_shapes, args))))
        result = function(*args, **(kwargs or {}))
        if name in READS or (name in {"index", "index_put", "index_put_"} and _by_mask(args[1])):
            self.seen.append(name)
        if name in {"_to_copy", "copy_"} and isinstance(result, Tensor):
            source = args[1] if name == "copy_" else args[0]
            if isinstance(source, Tensor) and source.device != result.device:
                self.seen.append(f"{name} {source.device} to {result.device}")
        return result


def _by_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


def _shapes(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return [(tuple(value.shape), str(value.dtype))]
    return [shape for entry in value for shape in _shapes(entry)] if isinstance(value, list | tuple) else []


def record_by_hand(function: Callable[[], Outcome]) -> tuple[Callable[[], None], Outcome]:
    """What a CUDA graph does, by running the function again: results land in the tensors of the first run."""
    loss, parts, gradients = function()

    def replay() -> None:
        new_loss, new_parts, new_gradients = function()
        loss.copy_(new_loss)
        for name, part in new_parts.items():
            parts[name].copy_(part)
        for old, new in zip(gradients, new_gradients, strict=True):
            assert (old is None) == (new is None)
            if old is not None and new is not None:
                old.copy_(new)

    return replay, (loss, parts, gradients)


class CheckedRecorder:
    """`record_by_hand` where ranks share a batch: a run that a graph could not repeat fails.

    Attributes:
        collectives: of the last recording, as of `HostReads`.
        replays: how many there were of all recordings, their checks included.
    """

    def __init__(self) -> None:
        self.collectives: list[tuple[Any, ...]] = []
        self.replays = -1

    def __call__(self, function: Callable[[], Outcome]) -> tuple[Callable[[], None], Outcome]:
        first = True

        def watched() -> Outcome:
            nonlocal first
            with HostReads() as trap:
                found = function()
            assert trap.seen == [], trap.seen
            if first:
                self.collectives = trap.collectives
            assert trap.collectives == self.collectives
            first = False
            self.replays += 1
            return found

        return record_by_hand(watched)


class Pools(TorchDispatchMode):
    """A model of torch's caching allocator: a pool reserves the most that was alive in it, until it is given back.

    As on a GPU a recording has a pool of its own, which its replays use; it can be given back once the recording is
    dropped. A recording begins by giving back. Blocks have no size: what fragmentation costs is not in it.

    Attributes:
        live, reserved: bytes by pool; 0 is that of ordinary steps.
        peak: most bytes reserved in all pools.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.reserved, self.peak = {0: 0}, {0: 0}, 0
        self._pool, self._free, self._known = 0, {0}, set[int]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given | self._known:
                self._allocated(tensor.untyped_storage())
        return result

    def give_back(self, device: torch.device | None = None) -> None:
        """What `torch.cuda.empty_cache` does."""
        self.reserved.update({pool: self.live[pool] for pool in self._free})

    def record(self, function: Callable[[], Outcome]) -> tuple[Callable[[], None], Outcome]:
        """`record_by_hand`, in a pool."""
        self.give_back()
        pool = len(self.live)
        self.live[pool] = self.reserved[pool] = 0

        def pooled() -> Outcome:
            self._pool = pool
            try:
                return function()
            finally:
                self._pool = 0

        replay, outcome = record_by_hand(pooled)
        weakref.finalize(replay, self._free.add, pool)
        return replay, outcome

    def _allocated(self, storage: Any) -> None:
        key, size, pool = storage._cdata, storage.nbytes(), self._pool
        self._known.add(key)
        self.live[pool] += size
        self.reserved[pool] = max(self.reserved[pool], self.live[pool])
        self.peak = max(self.peak, sum(self.reserved.values()))
        weakref.finalize(storage, self._gone, key, size, pool)

    def _gone(self, key: int, size: int, pool: int) -> None:
        self._known.discard(key)
        self.live[pool] -= size
