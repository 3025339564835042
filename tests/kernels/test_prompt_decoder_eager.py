"""The eager decoder against the literal one: outputs and every gradient, float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pspg.kernels.prompt_decoder import decode, folding
from pspg.kernels.prompt_decoder.folding import cross_fold_is_cheaper, feedback_fold_is_cheaper
from pspg.kernels.prompt_decoder.gru import parameter_shapes


def make(classes: int, images: int, count: int, seed: int = 0) -> tuple[list[dict[str, Tensor]], Tensor, Tensor]:
    """Decoders of D = 6 and H = 4, class features and context, float64, all of them wanting gradients."""
    generator = torch.Generator().manual_seed(seed)
    decoders = [
        {
            name: (0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
            for name, shape in parameter_shapes(6, 4).items()
        }
        for _ in range(count)
    ]
    features, context = (
        torch.randn(rows, 6, generator=generator, dtype=torch.float64).requires_grad_() for rows in (classes, images)
    )
    return decoders, features, context


def outcome(
    impl: str,
    decoders: list[dict[str, Tensor]],
    features: Tensor,
    context: Tensor,
    n: int,
    inputs: list[Tensor],
    **options: Tensor,
) -> list[Tensor]:
    """Outputs, and the gradients of a combination of them."""
    outputs = decode(decoders, features, context, prompt_length=n, heads=2, impl=impl, **options)
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=torch.float64).view(outputs.shape)
    return [outputs.detach(), *torch.autograd.grad((outputs * weights).sum(), inputs)]


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("classes", [1, 2, 5, 14, 31, 33])
@pytest.mark.parametrize("images", [1, 7])
@pytest.mark.parametrize("n", [1, 4, 16])
@pytest.mark.parametrize("count", [1, 2])
def test_equals_the_reference(classes: int, images: int, n: int, count: int) -> None:
    decoders, features, context = make(classes, images, count, seed=n)
    inputs = [features, context, *(tensor for one in decoders for tensor in one.values())]
    expected, got = (outcome(impl, decoders, features, context, n, inputs) for impl in ("reference", "eager"))
    same(got, expected)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("feedback", [False, True])
def test_every_way_of_folding_is_exact(monkeypatch: pytest.MonkeyPatch, cross: bool, feedback: bool) -> None:
    monkeypatch.setattr(folding, "cross_fold_is_cheaper", lambda **_: cross)
    monkeypatch.setattr(folding, "feedback_fold_is_cheaper", lambda **_: feedback)
    decoders, features, context = make(3, 4, 2)
    inputs = [features, context, *(tensor for one in decoders for tensor in one.values())]
    expected, got = (outcome(impl, decoders, features, context, 3, inputs) for impl in ("reference", "eager"))
    same(got, expected)


def test_the_cheaper_way_at_production_shapes() -> None:
    """H = 512 in 8 heads: cross-attention folds up to about 73 images; feedback folds with many rows."""
    rows = 108 * 16
    assert cross_fold_is_cheaper(images=64, rows=rows, hidden=512, heads=8)
    assert not cross_fold_is_cheaper(images=74, rows=rows, hidden=512, heads=8)
    assert feedback_fold_is_cheaper(rows=108 * 15, width=1024, hidden=512)
    assert not feedback_fold_is_cheaper(rows=14 * 15, width=1024, hidden=512)


@pytest.mark.parametrize("wanted", ["features", "context", "one weight", "one decoder"])
def test_gradients_of_some_inputs(wanted: str) -> None:
    decoders, features, context = make(3, 2, 2)
    inputs = {
        "features": [features],
        "context": [context],
        "one weight": [decoders[1]["gru.weight_hh"]],
        "one decoder": list(decoders[0].values()),
    }[wanted]
    kept = {id(tensor) for tensor in inputs}

    def only(tensor: Tensor) -> Tensor:
        return tensor if id(tensor) in kept else tensor.detach()

    expected = outcome("reference", decoders, features, context, 3, inputs)
    some = [{name: only(tensor) for name, tensor in one.items()} for one in decoders]
    same(outcome("eager", some, only(features), only(context), 3, inputs), expected)


def test_gradcheck() -> None:
    decoders, features, context = make(2, 2, 1)
    names = list(decoders[0])

    def run(features: Tensor, context: Tensor, *weights: Tensor) -> Tensor:
        return decode([dict(zip(names, weights, strict=True))], features, context, prompt_length=2, heads=2)

    assert torch.autograd.gradcheck(run, (features, context, *decoders[0].values()))


def test_records_nothing_without_gradients() -> None:
    decoders, features, context = make(3, 2, 2)
    expected = decode(decoders, features, context, prompt_length=3, heads=2)
    with torch.no_grad():
        outputs = decode(decoders, features, context, prompt_length=3, heads=2)
    assert not outputs.requires_grad
    torch.testing.assert_close(outputs, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("images", [1, 7])
def test_autocast(dtype: torch.dtype, images: int) -> None:
    """No further from float64 than the reference under the same autocast; gradients in the inputs' own dtype."""
    decoders, features, context = make(5, images, 2)
    inputs = [features, context, *(tensor for one in decoders for tensor in one.values())]
    exact = outcome("reference", decoders, features, context, 4, inputs)
    single = [tensor.detach().float().requires_grad_() for tensor in inputs]
    names = list(decoders[0])
    weights = [dict(zip(names, single[2 + i * len(names) :], strict=False)) for i in range(2)]
    with torch.autocast("cpu", dtype):
        literal, got = (outcome(impl, weights, single[0], single[1], 4, single) for impl in ("reference", "eager"))
    assert got[0].dtype == dtype
    assert all(tensor.dtype == torch.float32 for tensor in got[1:])
    for one, other, right in zip(got, literal, exact, strict=True):
        assert (one - right).norm() <= 2 * (other - right).norm() + 0.02 * right.norm()


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize(("classes", "images"), [(1, 3), (5, 7), (14, 64)])
def test_images_that_do_not_count_are_as_if_they_were_not_there(impl: str, classes: int, images: int) -> None:
    decoders, features, context = make(classes, images, 2)
    parameters = [tensor for one in decoders for tensor in one.values()]
    present = torch.arange(images) % 3 != 1
    some = context.detach()[present].requires_grad_()
    expected = outcome("reference", decoders, features, some, 4, [features, some, *parameters])
    got = outcome(impl, decoders, features, context, 4, [features, context, *parameters], present=present)
    assert not got[2][~present].any()
    got[2] = got[2][present]
    same(got, expected)
