"""The pair loss of prompts, forward, loss and backward for a chunk of pairs at a time; exact in real arithmetic.

Every pair's loss depends on its own feature alone, so its gradient can be formed as soon as its feature is known, and
the chunk's activations dropped. What is kept for the outer backward are sums over all pairs: gradients of the prefixes'
states, of the tails, of the image vectors and of the temperature. Nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Chunk = tuple[int, int, int, int]
"""Pairs start to stop, whose first classes lie in low to high (all but the last included)."""
ChunkLoss = Callable[[Chunk, tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]
"""(chunk, rows low to high of the tensors with a row a class, the other tensors) → the chunk's part of the loss."""


def row_major_chunks(classes: int, size: int, part: tuple[int, int] | None = None) -> Iterator[Chunk]:
    """Pairs i < j of `classes`, row-major, `size` at a time: all, or numbers start to stop of them."""
    ends = [i * (2 * classes - i - 1) // 2 for i in range(1, classes)]  # pairs of rows 0 to i − 1
    begin, end = part or (0, ends[-1] if ends else 0)
    row = 0
    for start in range(begin, end, size):
        stop = min(start + size, end)
        while ends[row] <= start:
            row += 1
        last = row
        while ends[last] < stop:
            last += 1
        yield start, stop, row, last + 1


def sampled_chunks(first: Tensor, size: int) -> list[Chunk]:
    """Chunks of `size` pairs whose first classes are `first` (R,), ascending, on the CPU."""
    rows = first.tolist()
    starts = range(0, len(rows), size)
    return [
        (start, min(start + size, len(rows)), rows[start], rows[min(start + size, len(rows)) - 1] + 1)
        for start in starts
    ]


def sum_of_chunks(
    loss_of: ChunkLoss, chunks: Sequence[Chunk], by_class: Sequence[Tensor], shared: Sequence[Tensor]
) -> Tensor:
    """Σ over chunks of `loss_of`, in float32 or better, differentiable in all tensors.

    Args:
        by_class: tensors (C,…) of which a chunk sees its rows only.
        shared: tensors that every chunk sees whole.
    """
    return _Sum.apply(loss_of, chunks, torch.is_grad_enabled(), len(by_class), *by_class, *shared)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss_of: ChunkLoss, chunks: Sequence[Chunk], recording: bool, by_class: int, *inputs: Tensor
    ) -> Tensor:
        wanted = [recording and tensor.requires_grad for tensor in inputs]
        # Sums over many chunks: float32 or better, whatever the inputs are.
        sums = [_zeros(tensor) if want else None for tensor, want in zip(inputs, wanted, strict=True)]
        total = _zeros(inputs[-1]).sum()
        for chunk in chunks:
            rows = slice(*chunk[2:])
            views = [tensor[rows] if number < by_class else tensor for number, tensor in enumerate(inputs)]
            leaves = [view.detach().requires_grad_(want) for view, want in zip(views, wanted, strict=True)]
            with torch.set_grad_enabled(any(wanted)):
                loss = loss_of(chunk, tuple(leaves[:by_class]), tuple(leaves[by_class:]))
            total += loss.detach()
            if not any(wanted):
                continue
            gradients = iter(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad]))
            for number, buffer in enumerate(sums):
                if buffer is not None:
                    (buffer[rows] if number < by_class else buffer).add_(next(gradients))
        ctx.save_for_backward(*sums)
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, None, None, *(None if t is None else (t * gradient).to(dtype) for t, dtype in found)


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
