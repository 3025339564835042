"""LayerNorm folded into the products around it: the same numbers, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pspg.kernels.text_tower import PromptTemplate, TextTower, single_prompts
from pspg.kernels.text_tower.eager import EAGER
from pspg.kernels.text_tower.folding import FOLDED, fold, folded_layer, norm_linear
from pspg.kernels.text_tower.prefix_cache import encode_prefixes
from pspg.kernels.text_tower.reference import encode
from tests.oracle import no_worse, no_worse_in_norm

OPERATIONS = EAGER._replace(products=lambda tower, x: FOLDED)


def problem(rows: int, width: int, columns: int, outlier: float) -> list[Tensor]:
    """x, γ, β, weight, bias and a gradient of the result, float64; two columns of x are far from the others."""
    torch.manual_seed(0)
    x = torch.randn(rows, width) + 0.3
    x[:, 1] += outlier
    x[:, -1] -= outlier / 2
    weights = 1 + 0.3 * torch.randn(width), 0.1 * torch.randn(width), torch.randn(columns, width) * width**-0.5
    return [t.double() for t in (x, *weights, 0.1 * torch.randn(columns), torch.randn(rows, columns))]


def plain(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    out = F.linear(F.layer_norm(leaf, x.shape[-1:], gamma, beta, 1e-5), weight, bias)
    return [out.detach(), *torch.autograd.grad(out, leaf, gradient)]


def folded(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    out = norm_linear(leaf, fold(gamma, beta, weight, bias), 1e-5)
    return [out.detach(), *torch.autograd.grad(out, leaf, gradient)]


@pytest.mark.parametrize("outlier", [0.0, 40.0])
def test_it_is_an_identity(outlier: float) -> None:
    given = problem(37, 64, 192, outlier)
    for got, expected in zip(folded(*given), plain(*given), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("outlier", [0.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_no_less_precise(dtype: torch.dtype, outlier: float) -> None:
    """The weights are rounded once more, the normalised input once less."""
    given = [t.to(dtype) for t in problem(200, 512, 256, outlier)]
    results = folded(*given), plain(*given), plain(*(t.double() for t in given))
    no_worse_in_norm(*results, slack=0)
    if dtype != torch.float32:  # there both are rounded alike, and which element comes off worst is chance
        no_worse(*results)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("named", [False, True], ids=["whole", "prefix"])
@pytest.mark.parametrize("layers", [1, 3])
def test_prompts_equal_the_reference(
    tower: TextTower, make_template: Callable[..., PromptTemplate], named: bool, layers: int, activation: Any
) -> None:
    tower = replace(tower, layers=(tower.layers * 2)[:layers], activation=activation)
    template = make_template(3, [2, 1, 3] if named else None)
    prompts = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    expected = encode(tower, *single_prompts(prompts, template))
    got = encode_prefixes(tower, template, prompts, OPERATIONS, keep=0, singles=True).features
    assert got is not None
    weights = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view(got.shape)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    both = [torch.autograd.grad((out * weights).sum(), prompts)[0] for out in (got, expected)]
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-12)


def test_weights_are_folded_once_and_again_when_they_change(tower: TextTower) -> None:
    layer = tower.layers[0]
    once = folded_layer(layer)
    assert folded_layer(layer) is once
    assert folded_layer(replace(tower, heads=1).to(torch.float64).layers[0]) is once
    layer.ln_2_weight.mul_(2)
    again = folded_layer(layer)
    torch.testing.assert_close(again.fc.weight, 2 * once.fc.weight)
    assert torch.equal(again.qkv.weight, once.qkv.weight)
    other = layer._replace(fc_weight=-layer.fc_weight)  # shares the weight that the cache is indexed by
    torch.testing.assert_close(folded_layer(other).fc.weight, -again.fc.weight)


def test_weights_of_inference_mode_fold(tower: TextTower) -> None:
    with torch.inference_mode():
        frozen = tower.to(torch.float32)
        assert folded_layer(frozen.layers[0]).fc.weight.dtype == torch.float32


def test_a_tower_in_bf16_keeps_float32_sums(tower: TextTower) -> None:
    folded = folded_layer(tower.to(torch.bfloat16).layers[0]).qkv
    assert folded.weight.dtype == torch.bfloat16
    assert folded.sums.dtype == folded.bias.dtype == torch.float32
    torch.testing.assert_close(folded.sums, folded.weight.float().sum(1))
