from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pspg.kernels.pairs import pair_indices
from pspg.kernels.text_tower import PromptTemplate, TextTower, encode, pair_prompts, single_prompts

MakeTemplate = Callable[..., PromptTemplate]
LENGTHS = [None, [2, 1, 3]]
whole_and_prefix = pytest.mark.parametrize("lengths", LENGTHS, ids=["whole", "prefix"])


def literal_single(prompts: Tensor, template: PromptTemplate, c: int) -> list[Tensor]:
    return [template.sos, *prompts[c], *template.token_suffix[c]]


def literal_pair(prompts: Tensor, template: PromptTemplate, i: int, j: int) -> list[Tensor]:
    name = template.token_suffix[i, : template.name_lengths[i]]
    return [template.sos, *prompts[i], *name, *prompts[j], *template.token_suffix[j]]


def padded(rows: list[Tensor], template: PromptTemplate) -> Tensor:
    return torch.stack((rows + [template.padding] * 77)[:77])


@whole_and_prefix
def test_layout(make_template: MakeTemplate, lengths: list[int] | None) -> None:
    template, prompts = make_template(3, lengths), torch.randn(3, 2, 4).double()
    embeddings, eos = single_prompts(prompts, template, tokens=77)
    for c in range(3):
        assert torch.equal(embeddings[c], padded(literal_single(prompts, template, c), template))
        end = lengths[c] + 1 if lengths else 0
        assert torch.equal(embeddings[c, eos[c]], template.token_suffix[c, end])
    first, second = pair_indices(3)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2)]
    embeddings, pooled = pair_prompts(prompts, template, first, second, tokens=77)
    for row, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        assert torch.equal(embeddings[row], padded(literal_pair(prompts, template, i, j), template))
        assert torch.equal(embeddings[row, pooled[row]], template.token_suffix[j, lengths[j] if lengths else 0])


@whole_and_prefix
@pytest.mark.parametrize("kind", ["single", "pair"])
def test_stopping_at_the_pooled_token_is_exact(
    tower: TextTower, make_template: MakeTemplate, lengths: list[int] | None, kind: str
) -> None:
    """77 tokens and the shortest sequences give the same features and the same gradients."""
    template, prompts = make_template(3, lengths), torch.randn(3, 2, 4).double().requires_grad_()

    def run(tokens: int | None) -> tuple[Tensor, Tensor, int]:
        if kind == "single":
            embeddings, pooled = single_prompts(prompts, template, tokens=tokens)
        else:
            embeddings, pooled = pair_prompts(prompts, template, *pair_indices(3), tokens=tokens)
        features = encode(tower, embeddings, pooled)
        (gradient,) = torch.autograd.grad(features.square().sum(), prompts)
        return features, gradient, embeddings.shape[1]

    full, full_gradient, _ = run(77)
    short, short_gradient, length = run(None)
    if lengths is None:
        assert length == {"single": 2 + 2, "pair": 2 * 2 + 2}[kind]
    assert length < 77
    torch.testing.assert_close(short, full, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(short_gradient, full_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_gradcheck(tower: TextTower, activation: Any) -> None:
    tower = replace(tower, activation=activation)
    embeddings = torch.randn(2, 3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: encode(tower, x, torch.tensor([2, 1])), embeddings)


def test_one_position_for_all(tower: TextTower) -> None:
    embeddings = torch.randn(2, 3, 4).double()
    assert torch.equal(encode(tower, embeddings, 1), encode(tower, embeddings, torch.tensor([1, 1])))


def test_refuses_what_does_not_fit(tower: TextTower) -> None:
    with pytest.raises(ValueError, match="78 tokens"):
        encode(tower, torch.zeros(1, 78, 4).double(), 0)
    with pytest.raises(ValueError, match="W"):
        encode(tower, torch.zeros(1, 3, 5).double(), 0)
