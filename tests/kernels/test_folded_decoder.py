"""The folded decoder against the literal one: outputs and every gradient, float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pspg.kernels.prompt_decoder import decode


def decoder(width: int, hidden: int, generator: torch.Generator) -> dict[str, Tensor]:
    shapes = {
        "gru.weight_ih": (3 * hidden, width),
        "gru.weight_hh": (3 * hidden, hidden),
        "gru.bias_ih": (3 * hidden,),
        "gru.bias_hh": (3 * hidden,),
        "encoder_proj.weight": (hidden, width),
        "encoder_proj.bias": (hidden,),
        "self_attention.fc.weight": (hidden, hidden),
        "self_attention.fc.bias": (hidden,),
        "self_attention.layer_norm.weight": (hidden,),
        "self_attention.layer_norm.bias": (hidden,),
        "fc.weight": (width, hidden),
        "fc.bias": (width,),
    }
    for name in ("self_attention.self_attention", "encoder_attention"):
        shapes |= {
            f"{name}.in_proj_weight": (3 * hidden, hidden),
            f"{name}.in_proj_bias": (3 * hidden,),
            f"{name}.out_proj.weight": (hidden, hidden),
            f"{name}.out_proj.bias": (hidden,),
        }
    return {
        name: (0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("images", [1, 7])
@pytest.mark.parametrize("n", [1, 4, 16])
@pytest.mark.parametrize("count", [1, 2])
def test_equals_the_reference(classes: int, images: int, n: int, count: int) -> None:
    generator = torch.Generator().manual_seed(n)
    decoders = [decoder(6, 4, generator) for _ in range(count)]
    features, context = (
        torch.randn(rows, 6, generator=generator, dtype=torch.float64).requires_grad_() for rows in (classes, images)
    )
    weights = torch.randn(count, classes, n, 6, generator=generator, dtype=torch.float64)
    inputs = [features, context, *(tensor for one in decoders for tensor in one.values())]
    results = []
    for impl in ("reference", "eager"):
        outputs = decode(decoders, features, context, prompt_length=n, heads=2, impl=impl)
        results.append([outputs.detach(), *torch.autograd.grad((outputs * weights).sum(), inputs)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
