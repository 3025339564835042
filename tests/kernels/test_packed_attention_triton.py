"""Attention of packed texts as a kernel, and the packed tower with it, against float64 and torch in the same dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pspg.kernels.launch import record
from pspg.kernels.text_tower import TextTower, encode_packed, pack_texts
from pspg.kernels.text_tower.packed import _attend
from tests.oracle import no_worse, no_worse_in_norm


def outcome(function: object, leaves: list[Tensor]) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)  # type: ignore[operator]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.device, leaves[0].dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("pooled", "tokens", "rows", "heads", "size"),
    [([0], 1, None, 1, 16), ([6, 0, 2], 8, 17, 2, 8), ([16, 3], 17, 40, 3, 5), ([76, 40, 69], 77, 256, 1, 64)],
)
def test_attention(
    pooled: list[int], tokens: int, rows: int | None, heads: int, size: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Rows that fill up get zeros, and pass none on."""
    from pspg.kernels.text_tower.triton.packed_attention import packed_attention

    torch.manual_seed(0)
    packing = pack_texts(torch.tensor(pooled), tokens, rows)
    packing = type(packing)(*(tensor.to(device) for tensor in packing))
    count = len(packing.positions)
    qkv = torch.randn(count, 3 * heads * size, device=device).to(dtype)
    known = sum(end + 1 for end in pooled)
    assert not packed_attention(qkv, packing.ends, heads, tokens)[known:].any()
    kernel = outcome(lambda x: packed_attention(x, packing.ends, heads, tokens)[:known], [qkv])
    eager, exact = (outcome(lambda x: _attend(heads, x, packing)[:known], [x]) for x in (qkv, qkv.double()))
    assert not kernel[1][known:].any()
    no_worse(kernel, eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_packed_tower(tower: TextTower, activation: str, dtype: torch.dtype, device: torch.device) -> None:
    packing = pack_texts(torch.tensor([6, 0, 2, 3]), 8, 17)
    packing = type(packing)(*(tensor.to(device) for tensor in packing))
    torch.manual_seed(0)
    embeddings = torch.randn(17, 4)
    state = [embeddings, *(weight.float() for weight in tower.tensors())]
    given = [tensor.to(device) for tensor in state]

    def run(impl: str, kind: torch.dtype) -> list[Tensor]:
        def function(x: Tensor, *weights: Tensor) -> Tensor:
            numbers = iter(weights)
            layers = tuple(type(layer)(*(next(numbers) for _ in layer)) for layer in tower.layers)
            names = ("positional_embedding", "ln_final_weight", "ln_final_bias", "projection")
            others = {name: next(numbers) for name in names}
            model = replace(tower, layers=layers, activation=activation, **others)  # type: ignore[arg-type]
            with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16 and kind != torch.float64):
                return encode_packed(model, x, packing, impl=impl)

        return outcome(function, [tensor.to(kind) for tensor in given])

    found = [run("triton", torch.float32), run("eager", torch.float32), run("eager", torch.float64)]
    no_worse_in_norm(*found, slack=0.01 if dtype == torch.bfloat16 else 1e-5)


def test_what_the_kernel_does_not_take_stays_in_torch() -> None:
    from pspg.kernels.text_tower.triton.packed_attention import can_attend

    qkv = torch.zeros(2, 3 * 256, dtype=torch.bfloat16)
    for number, most in ((80, 64), (86, 64), (90, 128), (100, 128)):
        with record(number):
            assert can_attend(qkv, 2, most)
            assert not can_attend(qkv, 2, most + 1)
            assert not can_attend(qkv, 1, most)
            assert not can_attend(qkv.float(), 2, most)


def test_it_is_a_proper_operator(device: torch.device) -> None:
    from pspg.kernels.text_tower.triton import packed_attention

    qkv = torch.randn(5, 3 * 16, device=device).bfloat16().requires_grad_()
    torch.library.opcheck(packed_attention._attention, (qkv, torch.tensor([1, 4], device=device), 2, 3))
