"""The kernels of the frozen text tower against float64, with all gradients, one by one and composed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pspg.kernels.pairs import PairSelection, pair_indices
from pspg.kernels.spcl import ImageBatch, pair_features, sample_pairs, spcl
from pspg.kernels.text_tower import Prompts, PromptTemplate, TextTower, encode_prompts
from pspg.kernels.text_tower.block_operations import RaggedPairs, Stream
from pspg.kernels.text_tower.eager import EAGER
from tests.oracle import no_worse, no_worse_in_norm

pytest.importorskip("triton", reason="needs triton")
from pspg.kernels.text_tower.triton import (
    TRITON,
    add_norm,
    attention,
    gather,
    pooled_attention,
    pooled_norm,
    quick_gelu,
)
from pspg.kernels.text_tower.triton.partial_sums import empty_partial, sum_partial

MakeTemplate = Callable[..., PromptTemplate]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RAW = ("test_schema", "test_faketensor")
"""checks of an operator without autograd of its own"""


def gradients(out: Tensor | tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of their sum under fixed random weights."""
    outputs = [out] if isinstance(out, Tensor) else list(out)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, weights)]


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def ragged(
    prefix_index: Tensor,
    suffix_index: Tensor,
    prefixes: int,
    suffixes: int,
    prefix_tokens: int,
    suffix_tokens: int,
    prefix_lengths: Tensor | None = None,
    pooled: Tensor | None = None,
) -> RaggedPairs:
    return RaggedPairs(
        *(prefix_index, suffix_index),
        prefixes=prefixes,
        suffixes=suffixes,
        prefix_tokens=prefix_tokens,
        suffix_tokens=suffix_tokens,
        prefix_lengths=prefix_lengths,
        pooled=pooled,
    )


def prefix_rows(counts: list[int], device: torch.device) -> Tensor:
    """Prefix index of sequences of which counts[i] continue prefix i."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("counts", "suffix_tokens", "prefix_tokens", "heads", "head_width"),
    [
        ([1], 1, 1, 1, 4),
        ([3, 0, 2], 5, 4, 2, 16),
        ([1, 19], 17, 17, 1, 24),  # more suffixes than a program takes, blocks with one token over
        ([0, 4], 3, 18, 3, 8),
    ],
)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_attention(
    counts: list[int],
    suffix_tokens: int,
    prefix_tokens: int,
    heads: int,
    head_width: int,
    padded: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    torch.manual_seed(0)
    first, width = prefix_rows(counts, device), heads * head_width
    projected = torch.randn(len(first), suffix_tokens, 3 * width, device=device).to(dtype)
    prefix = torch.randn(len(counts), prefix_tokens, 2 * width, device=device).to(dtype)
    lengths = 1 + first % prefix_tokens if padded else None

    def run(operations: Any, dtype: torch.dtype) -> list[Tensor]:
        pairs = ragged(first, first, len(counts), 1, prefix_tokens, suffix_tokens, lengths)
        leaves = leaves_of(projected.to(dtype), prefix.to(dtype))
        return gradients(operations.attention(heads, *leaves, pairs), leaves)

    no_worse(run(TRITON, dtype), run(EAGER, dtype), run(EAGER, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", [80, 90])
def test_attention_in_tiles_of_architectures(
    architecture: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One suffix a tile or several, and a last tile that is not full."""
    monkeypatch.setattr("pspg.kernels.launch.architecture", lambda device: architecture)
    torch.manual_seed(0)
    first = prefix_rows([7, 0, 1], torch.device("cpu"))
    pairs = ragged(first, first, 3, 1, 9, 17)
    given = torch.randn(8, 17, 96).to(dtype), torch.randn(3, 9, 64).to(dtype)

    def run(operations: Any, dtype: torch.dtype = dtype) -> list[Tensor]:
        leaves = leaves_of(*(tensor.to(dtype) for tensor in given))
        return gradients(operations.attention(2, *leaves, pairs), leaves)

    no_worse(run(TRITON), run(EAGER), run(EAGER, torch.float64))


