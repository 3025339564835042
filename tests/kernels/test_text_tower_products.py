"""Products with LayerNorm, QuickGELU, their derivatives and residuals in the epilogue, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pspg.kernels import launch
from pspg.kernels.spcl import ImageBatch, spcl
from pspg.kernels.text_tower import PromptTemplate, TextLayer, TextTower, encode_prompts
from pspg.kernels.text_tower.block_operations import BlockOperations, Stream
from pspg.kernels.text_tower.eager import EAGER
from pspg.kernels.text_tower.folding import FOLDED, fold
from tests.oracle import no_worse, no_worse_in_norm

pytest.importorskip("triton", reason="needs triton")
from pspg.kernels.text_tower.triton import TRITON, products

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "PARTS": 4, "num_warps": 4, "num_stages": 1}
WIDE = {**SMALL, "BLOCK_N": 64, "PARTS": 8}
SMALLEST = {**SMALL, "BLOCK_N": 16, "PARTS": 2}
KERNELS = ("linear", "add_linear", "activation_backward", "norm_backward")


@pytest.fixture(params=["pointers", "descriptors", "wide descriptors", "small descriptors"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of all sizes, made small, several a program, with operands of either kind."""
    small_tiles(monkeypatch, "descriptors" in request.param)
    size: products.Tiles = next((name for name in products.TILE_NAMES if name in request.param), "narrow")
    with products.use(tiles=size):
        yield


def small_tiles(monkeypatch: pytest.MonkeyPatch, descriptors: bool) -> None:
    for name in KERNELS:
        monkeypatch.setitem(launch.CONFIGS, name, {80: SMALL})
        monkeypatch.setitem(launch.CONFIGS, f"{name}_wide", {80: WIDE})
        monkeypatch.setitem(launch.CONFIGS, f"{name}_small", {80: SMALLEST})
    for name in ("product", "product_wide", "product_small"):
        monkeypatch.setitem(launch.CONFIGS, name, {80: {"DESCRIPTORS": int(descriptors), "PROGRAMS": 3}})


def normal(*shape: int, dtype: torch.dtype, device: torch.device, around: float = 0.0, std: float = 1.0) -> Tensor:
    return (around + std * torch.randn(shape, device=device)).to(dtype)


