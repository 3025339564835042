"""Compiled kernels at production shapes against float64. Triton's interpreter is far too slow for these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pspg.kernels.asymmetric_loss import asymmetric_loss
from pspg.kernels.batch_norm import Norm, batch_norm, batch_norm_twice
from pspg.kernels.pair_loss import pair_loss
from pspg.kernels.pairs import pair_indices
from pspg.kernels.prompt_decoder import decode
from pspg.kernels.spcl import ImageBatch, spcl
from pspg.kernels.text_tower import Packing, PromptTemplate, TextLayer, TextTower, encode_prompts, pack_texts
from pspg.kernels.text_tower.block_operations import BlockOperations, RaggedPairs, Stream
from pspg.kernels.text_tower.blocks import finish, project
from pspg.kernels.text_tower.eager import EAGER
from pspg.kernels.text_tower.packed import trained
from tests.oracle import no_worse, no_worse_in_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
B, C, N, D, W, LAYERS, HEADS = 64, 108, 16, 1024, 512, 12, 8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def outcome(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of their sum under fixed random weights."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, weights)]


def rand(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    return (std * torch.randn(shape, device="cuda")).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])  # fp32 attends in torch
def test_attention(dtype: torch.dtype) -> None:
    from pspg.kernels.text_tower.triton import TRITON

    torch.manual_seed(0)
    first, second = (part[:367] for part in pair_indices(C, torch.device("cuda")))
    given = [rand(367, N + 1, 3 * W, dtype=dtype), rand(5, N + 1, 2 * W, dtype=dtype)]

    def run(operations: BlockOperations, tensors: list[Tensor]) -> list[Tensor]:
        pairs = RaggedPairs(first, second, prefixes=5, suffixes=C, prefix_tokens=N + 1, suffix_tokens=N + 1)
        return outcome(lambda *t: operations.attention(HEADS, *t, pairs), tensors)

    no_worse(run(TRITON, given), run(EAGER, given), run(EAGER, [t.double() for t in given]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pooled_attention(dtype: torch.dtype) -> None:
    from pspg.kernels.text_tower.triton import TRITON

    torch.manual_seed(0)
    first, second = (part[:367] for part in pair_indices(C, torch.device("cuda")))
    shapes = (HEADS, 367, W), (5, N + 1, W), (367, N + 1, W)
    given = [rand(*shape, dtype=dtype) for shape in shapes]

    def run(operations: BlockOperations, tensors: list[Tensor]) -> list[Tensor]:
        pairs = RaggedPairs(first, second, prefixes=5, suffixes=C, prefix_tokens=N + 1, suffix_tokens=N + 1)
        return outcome(lambda *t: operations.pooled_attention(*t, pairs, W**-0.5), tensors)

    no_worse(run(TRITON, given), run(EAGER, given), run(EAGER, [t.double() for t in given]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("choice", ["library", "activation", "folded"])
@pytest.mark.parametrize("sequences", [56, 367])
def test_products_of_a_block(sequences: int, choice: Any, dtype: torch.dtype) -> None:
    """All of a block but its attention, and the projection of the next: over tokens of 28 classes, and of a chunk."""
    from pspg.kernels.text_tower.triton import TRITON, products

    tower, given = make_tower(), [rand(sequences * (N + 1), W, dtype=dtype) for _ in range(2)]

    def run(operations: BlockOperations, tensors: list[Tensor]) -> list[Tensor]:
        cast = tower.to(dtype).to(tensors[0].dtype)
        layer = cast.layers[0]

        def function(x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
            stream, qkv = project(cast, operations, layer, finish(cast, operations, layer, Stream(x), attended))
            return stream.total(), qkv

        return outcome(function, tensors)

    with products.use(choice):
        no_worse(run(TRITON, given), run(EAGER, given), run(EAGER, [t.double() for t in given]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pair_loss(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = [rand(C * (C - 1) // 2, D, dtype=dtype), rand(B, D, std=0.2), torch.tensor(1.5, device="cuda")]
    labels = (torch.rand(B, C, device="cuda") < 0.05).float()

    def run(impl: str, tensors: list[Tensor]) -> list[Tensor]:
        return outcome(lambda *t: pair_loss(*t, labels, impl=impl), tensors)

    no_worse(run("triton", given), run("reference", given), run("reference", [t.double() for t in given]))


def test_asymmetric_loss() -> None:
    torch.manual_seed(0)
    given, labels = [rand(B, 2, C, std=5)], torch.randint(-1, 2, (B, C), device="cuda")

    def run(impl: str, tensors: list[Tensor]) -> list[Tensor]:
        return outcome(lambda x: asymmetric_loss(x, labels, impl=impl), tensors)

    no_worse(run("triton", given), run("reference", given), run("reference", [t.double() for t in given]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [64, 77])
def test_packed_attention(tokens: int, dtype: torch.dtype) -> None:
    """Reports of one token up to all, and rows that fill up; torch's where the kernels take no text so long."""
    packing = Packing(*(tensor.cuda() for tensor in pack_texts(torch.arange(B) * 7 % tokens, tokens, B * tokens)))
    known = int(packing.ends[-1]) + 1

    def run(impl: str, tensors: list[Tensor]) -> list[Tensor]:
        attend = trained(impl, tensors[0])[1]
        return outcome(lambda qkv: attend(HEADS, qkv, packing)[:known], tensors)

    torch.manual_seed(0)
    given = [rand(B * tokens, 3 * W, dtype=dtype)]
    no_worse(run("triton", given), run("eager", given), run("eager", [given[0].double()]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "side", "added"), [(32, 112, False), (256, 56, True), (2048, 7, True)])