@pytest.mark.parametrize("sign", [-1, 1])
def test_attention_of_large_scores(sign: int, device: torch.device) -> None:
    """All scores of a query near -580 or 580: neither they nor what is masked may overflow."""
    torch.manual_seed(0)
    first = prefix_rows([3], device)
    pairs = ragged(first, first, 1, 1, 3, 5)
    offset = torch.tensor([12, sign * 12, 0], device=device).repeat_interleave(16)
    given = torch.randn(3, 5, 48, device=device) + offset, torch.randn(1, 3, 32, device=device) + offset[16:]

    def run(operations: Any, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        leaves = leaves_of(*(tensor.to(dtype) for tensor in given))
        return gradients(operations.attention(1, *leaves, pairs), leaves)

    no_worse_in_norm(run(TRITON), run(EAGER), run(EAGER, torch.float64), 1e-3)


@pytest.mark.parametrize("splits", [1, 3, 35])
def test_what_programs_leave_is_summed_in_float32_and_rounded_once(splits: int, device: torch.device) -> None:
    torch.manual_seed(0)
    like = torch.empty(3, 5, 40, dtype=torch.bfloat16, device=device)
    partial = empty_partial(splits, like)
    assert partial.dtype == (torch.bfloat16 if splits == 1 else torch.float32)
    partial.copy_(torch.randn(partial.shape, device=device))
    expected = partial.double().sum(0)
    found = sum_partial(partial, like.dtype)
    assert found.shape == like.shape
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5)


def test_attention_to_a_constant_prefix(device: torch.device) -> None:
    """Without a gradient of the prefix, that of the suffixes is the same."""
    torch.manual_seed(0)
    first = prefix_rows([4, 1], device)
    pairs = ragged(first, first, 2, 1, 2, 3)
    projected, prefix = torch.randn(5, 3, 48, device=device), torch.randn(2, 2, 32, device=device)
    (some,) = leaves_of(projected)
    both = leaves_of(projected, prefix)
    alone = gradients(TRITON.attention(1, some, prefix, pairs), [some])
    every = gradients(TRITON.attention(1, *both, pairs), both)
    assert all(torch.equal(one, other) for one, other in zip(alone, every, strict=False))


