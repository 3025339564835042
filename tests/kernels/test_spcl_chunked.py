"""The pair loss chunk by chunk against the literal one, float64: loss and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pspg.kernels.spcl import ImageBatch, spcl
from pspg.kernels.text_tower import PromptTemplate, TextTower, encode_prompts
from tests.kernels.plain_spcl import loss_of
from tests.oracle import no_worse_in_norm

MakeTemplate = Callable[..., PromptTemplate]
TINY = 4000
"""Bytes: a few pairs a chunk of the tests' tower."""


def inputs(classes: int, n: int, images: int) -> list[Tensor]:
    torch.manual_seed(classes + n)
    shapes = [(classes, n, 4), (images, 3), ()]
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def outcome(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(3 * loss, tensors)]


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def make_labels(kind: str, images: int, classes: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randint(-1, 2, (images, classes), generator=generator)
    return {"mixed": mixed, "negative": torch.zeros_like(mixed), "positive": torch.ones_like(mixed)}[kind]


@pytest.mark.parametrize(
    ("classes", "n", "images", "labels"),
    [
        (1, 4, 7, "mixed"),
        (2, 1, 1, "mixed"),
        (5, 4, 7, "mixed"),
        (5, 16, 1, "positive"),
        (14, 1, 7, "negative"),
        (14, 4, 7, "mixed"),
    ],
)
@pytest.mark.parametrize("named", [False, True], ids=["whole", "prefix"])
def test_equals_the_reference(
    tower: TextTower, make_template: MakeTemplate, classes: int, n: int, images: int, labels: str, named: bool
) -> None:
    template = make_template(classes, [1 + c % 3 for c in range(classes)] if named else None)
    tensors, y = inputs(classes, n, images), make_labels(labels, images, classes)
    targets: tuple[Any, ...] = ("batch", "sample")
    for target, reduction in zip(targets, ("mean", "sum"), strict=True):
        options: dict[str, Any] = {"target": target, "reduction": reduction}
        expected = outcome(loss_of(tower, template, *tensors, y, **options, impl="reference"), tensors)
        for memory in (None, TINY):
            same(
                outcome(loss_of(tower, template, *tensors, y, **options, memory=memory, impl="eager"), tensors),
                expected,
            )


@pytest.mark.parametrize("target", ["batch", "sample"])
def test_a_list_longer_than_the_memory_goes_pair_by_pair(
    tower: TextTower, make_template: MakeTemplate, target: Any
) -> None:
    tensors, y, template = inputs(5, 2, 3), make_labels("mixed", 3, 5), make_template(5)
    whole, single = (loss_of(tower, template, *tensors, y, target=target, memory=m, impl="eager") for m in (2**30, 1))
    same(outcome(single, tensors), outcome(whole, tensors))


def test_of_equal_maxima_the_gradient_goes_to_one_image(tower: TextTower, make_template: MakeTemplate) -> None:
    """Twins among the images: whichever takes a pair's gradient, the loss and the sum over the twins are the same."""
    prompts, vectors, scale = inputs(5, 2, 3)
    y = make_labels("mixed", 6, 5)
    results = []
    for impl in ("reference", "eager"):
        twins = torch.cat([vectors, vectors]).detach().requires_grad_()
        loss = loss_of(tower, make_template(5), prompts, twins, scale, y, impl=impl)
        loss_, d_prompts, d_twins, d_scale = outcome(loss, [prompts, twins, scale])
        assert d_twins.any()
        results.append([loss_, d_prompts, d_twins.view(2, 3, 3).sum(0), d_scale])
    same(results[1], results[0])


def test_continues_the_prefix_cache(tower: TextTower, make_template: MakeTemplate) -> None:
    """Single prompts and pairs share a prefix: their gradients add up in it."""
    prompts, vectors, scale = inputs(6, 3, 4)
    y, template = make_labels("mixed", 4, 6), make_template(6)
    results = []
    for impl, memory in (("reference", None), ("eager", None), ("eager", TINY)):
        both = torch.stack([prompts, 0.3 * prompts + 1])
        found = encode_prompts(tower, template, both, keep_cache=True, memory=memory, impl=impl)
        assert (found.prompts.cache is None) == (impl == "reference")
        loss = spcl(tower, found.prompts, ImageBatch(vectors, scale, y), memory=memory, impl=impl)
        results.append(outcome(loss + found.features.square().sum(), [prompts, vectors, scale]))
    same(results[1], results[0])
    same(results[2], results[0])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs(tower: TextTower, make_template: MakeTemplate, wanted: tuple[int, ...]) -> None:
    tensors, y, template = inputs(4, 2, 3), make_labels("mixed", 3, 4), make_template(4)
    given = [tensor if number in wanted else tensor.detach() for number, tensor in enumerate(tensors)]
    every = outcome(loss_of(tower, template, *tensors, y, impl="eager"), tensors)
    some = outcome(loss_of(tower, template, *given, y, impl="eager"), [tensors[number] for number in wanted])
    same(some, [every[0], *(every[1 + number] for number in wanted)])


def test_gradcheck(tower: TextTower, make_template: MakeTemplate) -> None:
    tensors, y = inputs(3, 2, 2), torch.tensor([[1, -1, 1], [0, 1, 0]])
    template = make_template(3)
    assert torch.autograd.gradcheck(lambda *x: loss_of(tower, template, *x, y, memory=1, impl="eager"), tensors)


def test_records_nothing_without_gradients(tower: TextTower, make_template: MakeTemplate) -> None:
    tensors, y, template = inputs(4, 2, 3), make_labels("mixed", 3, 4), make_template(4)
    expected = loss_of(tower, template, *tensors, y, impl="eager")
    with torch.no_grad():
        loss = loss_of(tower, template, *tensors, y, impl="eager")
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)


def test_accumulates_and_scales_as_any_loss(tower: TextTower, make_template: MakeTemplate) -> None:
    """Two batches under a loss scale of 1024, summed in .grad."""
    tensors, template = inputs(4, 2, 3), make_template(4)
    batches = [make_labels("mixed", 3, 4), make_labels("positive", 3, 4)]
    for y in batches:
        (1024 * loss_of(tower, template, *tensors, y, memory=TINY, impl="eager")).backward()
    expected = [
        torch.autograd.grad(sum(loss_of(tower, template, *tensors, y, impl="reference") for y in batches), tensor)[0]
        for tensor in tensors
    ]
    same([tensor.grad / 1024 for tensor in tensors if tensor.grad is not None], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(tower: TextTower, make_template: MakeTemplate, dtype: torch.dtype) -> None:
    """Loss and gradients are float32, and as near to the exact ones as those of the literal one in that dtype."""
    tower, template = tower.to(torch.float32), make_template(6).to(torch.float32)
    tensors = [tensor.detach().float().requires_grad_() for tensor in inputs(6, 4, 5)]
    y = make_labels("mixed", 5, 6)
    exact = outcome(loss_of(tower, template, *tensors, y, impl="reference"), tensors)
    short = tensors[0].to(dtype), *tensors[1:]
    literal = outcome(loss_of(tower.to(dtype), template.to(dtype), *short, y, impl="reference"), tensors)
    with torch.autocast("cpu", dtype):
        eager = outcome(loss_of(tower, template, *tensors, y, memory=TINY, impl="eager"), tensors)
    assert all(got.dtype == torch.float32 for got in eager)
    no_worse_in_norm(eager, literal, exact, 0.01)