def make_layer(width: int, hidden: int, dtype: torch.dtype, device: torch.device) -> TextLayer:
    def weight(*shape: int, around: float = 0.0) -> Tensor:
        std = shape[1] ** -0.5 if len(shape) > 1 else 0.2
        return normal(*shape, dtype=dtype, device=device, around=around, std=std)

    w, m = width, hidden
    return TextLayer(
        *(weight(w, around=1), weight(w), weight(3 * w, w), weight(3 * w), weight(w, w), weight(w)),
        *(weight(w, around=1), weight(w), weight(m, w), weight(m), weight(w, m), weight(w)),
    )


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 8, 8), (35, 24, 72), (7, 5, 33)])
def test_each_product(rows: int, depth: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    layer = make_layer(depth, columns, dtype, device)
    a, wide, gradient = (normal(rows, n, dtype=dtype, device=device) for n in (depth, columns, depth))
    residual, attended = (normal(rows, depth, dtype=dtype, device=device, around=0.5) for _ in range(2))

    x, moments = products.add_linear(attended, layer.out_proj_weight, layer.out_proj_bias, residual)
    eager = residual + F.linear(attended, layer.out_proj_weight, layer.out_proj_bias)
    exact = residual.double() + F.linear(*(t.double() for t in (attended, layer.out_proj_weight, layer.out_proj_bias)))
    no_worse([x], [eager], [exact])

    out, activated, _ = products.linear(a, layer.fc_weight, None, None, layer.fc_bias, 0.0, "both")
    eager = F.linear(a, layer.fc_weight, layer.fc_bias)
    exact = F.linear(*(t.double() for t in (a, layer.fc_weight, layer.fc_bias)))
    no_worse([out], [eager], [exact])
    no_worse([activated], [quick_gelu(eager)], [quick_gelu(exact)])
    assert torch.equal(products.linear(a, layer.fc_weight, None, None, layer.fc_bias, 0.0, "out")[0], out)

    # Statistics are those of the result as it is stored.
    fc = fold(layer.ln_2_weight, layer.ln_2_bias, layer.fc_weight, layer.fc_bias)
    hidden, activated, statistics = products.linear(x, fc.weight, moments, fc.sums, fc.bias, 1e-5, "both")
    variance, mean = torch.var_mean(x.double(), dim=1, correction=0)
    torch.testing.assert_close(
        statistics.double(), torch.stack([mean, (variance + 1e-5).rsqrt()]), rtol=2e-6, atol=1e-6
    )
    norm = layer.ln_2_weight, layer.ln_2_bias
    eager = F.linear(F.layer_norm(x, (depth,), *norm), layer.fc_weight, layer.fc_bias)
    exact = F.linear(
        F.layer_norm(x.double(), (depth,), *(t.double() for t in norm)),
        *(t.double() for t in (layer.fc_weight, layer.fc_bias)),
    )
    no_worse([hidden], [eager], [exact])

    d, sums = products.activation_backward(gradient, layer.proj_weight, wide, fc.sums, fc.bias)
    exact = quick_gelu_backward(gradient.double() @ layer.proj_weight.double(), wide.double())
    no_worse([d], [quick_gelu_backward(gradient @ layer.proj_weight, wide)], [exact])
    expected = torch.stack([d.double() @ fc.sums.double(), (d.double() * (wide.double() - fc.bias)).sum(1)])
    torch.testing.assert_close(sums.sum(1).double(), expected, rtol=1e-5, atol=1e-5 * columns)
    alone, nothing = products.activation_backward(gradient, layer.proj_weight, wide, None, None)
    assert torch.equal(alone, d)
    assert nothing.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_sizes_of_tiles_give_the_same_bits(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tiles(monkeypatch, descriptors=True)
    torch.manual_seed(0)
    rows, width, hidden = 35, 24, 136
    layer = make_layer(width, hidden, dtype, device)
    x, attended, gradient = (normal(rows, width, dtype=dtype, device=device) for _ in range(3))
    fc = fold(layer.ln_2_weight, layer.ln_2_bias, layer.fc_weight, layer.fc_bias)

    def run(tiles: products.Tiles) -> tuple[Tensor, ...]:
        with products.use(tiles=tiles):
            middle, moments = products.add_linear(attended, layer.out_proj_weight, layer.out_proj_bias, x)
            found = products.linear(middle, fc.weight, moments, fc.sums, fc.bias, 1e-5, "both")
            d, sums = products.activation_backward(gradient, layer.proj_weight, found[0], fc.sums, fc.bias)
        return middle, moments, *found, d, sums.sum(1)

    *narrow, narrow_sums = run("narrow")
    sizes: tuple[products.Tiles, ...] = ("wide", "small")
    for size in sizes:
        *other, sums = run(size)
        assert all(torch.equal(one, another) for one, another in zip(narrow, other, strict=True))
        torch.testing.assert_close(narrow_sums, sums, rtol=1e-5, atol=1e-4)  # in another order


@pytest.mark.parametrize(
    ("architecture", "rows", "depth", "columns", "tile"),
    [
        (90, 8194, 2048, 512, 256),  # one round of 132 processors instead of two
        (90, 8194, 512, 2048, 128),  # a short inner length
        (90, 3673, 2048, 512, 128),  # narrow tiles are one round, too
        (90, 953, 2048, 512, 64),  # 32 narrow tiles
        (90, 953, 512, 2048, 128),  # 128 of them
        (80, 8194, 2048, 512, 128),
        (80, 953, 2048, 512, 64),
    ],
)
def test_tiles_are_wide_where_that_saves_rounds_and_small_where_processors_would_idle(
    architecture: int, rows: int, depth: int, columns: int, tile: int
) -> None:
    a, weight, residual, bias = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in ((rows, depth), (columns, depth), (rows, columns), (columns,))
    )
    with launch.record(architecture) as launches:
        products.run_add_linear(a, weight, bias, residual)
        with products.use(tiles="narrow"):
            products.run_add_linear(a, weight, bias, residual)
        with products.use(tiles="wide"):
            products.run_add_linear(a, weight, bias, residual)
        with products.use(tiles="small"):
            products.run_add_linear(a, weight, bias, residual)
    widest = 256 if architecture >= 90 else 128
    assert [one.arguments["BLOCK_N"] for one in launches] == [tile, 128, widest, 64]


@pytest.mark.parametrize("name", KERNELS)
def test_tiles_are_of_parts_of_one_width(name: str) -> None:
    """Moments are of parts, and whoever reads them need not know the tile."""
    for architecture in (80, 90, 100):
        with launch.record(architecture):
            narrow, wide, small = (
                launch.configuration(f"{name}{size}", torch.device("meta")) for size in ("", "_wide", "_small")
            )
        if name == "add_linear":
            assert len({tile["BLOCK_N"] // tile["PARTS"] for tile in (narrow, wide, small)}) == 1
        assert (narrow["BLOCK_M"], narrow["BLOCK_K"]) == (wide["BLOCK_M"], wide["BLOCK_K"])


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def quick_gelu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    gate = torch.sigmoid(1.702 * x)
    return gradient * gate * (1 + 1.702 * x * (1 - gate))


def block(operations: BlockOperations, tower: TextTower, given: list[Tensor], layer: TextLayer) -> list[Tensor]:
    """Two halves of a block and the projection of the next, values and gradients."""
    dtype = layer.fc_weight.dtype
    x, attended, *weights = (t.to(dtype) for t in given)
    leaves = [x.requires_grad_(), attended.requires_grad_()]
    found = operations.products(tower, x)
    assert found is not None
    stream = found.finish(tower, layer, Stream(x), attended)
    stream, qkv = found.project(tower, layer, stream)
    outputs = [stream.total(), qkv]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, weights)]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 20])
