"""Many small tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others of the same shapes and any dtypes: a launch a pair of dtypes.

    On a GPU tensors whose strides are not their target's are copied one by one.
    """
    groups: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        new, old = groups.setdefault((target.dtype, source.dtype), ([], []))
        new.append(target)
        old.append(source)
    for new, old in groups.values():
        torch._foreach_copy_(new, old)


def cast_all(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The tensors in other dtypes; those that have it already as they are."""
    cast = [
        tensor if tensor.dtype == dtype else torch.empty_like(tensor, dtype=dtype)
        for tensor, dtype in zip(tensors, dtypes, strict=True)
    ]
    changed = [number for number, tensor in enumerate(tensors) if cast[number] is not tensor]
    copy_all([cast[number] for number in changed], [tensors[number] for number in changed])
    return cast
