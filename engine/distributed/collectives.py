"""Collectives of the ranks, with gradients where something trains.

Every rank calls them in the same order. The gradients assume that a rank's loss is its part of the whole loss times the
number of ranks: then the mean over ranks, of the loss and of every gradient, is that of the whole loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
BUCKET = 2**24
"""elements that are reduced at a time: enough that latency does not count, and the first is under way early"""


def rank() -> int:
    """Number of this rank, from 0."""
    return dist.get_rank()


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size()


def split(count: int, pieces: int) -> list[tuple[int, int]]:
    """Start and stop of contiguous pieces of `count` things, whose sizes differ by one at most."""
    return [(count * number // pieces, count * (number + 1) // pieces) for number in range(pieces)]


def local_slice(count: int) -> tuple[int, int]:
    """Start and stop of this rank's piece of `count` things."""
    return split(count, dist.get_world_size())[dist.get_rank()]


def in_order(of_ranks: Iterable[Iterable[tuple[int, T]]]) -> list[T]:
    """Results of all ranks, sorted by their places in the data set: the same for any number of ranks.

    Args:
        of_ranks: (place, result) of every rank's batches; no place twice.
    """
    return [part for _, part in sorted((pair for own in of_ranks for pair in own), key=lambda pair: pair[0])]


def is_main() -> bool:
    """Whether this is the rank that speaks for all; so is a process without ranks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def first_refusal(reason: str | None) -> str | None:
    """What the first rank that has a reason says, with its number; None: no rank has one. The same on every rank."""
    found = all_gather_object(reason)
    if len(set(found)) == 1:
        return reason
    return next(f"rank {number}: {why}" for number, why in enumerate(found) if why is not None)


def barrier() -> None:
    """Wait for every rank."""
    dist.barrier()


def broadcast_buffers(module: nn.Module) -> None:
    """Give every rank rank 0's buffers (running means of batch normalisation drift apart)."""
    for buffer in module.buffers():
        dist.broadcast(buffer, 0)


def all_gather_object(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank. It is pickled: for small Python values."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_object(value: Any) -> list[Any] | None:
    """`value` of every rank, in rank order, on rank 0; None on the others."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def all_gather_host(values: Tensor) -> list[Tensor]:
    """`values` of every rank, in rank order; the same shape everywhere, on the CPU, so that no device is waited for."""
    found = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(found, values, group=_host_group())
    return found


def broadcast_host(values: Tensor, source: int) -> None:
    """Overwrite contiguous `values`, on the CPU, with those of rank `source`."""
    dist.broadcast(values, source, group=_host_group())


def all_gather_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows of all ranks, one rank after the other; gradients flow back to the rows' own ranks and are summed there.

    Args:
        rows: (counts[rank],…).
        counts: rows of every rank.

    Returns:
        (sum of counts,…).

    Raises:
        ValueError: `rows` are not as many as `counts` says.
    """
    if len(rows) != counts[dist.get_rank()]:
        raise ValueError(f"all_gather_rows: {len(rows)} rows on rank {dist.get_rank()}, counts are {list(counts)}")
    found: Tensor = _AllGatherRows.apply(rows, tuple(counts))
    return found


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum of `values` over the ranks, without gradients."""
    found = values.clone()
    dist.all_reduce(found)
    return found


def start_mean(values: Tensor) -> Callable[[], Tensor]:
    """Begin to replace contiguous `values` by their mean over the ranks, beside what is computed next.

    The function returned waits for it (on a GPU the stream does, not the host) and gives `values`, which nothing may
    touch before.
    """
    work = dist.all_reduce(values, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return values.div_(dist.get_world_size())

    return finish


def all_reduce_mean(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Means over the ranks, of the same dtype all, without gradients; None stays None, on all ranks alike.

    They are reduced in buckets of about `BUCKET` elements, one after the other, and are views of these.
    """
    known = [tensor for tensor in tensors if tensor is not None]
    buckets: list[list[Tensor]] = []
    room = 0
    for tensor in known:
        if tensor.numel() > room:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(tensor)
        room -= tensor.numel()
    running = [start_mean(torch.cat([tensor.flatten() for tensor in bucket])) for bucket in buckets]
    means = iter(
        part.view(tensor.shape)
        for bucket, finish in zip(buckets, running, strict=True)
        for part, tensor in zip(finish().split([tensor.numel() for tensor in bucket]), bucket, strict=True)
    )
    return [None if tensor is None else next(means) for tensor in tensors]


def average_gradient(value: Tensor) -> Tensor:
    """`value`, the same on all ranks; its gradient becomes the mean over the ranks, which is that of the whole loss."""
    found: Tensor = _AverageGradient.apply(value)
    return found


@cache
def _host_group() -> Any:
    """Process group for tensors on the CPU; None: the default group, where that takes them."""
    default: Any = dist.group.WORLD
    try:
        default._get_backend(torch.device("cpu"))
    except RuntimeError:
        return dist.new_group(backend="gloo")
    return None


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.counts = counts
        padded = _pad(rows, max(counts))
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded)
        return torch.cat([piece[:count] for piece, count in zip(found, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        pieces = [_pad(piece, max(ctx.counts)) for piece in gradient.split(ctx.counts)]
        own = torch.empty_like(pieces[0])
        dist.reduce_scatter(own, pieces)
        return own[: ctx.counts[dist.get_rank()]], None


class _AverageGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient) / dist.get_world_size()


def _pad(rows: Tensor, length: int) -> Tensor:
    """Rows with zeros after them: ranks may differ in their rows, but not in how much they send."""
    if len(rows) == length:
        return rows.contiguous()
    padded = rows.new_zeros(length, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded
