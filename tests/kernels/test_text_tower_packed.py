"""Packed texts give the literal tower's features and gradients, of inputs and of every weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pspg.kernels.text_tower import TextLayer, TextTower, encode, encode_packed, pack_texts, packed
from pspg.kernels.text_tower.packed_cpu import attention_by_text


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("rows", [None, 17])
@pytest.mark.parametrize("by_text", [True, False])
def test_features_and_gradients_are_the_literal_ones(
    tower: TextTower, activation: Any, rows: int | None, by_text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of one to seven tokens, of which a grid has one column more; rows that fill up change nothing."""
    if not by_text:  # as on a device other than a CPU, or under autocast
        monkeypatch.setattr(packed, "fits", lambda *tensors: False)
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


def test_rows_behind_the_last_text_attend_to_nothing() -> None:
    """What their memory held before, here NaN, reaches neither the result nor the gradient."""
    torch.full((6, 12), torch.nan), torch.full((6, 4), torch.nan)  # freed, and likely to be taken again
    qkv = torch.randn(6, 12, requires_grad=True)
    out = attention_by_text(2, qkv, torch.tensor([0, 3]))
    (gradient,) = torch.autograd.grad(out.sum(), qkv)
    assert not out[4:].any()
    assert not gradient[4:].any()
    assert torch.equal(out[0], qkv[0, 8:])


def test_ends_that_no_packing_has_take_the_grid(tower: TextTower) -> None:
    """As in the check of a recorded step, whose inputs are reversed: a text of no tokens would end the process."""
    packing, tower = pack_texts(torch.tensor([1, 3]), 4), tower.to(torch.float32)
    assert encode_packed(tower, torch.randn(6, 4), packing._replace(ends=packing.ends.flip(0))).shape == (2, 3)


def test_under_autocast_a_cpu_computes_in_its_dtype(tower: TextTower) -> None:
    """Within bf16's rounding of float32, weights in float32."""
    packing, tower = pack_texts(torch.tensor([6, 2]), 8), tower.to(torch.float32)
    tokens = torch.randn(10, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = encode_packed(tower, tokens, packing)
    torch.testing.assert_close(found.float(), encode_packed(tower, tokens, packing), rtol=0.1, atol=0.1)


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="5 tokens are more than 4 rows"):
        pack_texts(torch.tensor([1, 2]), 3, 4)