def test_a_folded_block(rows: int, dtype: torch.dtype, tower: TextTower, device: torch.device) -> None:
    torch.manual_seed(0)
    width, hidden = 40, 72
    layer = make_layer(width, hidden, dtype, device)
    given = [normal(rows, n, dtype=dtype, device=device) for n in (width, width, width, 3 * width)]
    eager = EAGER._replace(products=lambda tower, x: FOLDED)

    def run(operations: BlockOperations, dtype: torch.dtype) -> list[Tensor]:
        cast = TextLayer(*(weight.to(dtype) for weight in layer))
        return block(operations, tower, [t.clone() for t in given], cast)

    with products.use("folded"):
        no_worse(run(TRITON, dtype), run(eager, dtype), run(eager, torch.float64))


@pytest.mark.parametrize("size", ["wide", "small"])
def test_backward_takes_the_tiles_of_its_forward(size: products.Tiles, tower: TextTower, device: torch.device) -> None:
    """Also where it runs elsewhere, as a benchmark's does."""
    layer = make_layer(16, 40, torch.float32, device)
    x, attended = (torch.randn(9, 16, device=device, requires_grad=True) for _ in range(2))
    with products.use("folded", tiles=size):
        stream = TRITON.products(tower, x).finish(tower, layer, Stream(x), attended)
        out = TRITON.mlp(tower, layer, stream.x)
    with launch.replaced() as asked:
        out.sum().backward()
    assert {f"norm_backward_{size}", f"activation_backward_{size}"} <= asked