def test_batch_norm(channels: int, side: int, added: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual = (rand(B, channels, side, side, dtype=dtype).to(memory_format=torch.channels_last) for _ in range(2))
    given = [x + 3 * rand(channels, 1, 1, dtype=dtype), residual, rand(channels), rand(channels)]

    def run(impl: str, tensors: list[Tensor]) -> list[Tensor]:
        kept = *(torch.ones_like(tensors[2]) for _ in range(2)), torch.tensor(0, device="cuda")

        def function(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            norm = Norm(weight, bias, *kept)
            if added:
                return batch_norm_twice(x, norm, residual, impl=impl)
            return (batch_norm(x, norm, impl=impl) + 0 * residual,)

        return [*outcome(function, tensors), *kept[:2]]

    no_worse(run("triton", given), run("eager", given), run("reference", [t.double() for t in given]))


def decoder_case(device: str, classes: int, images: int, width: int, hidden: int) -> tuple[list[str], list[Tensor]]:
    """Names of a decoder's parameters; class features, context and the parameters of two decoders."""
    torch.manual_seed(0)
    decoders = [decoder_weights(device, width, hidden) for _ in range(2)]
    names = list(decoders[0])
    features, context = (torch.randn(rows, width, device=device) for rows in (classes, images))
    return names, [features, context, *(decoder[name] for decoder in decoders for name in names)]


def decoder_weights(device: str, width: int, hidden: int) -> dict[str, Tensor]:
    """Random parameters of a GRU decoder under their published names."""
    modules = {
        "gru": nn.GRUCell(width, hidden),
        "encoder_proj": nn.Linear(width, hidden),
        "self_attention.self_attention": nn.MultiheadAttention(hidden, HEADS),
        "self_attention.fc": nn.Linear(hidden, hidden),
        "self_attention.layer_norm": nn.LayerNorm(hidden),
        "encoder_attention": nn.MultiheadAttention(hidden, HEADS),
        "fc": nn.Linear(hidden, width),
    }
    parameters = [
        (f"{part}.{name}", value) for part, module in modules.items() for name, value in module.named_parameters()
    ]
    return {name: value.detach().to(device) for name, value in parameters}


def run_decoders(names: list[str], leaves: Sequence[Tensor], impl: str, n: int) -> Tensor:
    features, context, *weights = leaves
    half = len(weights) // 2
    decoders = [dict(zip(names, part, strict=True)) for part in (weights[:half], weights[half:])]
    return decode(decoders, features, context, prompt_length=n, heads=HEADS, impl=impl)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoders(dtype: torch.dtype) -> None:
    """As near to float64 as torch in the same dtype, in norms: sixteen steps amplify single roundings."""
    names, given = decoder_case("cuda", C, B, D, 512)

    def run(impl: str, tensors: list[Tensor]) -> list[Tensor]:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            return outcome(lambda *leaves: run_decoders(names, leaves, impl, N), tensors)

    exact = run("reference", [t.double() for t in given])
    slack = 1e-5 if dtype == torch.float32 else 0.01
    no_worse_in_norm(run("triton", given), run("eager", given), exact, slack)


def test_decoders_run_inside_a_captured_graph() -> None:
    """Forward and backward of all steps, replayed on other inputs, give what direct calls give."""
    names, given = decoder_case("cuda", 14, 7, 64, 64)
    leaves = [tensor.clone().requires_grad_() for tensor in given]

    def step() -> list[Tensor]:
        outputs = run_decoders(names, leaves, "triton", 4)
        return [outputs, *torch.autograd.grad(outputs.square().sum(), leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.add_(0.1 * torch.randn_like(leaf))
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(found, step(), strict=True))


def make_tower() -> TextTower:
    torch.manual_seed(0)
    std = W**-0.5

    def layer() -> TextLayer:
        ones, zeros = torch.ones(W, device="cuda"), torch.zeros(W, device="cuda")
        attention = rand(3 * W, W, std=std), torch.zeros(3 * W, device="cuda"), rand(W, W, std=std), zeros
        hidden = rand(4 * W, W, std=std), torch.zeros(4 * W, device="cuda"), rand(W, 4 * W, std=std / 2), zeros
        return TextLayer(ones, zeros, *attention, ones, zeros, *hidden)

    layers = tuple(layer() for _ in range(LAYERS))
    ones, zeros = torch.ones(W, device="cuda"), torch.zeros(W, device="cuda")
    return TextTower(layers, rand(77, W, std=0.01), ones, zeros, rand(W, D, std=std), heads=HEADS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_to_losses(dtype: torch.dtype) -> None:
    """Twelve layers, 14 classes, single prompts and SPCL: as near to float64 as torch in the same dtype, in norms."""
    tower, classes = make_tower(), 14
    names = rand(classes, 1, W, std=0.02)
    template = PromptTemplate(
        names[0, 0], names[1, 0], names, torch.zeros_like(names[:, 0, 0]).long(), (0,) * classes, 0
    )
    given = [rand(2, classes, N, W, std=0.1), rand(B, D, std=0.2), torch.tensor(1.5, device="cuda")]
    labels = (torch.rand(B, classes, device="cuda") < 0.2).float()

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        def function(prompts: Tensor, vectors: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            towers, templates = tower.to(prompts.dtype), template.to(prompts.dtype)
            with torch.autocast("cuda", dtype, enabled=dtype == torch.bfloat16):
                found = encode_prompts(towers, templates, prompts, keep_cache=True, impl=impl)
                loss = spcl(towers, found.prompts, ImageBatch(vectors, scale, labels), memory=2**26, impl=impl)
            return loss, found.features

        return outcome(function, [t.to(torch.float64) for t in given] if dtype == torch.float64 else given)

    slack = 0.01 if dtype == torch.bfloat16 else 1e-5
    no_worse_in_norm(run("triton", dtype), run("eager", dtype), run("eager", torch.float64), slack)
