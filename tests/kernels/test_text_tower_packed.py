"""Packed texts give the literal tower's features and gradients, of inputs and of every weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pspg.kernels.text_tower import TextLayer, TextTower, encode, encode_packed, pack_texts


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("rows", [None, 17])
def test_features_and_gradients_are_the_literal_ones(tower: TextTower, activation: Any, rows: int | None) -> None:
    """Texts of one to seven tokens, of which a grid has one column more; rows that fill up change nothing."""
    pooled = torch.tensor([6, 0, 2, 3])
    embeddings = torch.randn(4, 8, 4, dtype=torch.float64, requires_grad=True)
    layers = tuple(TextLayer(*(w.detach().requires_grad_() for w in layer)) for layer in tower.layers)
    others = {name: getattr(tower, name).detach().requires_grad_() for name in ("positional_embedding", "projection")}
    others |= {name: getattr(tower, name).detach().requires_grad_() for name in ("ln_final_weight", "ln_final_bias")}
    tower = replace(tower, layers=layers, activation=activation, **others)

    def outcome(features: Tensor) -> list[Tensor]:
        loss = (features * torch.arange(1.0, 13, dtype=torch.float64).view(4, 3)).square().sum()
        return [features.detach(), *torch.autograd.grad(loss, [embeddings, *tower.tensors()])]

    packing = pack_texts(pooled, 8, rows)
    known = packing.slots < 4 * 8
    tokens = torch.randn(len(known), 4, dtype=torch.float64)
    tokens = torch.where(known[:, None], embeddings.flatten(0, 1)[packing.slots.clamp(max=31)], tokens)
    found, expected = outcome(encode_packed(tower, tokens, packing)), outcome(encode(tower, embeddings, pooled))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="5 tokens are more than 4 rows"):
        pack_texts(torch.tensor([1, 2]), 3, 4)