POOLED = [
    ([1], 1, 1, 1, 5),
    ([3, 0, 2], 5, 4, 2, 72),
    ([1, 10], 17, 18, 8, 16),  # more sequences of a prefix than a program sums, blocks with tokens over
]
"""sequences of each prefix, tokens of suffix and prefix, heads, width"""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("counts", "suffix_tokens", "prefix_tokens", "heads", "width"), POOLED)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_pooled_attention(
    counts: list[int],
    suffix_tokens: int,
    prefix_tokens: int,
    heads: int,
    width: int,
    padded: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    torch.manual_seed(0)
    first = prefix_rows(counts, device)
    query, prefix, own = (
        torch.randn(shape, device=device).to(dtype)
        for shape in (
            (heads, len(first), width),
            (len(counts), prefix_tokens, width),
            (len(first), suffix_tokens, width),
        )
    )
    lengths = 1 + first % prefix_tokens if padded else None
    pooled = torch.arange(len(first), device=device) % suffix_tokens if padded else None

    def run(operations: Any, dtype: torch.dtype) -> list[Tensor]:
        pairs = ragged(first, first, len(counts), 1, prefix_tokens, suffix_tokens, lengths, pooled)
        leaves = leaves_of(*(t.to(dtype) for t in (query, prefix, own)))
        return gradients(operations.pooled_attention(*leaves, pairs, width**-0.5), leaves)

    no_worse(run(TRITON, dtype), run(EAGER, dtype), run(EAGER, torch.float64))


def test_pooled_attention_to_a_constant_prefix(device: torch.device) -> None:
    """Without a gradient of the prefix the others are the same."""
    torch.manual_seed(0)
    first = prefix_rows([4, 1], device)
    pairs = ragged(first, first, 2, 1, 2, 3)
    query, prefix, own = (torch.randn(shape, device=device) for shape in ((2, 5, 24), (2, 2, 24), (5, 3, 24)))
    some, every = leaves_of(query, own), leaves_of(query, prefix, own)
    alone = gradients(TRITON.pooled_attention(some[0], prefix, some[1], pairs, 0.2), some)
    out, d_query, _, d_own = gradients(TRITON.pooled_attention(*every, pairs, 0.2), every)
    assert all(torch.equal(one, other) for one, other in zip(alone, (out, d_query, d_own), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["x", "x and delta"])
@pytest.mark.parametrize(
    ("sequences", "tokens", "before", "pooled"), [(1, 1, 0, None), (3, 4, 0, [2, 0, 3]), (2, 3, 1, None)]
)
def test_pooled_norm(
    sequences: int,
    tokens: int,
    before: int,
    pooled: list[int] | None,
    given: str,
    dtype: torch.dtype,
    tower: TextTower,
    device: torch.device,
) -> None:
    """One token a sequence of the stream and of its LayerNorm, and the whole LayerNorm; rows may come before."""
    torch.manual_seed(0)
    shape = (before + sequences * tokens, 20) if before else (sequences, tokens, 20)
    parts = [(1 + torch.randn(shape, device=device)).to(dtype) for _ in range(2 if "delta" in given else 1)]
    weight, bias = (torch.randn(20, device=device).to(dtype) for _ in range(2))
    rows = torch.arange(sequences, device=device)
    where = None if pooled is None else torch.tensor(pooled, device=device)

    def run(operations: Any, dtype: torch.dtype) -> list[Tensor]:
        pairs = ragged(torch.zeros_like(rows), rows, 1, sequences, 1, tokens, None, where)
        leaves = leaves_of(*(t.to(dtype) for t in parts))
        out = operations.pooled_norm(tower, Stream(*leaves), weight.to(dtype), bias.to(dtype), pairs)
        assert [o.shape for o in out] == [(sequences, 20), (sequences, 20), shape]
        return gradients(out, leaves)

    no_worse(run(TRITON, dtype), run(EAGER, dtype), run(EAGER, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 5, 20), (7, 96)])
def test_add_norm(shape: tuple[int, ...], dtype: torch.dtype, tower: TextTower, device: torch.device) -> None:
    torch.manual_seed(0)
    x, delta = (2 + torch.randn(shape, device=device)).to(dtype), torch.randn(shape, device=device).to(dtype)
    weight, bias = (torch.randn(shape[-1], device=device).to(dtype) for _ in range(2))

    def run(operations: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = leaves_of(x.to(dtype), delta.to(dtype))
        return gradients(operations.add_norm(tower, *leaves, weight.to(dtype), bias.to(dtype)), leaves)

    no_worse(run(TRITON, dtype), run(EAGER, dtype), run(EAGER, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_mlp(activation: Any, dtype: torch.dtype, tower: TextTower, device: torch.device) -> None:
    torch.manual_seed(0)
    y = torch.randn(5, 3, 4, device=device).to(dtype)

    def run(operations: Any, dtype: torch.dtype) -> list[Tensor]:
        layer = tower.to(dtype).layers[0]
        layer = type(layer)(*(weight.to(device) for weight in layer))
        leaves = leaves_of(y.to(dtype))
        return gradients(operations.mlp(replace(tower, activation=activation), layer, *leaves), leaves)

    short = run(EAGER, dtype)
    no_worse(run(TRITON, dtype), short, run(EAGER, torch.float64))


def test_mlp_keeps_the_hidden_layer_and_no_other_activation(tower: TextTower) -> None:
    if torch.cuda.is_available():
        pytest.skip("the fixture's tower lies on the CPU")
    short = tower.to(torch.float32)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor.shape), tensor)[1], lambda t: t):
        TRITON.mlp(short, short.layers[0], torch.randn(5, 3, 4, requires_grad=True))
    assert [shape for shape in kept if shape[0] == 5] == [torch.Size([5, 3, 8])]


def test_quick_gelu_of_large_numbers(device: torch.device) -> None:
    x = torch.tensor([-1e4, -100.0, -1.0, 0.0, 1.0, 100.0, 1e4], device=device)
    (leaf,) = leaves_of(x)
    out, d = gradients(quick_gelu._quick_gelu(leaf), [leaf])
    exact = x.double().requires_grad_()
    right, d_right = gradients(exact * torch.sigmoid(1.702 * exact), [exact])
    torch.testing.assert_close(out.double(), right, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(d.double(), d_right, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_table(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    first, second = (part.to(device) for part in pair_indices(6))
    table = torch.randn(6, 3, 400, device=device).to(dtype)

    def run(operations: Any, dtype: torch.dtype) -> list[Tensor]:
        pairs = ragged(first, second, 6, 6, 1, 1)
        leaves = leaves_of(table.to(dtype))
        return gradients(operations.gather_suffix(*leaves, pairs), leaves)

    no_worse(run(TRITON, dtype), run(EAGER, dtype), run(EAGER, torch.float64))


def test_they_are_proper_operators(device: torch.device) -> None:
    torch.manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, requires_grad=True)

    x, delta, weight, bias = tensor(3, 8), tensor(3, 8), torch.ones(8, device=device), torch.zeros(8, device=device)
    torch.library.opcheck(add_norm.add_norm_forward, (x, delta, weight, bias, 1e-5))
    torch.library.opcheck(quick_gelu._quick_gelu, (x,))
    first, starts = prefix_rows([2, 1], device), torch.tensor([0, 2, 3], device=device)
    order = torch.tensor([2, 0, 1], device=device)
    torch.library.opcheck(add_norm.add_norm_forward, (x.detach(), None, weight, bias, 1e-5), test_utils=RAW)
    torch.library.opcheck(
        pooled_norm.pooled_norm_backward,
        (*(t.detach() for t in (x[:1], x[1:2], delta, x)), torch.ones(2, 3, device=device), weight, None, 2),
        test_utils=RAW,
    )
    query, prefix, own = (tensor(*shape).detach() for shape in ((2, 3, 8), (2, 2, 8), (3, 1, 8)))
    lse = torch.ones(3, 2, device=device)
    for rest in ((None, None), (first + 1, torch.zeros_like(first))):
        pairs = first, *rest
        torch.library.opcheck(pooled_attention._attention, (query, prefix, own, *pairs, 0.3), test_utils=RAW)
        for wanted in (False, True):
            arguments = (query, query, prefix, own, *pairs, starts, lse, 0.3, wanted)
            torch.library.opcheck(pooled_attention._attention_backward, arguments, test_utils=RAW)
    torch.library.opcheck(gather._gather, (tensor(2, 4), first[order], order, starts))
    for lengths in (None, first + 1):
        torch.library.opcheck(attention._attention, (tensor(3, 2, 24), tensor(2, 2, 16), starts, lengths, 2))


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the fixture's tower lies on the CPU; test_on_gpu.py has it full size"
)
@pytest.mark.parametrize(
    ("classes", "n", "images", "named", "memory", "dtype"),
    [
        (2, 1, 1, False, None, torch.float32),
        (3, 2, 3, True, None, torch.float32),
        (3, 2, 3, True, None, torch.bfloat16),
        (4, 2, 3, False, 8000, torch.float32),
    ],
)
def test_prompts_to_losses(
    tower: TextTower,
    make_template: MakeTemplate,
    classes: int,
    n: int,
    images: int,
    named: bool,
    memory: int | None,
    dtype: torch.dtype,
) -> None:
    """Single prompts, SPCL that continues their prefix cache, and PCL, in one chunk and in several."""
    template = make_template(classes, [1 + c % 3 for c in range(classes)] if named else None)
    torch.manual_seed(0)
    prompts, vectors, scale = torch.randn(2, classes, n, 4), torch.randn(images, 3), torch.tensor(0.5)
    labels = torch.randint(-1, 2, (images, classes))

    def run(impl: str, dtype: torch.dtype = dtype) -> list[Tensor]:
        leaves = leaves_of(*(t.double() if dtype == torch.float64 else t for t in (prompts, vectors, scale)))
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            both, *rest = leaves
            towers, templates = (part.to(both.dtype) for part in (tower, template))
            found = encode_prompts(towers, templates, both, keep_cache=True, memory=memory, impl=impl)
            images = ImageBatch(*rest, labels)
            loss = spcl(towers, found.prompts, images, memory=memory, impl=impl)
            alone = Prompts(both[0], templates)
            other = spcl(towers, alone, images, target="sample", reduction="mean", impl=impl)
        return gradients((loss, other, found.features), leaves)

    slack = 0.01 if dtype == torch.bfloat16 else 1e-6
    no_worse_in_norm(run("triton"), run("eager"), run("eager", torch.float64), slack)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the fixture's tower lies on the CPU; test_on_gpu.py has it full size"
)
def test_sampled_pairs_and_pair_features(tower: TextTower, make_template: MakeTemplate) -> None:
    torch.manual_seed(0)
    short, template = tower.to(torch.float32), make_template(5)
    labels = (torch.rand(4, 5) < 0.3).long()
    sample = sample_pairs(labels, 3, torch.Generator().manual_seed(0))
    given = (torch.randn(5, 2, 4), torch.randn(4, 3), torch.tensor(0.5))

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = leaves_of(*(t.to(dtype) for t in given))
        towers, templates = short.to(dtype), template.to(dtype)
        prompts, pairs = Prompts(leaves[0], templates), PairSelection(5, sample)
        loss = spcl(towers, prompts, ImageBatch(leaves[1], leaves[2], labels), pairs=pairs, impl=impl)
        features = pair_features(towers, prompts, impl=impl)
        return gradients((loss, features), leaves)

    kernel, eager, exact = run("triton", torch.float32), run("eager", torch.float32), run("eager", torch.float64)
    no_worse_in_norm(kernel, eager, exact, 1e-6)


def test_results_do_not_vary(device: torch.device) -> None:
    """Bit for bit the same, whatever order the programs run in."""
    torch.manual_seed(0)
    first = prefix_rows([3, 12], device)
    projected, prefix = torch.randn(15, 3, 48, device=device), torch.randn(2, 2, 32, device=device)
    runs = []
    for _ in range(3):
        pairs = ragged(first, first, 2, 1, 2, 3)
        leaves = leaves_of(projected, prefix)
        runs.append(gradients(TRITON.attention(1, *leaves, pairs), leaves))
    assert all(torch.equal(one, other) for again in runs[1:] for one, other in zip(again, runs[0], strict=True))
