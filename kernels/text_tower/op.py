"""Public form of the text tower."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import check_shapes, resolve
from . import reference
from .reference import TextTower


def encode(tower: TextTower, embeddings: Tensor, pooled: Tensor | int, *, impl: str = "auto") -> Tensor:
    """Text features of N embedding sequences, the token embedding bypassed.

    Gradients flow to `embeddings`, and to the tower's weights where they require them.

    Args:
        tower: the tower.
        embeddings: (N,T,W), before the positional embedding; T up to the tower's context length.
        pooled: position of the feature, one for all or (N,) int64. Tokens after it do not matter.
        impl: auto or reference.

    Returns:
        (N,D), not normalised.

    Raises:
        ValueError: shapes that do not fit, sequences longer than the context, or an `impl` that cannot run.
    """
    run = resolve(impl, {"reference": reference.encode})
    if isinstance(pooled, int):
        pooled = torch.full((len(embeddings),), pooled, device=embeddings.device)
    check_shapes(
        "encode",
        embeddings=(embeddings, "N T W"),
        positional_embedding=(tower.positional_embedding, "context W"),
        pooled=(pooled, "N"),
    )
    if embeddings.shape[1] > tower.context_length:
        raise ValueError(f"encode: {embeddings.shape[1]} tokens, the context holds {tower.context_length}")
    return run(tower, embeddings, pooled)