@pytest.mark.parametrize("choice", ["activation", "folded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_to_losses(
    choice: products.Choice,
    dtype: torch.dtype,
    tower: TextTower,
    make_template: Callable[..., PromptTemplate],
    device: torch.device,
) -> None:
    """The whole text side, single prompts and pairs of classes with names, whatever products it is made of."""
    if device.type == "cuda":
        pytest.skip("the fixture's tower lies on the CPU; test_on_gpu.py has it full size")
    torch.manual_seed(0)
    template = make_template(3, [2, 1, 3])
    given = torch.randn(2, 3, 2, 4), torch.randn(3, 3), torch.tensor(0.5)
    labels = torch.randint(-1, 2, (3, 3))

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype if dtype == torch.float64 else torch.float32).requires_grad_() for t in given]
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            towers, templates = (part.to(leaves[0].dtype) for part in (tower, template))
            found = encode_prompts(towers, templates, leaves[0], keep_cache=True, impl=impl)
            loss = spcl(towers, found.prompts, ImageBatch(*leaves[1:], labels), impl=impl)
        weights = torch.linspace(-1, 1, found.features.numel()).view(found.features.shape)
        total = loss + (found.features * weights).sum()
        return [loss.detach(), found.features.detach(), *torch.autograd.grad(total, leaves)]

    eager, exact = run("eager", dtype), run("eager", torch.float64)
    with products.use(choice):
        no_worse_in_norm(run("triton", dtype), eager, exact, 0.01 if dtype == torch.bfloat16 else 1e-6)


def test_an_mlp_keeps_its_hidden_layer_alone(tower: TextTower, device: torch.device) -> None:
    layer = make_layer(8, 24, torch.float32, device)
    kept: list[torch.Size] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t)
    with products.use("activation"), hooks:
        TRITON.mlp(tower, layer, torch.randn(5, 3, 8, device=device, requires_grad=True))
    assert kept == [torch.Size([15, 24])]


def test_another_activation_takes_the_library(tower: TextTower, device: torch.device) -> None:
    with products.use("folded"):
        assert TRITON.products(tower, torch.zeros(1, 4, device=device)) is not None
        assert TRITON.products(replace(tower, activation="gelu"), torch.zeros(1, 4, device=device)) is None


def test_the_choice_is_by_architecture_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHOICES", {80: ((0, "library"),), 90: ((0, "activation"), (9, "folded"))})
    x = torch.empty(3, 3, 16, dtype=torch.bfloat16, device="meta")
    chosen = []
    for architecture in (80, 90, 100):
        with launch.record(architecture):
            chosen.append((products.choose(x[0]), products.choose(x), products.choose(x.float())))
    assert chosen == [("library",) * 3, *[("activation", "folded", "library")] * 2]


def test_they_are_proper_operators(device: torch.device) -> None:
    torch.manual_seed(0)
    a, w, v = (torch.randn(shape, device=device) for shape in ((3, 8), (16, 8), (8, 16)))
    hidden, bias, narrow = (
        torch.randn(3, 16, device=device),
        torch.randn(16, device=device),
        torch.randn(8, device=device),
    )
    _, moments = products.add_linear(hidden, v, narrow, a)
    _, _, statistics = products.linear(a, w, moments, bias, bias, 1e-5, "both")
    d, sums = products.activation_backward(a, v, hidden, bias, bias)
    tests = ("test_schema", "test_faketensor")
    for operator, arguments in (
        (products.add_linear, (hidden, v, narrow, a)),
        (products.linear, (a, w, moments, bias, bias, 1e-5, "both")),
        (products.linear, (a, w, None, None, bias, 0.0, "out")),
        (products.activation_backward, (a, v, hidden, bias, bias)),
        (products.activation_backward, (a, v, hidden, None, None)),
        (products.norm_backward, (d, w, sums, statistics, a, a)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=tests)


def test_results_do_not_vary(tower: TextTower, device: torch.device) -> None:
    torch.manual_seed(0)
    layer = make_layer(16, 40, torch.float32, device)
    given = [torch.randn(9, n, device=device) for n in (16, 16, 16, 48)]
    with products.use("folded"):
        runs = [block(TRITON, tower, [t.clone() for t in given], layer) for _ in range(3)]
    assert all(torch.equal(one, other) for again in runs[1:] for one, other in zip(again, runs[0], strict=True))
