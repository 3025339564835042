"""What the ranks of a step tell one another, with gradients where something trains. One process needs none of it.

Every rank calls these in the same order. A rank's loss is taken to be its part of the whole loss times the number of
ranks, so that the mean over ranks, of the loss and of every gradient, is the whole one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def split(count: int, pieces: int) -> list[tuple[int, int]]:
    """Start and stop of contiguous pieces of `count` things, whose sizes differ by one at most."""
    return [(count * number // pieces, count * (number + 1) // pieces) for number in range(pieces)]


def own_rank() -> int:
    """Number of this rank, from 0."""
    return dist.get_rank()


def ranks() -> int:
    """How many there are."""
    return dist.get_world_size()


def own_part(count: int) -> tuple[int, int]:
    """Start and stop of this rank's piece of `count` things."""
    return split(count, dist.get_world_size())[dist.get_rank()]


def exchange(values: Tensor) -> list[Tensor]:
    """`values` of every rank, in rank order; the same shape everywhere, on the CPU, so that no device is waited for."""
    found = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(found, values, group=_host_group())
    return found


def gather_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows of all ranks, one rank after the other; gradients flow back to the rows' own ranks and are summed there.

    Args:
        rows: (counts[rank],…).
        counts: rows of every rank.

    Returns:
        (sum of counts,…).
    """
    if len(rows) != counts[dist.get_rank()]:
        raise ValueError(f"gather_rows: {len(rows)} rows on rank {dist.get_rank()}, counts are {list(counts)}")
    found: Tensor = _GatherRows.apply(rows, tuple(counts))
    return found


def total(values: Tensor) -> Tensor:
    """Sum of `values` over the ranks, without gradients."""
    found = values.clone()
    dist.all_reduce(found)
    return found


def mean_gradient(value: Tensor) -> Tensor:
    """`value`, the same on all ranks; its gradient becomes the mean over the ranks, which is that of the whole loss."""
    found: Tensor = _MeanGradient.apply(value)
    return found


@cache
def _host_group() -> Any:
    """A group for tensors on the CPU; None: the default one, which takes them."""
    default: Any = dist.group.WORLD
    try:
        default._get_backend(torch.device("cpu"))
    except RuntimeError:
        return dist.new_group(backend="gloo")
    return None


class _GatherRows(torch.autograd.Function):
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


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return total(gradient) / dist.get_world_size()


def _pad(rows: Tensor, length: int) -> Tensor:
    """Ranks may differ in their rows, but not in how much they send."""
    if len(rows) == length:
        return rows.contiguous()
    padded = rows.new_zeros(length, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded
