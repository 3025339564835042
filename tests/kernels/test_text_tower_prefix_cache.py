"""The prefix cache changes nothing: features and gradients against 77 tokens a prompt, float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pspg.kernels.spcl import pair_features
from pspg.kernels.text_tower import Prompts, PromptTemplate, TextTower, encode_prompts
from pspg.kernels.text_tower.block_operations import RaggedPairs
from pspg.kernels.text_tower.blocks import token_bytes
from pspg.kernels.text_tower.eager import EAGER, attend

MakeTemplate = Callable[..., PromptTemplate]


def lengths_of(classes: int, named: bool) -> list[int] | None:
    return [1 + (3 * c) % 4 for c in range(classes)] if named else None


def compare(run: Callable[[str], Tensor], prompts: Tensor) -> None:
    """Features and the gradient of a random combination of them."""
    results = []
    for impl in ("reference", "eager"):
        features = run(impl)
        weights = torch.linspace(-1, 1, features.numel(), dtype=torch.float64).view(features.shape)
        (gradient,) = torch.autograd.grad((features * weights).sum(), prompts)
        results.append((features.detach(), gradient))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("named", [False, True], ids=["whole", "prefix"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("classes", "n"), [(1, 1), (2, 4), (5, 16), (14, 3), (3, 34)])
def test_equals_the_reference(
    tower: TextTower, make_template: MakeTemplate, named: bool, layers: int, classes: int, n: int
) -> None:
    torch.manual_seed(layers)
    tower = replace(tower, layers=(tower.layers * 2)[:layers])
    template = make_template(classes, lengths_of(classes, named))
    prompts = torch.randn(2, classes, n, 4, dtype=torch.float64, requires_grad=True)
    compare(lambda impl: pair_features(tower, Prompts(prompts[0], template), impl=impl), prompts)
    for memory in (None, 1):
        compare(
            lambda impl, memory=memory: encode_prompts(tower, template, prompts, memory=memory, impl=impl)[0], prompts
        )  # type: ignore[misc]


def test_gelu(tower: TextTower, make_template: MakeTemplate) -> None:
    torch.manual_seed(0)
    tower, template = replace(tower, activation="gelu"), make_template(3)
    prompts = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    compare(lambda impl: pair_features(tower, Prompts(prompts[0], template), impl=impl), prompts)
    compare(lambda impl: encode_prompts(tower, template, prompts, impl=impl).features, prompts)


def test_a_tower_that_trains_is_not_given_to_the_implementation_that_drops_its_gradients(
    tower: TextTower, make_template: MakeTemplate
) -> None:
    tower = replace(tower, projection=tower.projection.clone().requires_grad_())
    prompts, template = torch.randn(1, 2, 2, 4, dtype=torch.float64), make_template(2)
    for run in (
        lambda impl: encode_prompts(tower, template, prompts, impl=impl).features,
        lambda impl: pair_features(tower, Prompts(prompts[0], template), impl=impl),
    ):
        assert torch.equal(run("auto"), run("reference"))
        run("auto").sum().backward()
        assert tower.projection.grad is not None
        with pytest.raises(ValueError, match="freeze"):
            run("eager")
        with torch.no_grad():
            run("eager")


def test_refuses_what_does_not_fit(tower: TextTower, make_template: MakeTemplate) -> None:
    with pytest.raises(ValueError, match="suffix"):
        encode_prompts(tower, make_template(2), torch.zeros(1, 3, 2, 4).double())
    with pytest.raises(ValueError, match="triton"):
        encode_prompts(tower, make_template(3), torch.zeros(1, 3, 2, 4).double(), impl="triton")


def wide_tower(width: int = 64, layers: int = 3) -> TextTower:
    """Float32, wide enough that activations outweigh everything else."""
    torch.manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape)

    w, one = width, torch.ones(width)
    from pspg.kernels.text_tower import TextLayer

    block = TextLayer(
        *(one, weight(w), weight(3 * w, w), weight(3 * w), weight(w, w), weight(w)),
        *(one, weight(w), weight(4 * w, w), weight(4 * w), weight(w, 4 * w), weight(w)),
    )
    return TextTower((block,) * layers, weight(77, w), one, weight(w), weight(w, 16), heads=2)


def kept_bytes(run: Callable[[], Any], exclude: TextTower) -> int:
    """Bytes of the different tensors that backward of `run` keeps, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in exclude.tensors()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_what_backward_keeps_stays_within_the_estimate(impl: str) -> None:
    operations = EAGER
    if impl == "triton":
        pytest.importorskip("triton")
        from pspg.kernels.text_tower.triton import TRITON as operations
    tower, n, classes = wide_tower(), 8, 10
    template = PromptTemplate(
        torch.randn(64), torch.zeros(64), torch.randn(classes, 1, 64), torch.zeros(classes).long(), (0,) * 10, 0
    )
    prompts = torch.randn(2, classes, n, 64, requires_grad=True)
    tokens = 2 * classes * (n + 2)
    kept = kept_bytes(lambda: encode_prompts(tower, template, prompts, impl=impl), tower)
    assert 0.5 * tokens * token_bytes(tower, operations) < kept <= tokens * token_bytes(tower, operations)
    grouped = kept_bytes(lambda: encode_prompts(tower, template, prompts, impl=impl, memory=1), tower)
    assert grouped < kept / 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype: torch.dtype) -> None:
    """The error against float64 is of the size of that dtype's, and gradients come back in the prompts' own dtype."""
    tower, n, classes = wide_tower(), 4, 5
    template = PromptTemplate(
        torch.randn(64), torch.zeros(64), torch.randn(classes, 1, 64), torch.zeros(classes).long(), (0,) * 5, 0
    )
    prompts = torch.randn(2, classes, n, 64, requires_grad=True)
    exact = encode_prompts(
        tower.to(torch.float64), template.to(torch.float64), prompts.double(), impl="reference"
    ).features
    with torch.autocast("cpu", dtype):
        eager, literal = (
            encode_prompts(tower, template, prompts, impl=impl).features for impl in ("eager", "reference")
        )
    assert eager.dtype == dtype
    error, usual = ((features - exact).abs() for features in (eager, literal))
    assert error.mean() <= 2 * usual.mean()
    (gradient,) = torch.autograd.grad(eager.float().sum(), prompts)
    (expected,) = torch.autograd.grad(exact.sum(), prompts)
    assert gradient.dtype == torch.float32
    assert (gradient - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("lengths", [None, [2, 2, 3, 1]], ids=["whole", "prefix"])
def test_attention_on_a_cpu_has_the_gradients_of_autograd(lengths: list[int] | None) -> None:
    """Also of prefixes that no sequence continues."""
    torch.manual_seed(0)
    first = torch.tensor([1, 1, 2, 4])
    sizes = {"prefixes": 6, "suffixes": 4, "prefix_tokens": 3, "suffix_tokens": 2}
    pairs = RaggedPairs(
        first, torch.arange(4), **sizes, prefix_lengths=None if lengths is None else torch.tensor(lengths)
    )
    qkv = torch.randn(4, 2, 12, dtype=torch.float64, requires_grad=True)
    prefix_kv = torch.randn(6, 3, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for out in (EAGER.attention(2, qkv, prefix_kv, pairs), attend(2, qkv, prefix_kv[first], pairs.mask)):
        found.append([out.detach(), *torch.autograd.grad((out * out.detach().sin()).sum(), [qkv, prefix_kv])])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
