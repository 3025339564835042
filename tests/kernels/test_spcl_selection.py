"""SPCL of parts of the pairs: losses and gradients add up to the whole, and so does the work."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pspg.kernels.pairs import PairSample, PairSelection, pad_sample
from pspg.kernels.spcl import ImageBatch, sample_pairs, spcl
from pspg.kernels.text_tower import Prompts, PromptTemplate, TextTower, encode_prompts

MakeTemplate = Callable[..., PromptTemplate]
CPU = torch.device("cpu")
TINY = 4000
"""Bytes: a few pairs a chunk of the tests' tower."""


def inputs(classes: int) -> list[Tensor]:
    torch.manual_seed(classes)
    shapes = [(classes, 3, 4), (5, 3), ()]
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def outcome(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, tensors)]


def labels(classes: int) -> Tensor:
    return torch.randint(-1, 2, (5, classes), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("target", ["batch", "sample"])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("kept", [False, True])
def test_parts_add_up(
    tower: TextTower, make_template: MakeTemplate, target: str, sampled: bool, impl: str, kept: bool
) -> None:
    """Also parts that cut a row, a part without pairs, and prefixes that single prompts share."""
    template, y, tensors = make_template(6, [1, 2, 1, 3, 1, 2]), labels(6), inputs(6)
    pairs = PairSelection(6, sample_pairs(y, 4, torch.Generator().manual_seed(0)) if sampled else None)
    vectors, *images = tensors

    def found(pairs: PairSelection) -> list[Tensor]:
        prompts = Prompts(vectors, template)
        if kept:
            prompts = encode_prompts(tower, template, vectors[None], keep_cache=True).prompts
        options: dict[str, Any] = {"target": target, "reduction": "mean", "memory": TINY, "impl": impl}
        return outcome(spcl(tower, prompts, ImageBatch(*images, y), pairs=pairs, **options), tensors)

    cuts = [0, 2, 2, 7, len(pairs)]
    parts = [found(pairs.part(*part)) for part in pairwise(cuts)]
    for one, other in zip(map(sum, zip(*parts, strict=True)), found(pairs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_work_of_a_part_is_its_share_of_the_pairs(tower: TextTower, make_template: MakeTemplate, ranks: int) -> None:
    classes = 12
    template, y, tensors = make_template(classes), labels(classes), inputs(classes)
    vectors, *images = tensors
    prompts = encode_prompts(tower, template, vectors[None], keep_cache=True).prompts

    def work(pairs: PairSelection) -> int:
        with FlopCounterMode(display=False) as counter:
            spcl(tower, prompts, ImageBatch(*images, y), pairs=pairs, memory=10 * TINY, impl="eager")
        return counter.get_total_flops() - constant

    pairs, constant = PairSelection(classes), 0
    constant = work(pairs.part(0, 0))  # first-layer projections of the suffixes, the same on every rank
    cuts = [len(pairs) * rank // ranks for rank in range(ranks + 1)]
    parts, whole = [work(pairs.part(*part)) for part in pairwise(cuts)], work(pairs)
    one = work(pairs.part(0, 1))
    assert sum(parts) == whole
    assert max(parts) <= whole / ranks + one


@pytest.mark.parametrize("target", ["batch", "sample"])
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_pairs_of_weight_0_change_nothing(
    tower: TextTower, make_template: MakeTemplate, target: str, impl: str
) -> None:
    """Loss and gradients of a padded sample, whose chunks do not know their rows, are those of the sample."""
    template, y, (vectors, *images) = make_template(6, [1, 2, 1, 3, 1, 2]), labels(6), inputs(6)
    sample = sample_pairs(y, 4, torch.Generator().manual_seed(0))

    def found(pairs: PairSelection) -> list[Tensor]:
        prompts = encode_prompts(tower, template, vectors[None], keep_cache=True).prompts
        options: dict[str, Any] = {"target": target, "reduction": "mean", "memory": TINY, "impl": impl}
        return outcome(spcl(tower, prompts, ImageBatch(*images, y), pairs=pairs, **options), [vectors, *images])

    padded = found(PairSelection(6, pad_sample(sample, len(sample.first) + 7, 6)))
    for one, other in zip(padded, found(PairSelection(6, sample)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kept", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.parametrize("names", [None, [1, 2, 1, 3, 1, 2]], ids=["", "prefix"])
def test_rows_that_the_host_does_not_know(
    tower: TextTower, make_template: MakeTemplate, impl: str, names: list[int] | None, kept: bool
) -> None:
    """A padded part whose rows lie in a window is the part itself; only the window's prefixes are encoded."""
    template, y, (vectors, *images) = make_template(6, names), labels(6), inputs(6)
    sample = sample_pairs(y, 4, torch.Generator().manual_seed(0))
    start, stop = int((sample.first == 0).sum()), len(sample.first)
    low, high = PairSelection(6, sample).part(start, stop).rows
    assert low > 0
    own = PairSample(*(tensor[start:stop] for tensor in sample))
    padded = pad_sample(own, stop - start + 3, 6, (low, high))
    assert padded.first.min() >= low
    assert padded.first.max() < high

    def found(pairs: PairSelection) -> list[Tensor]:
        prompts = Prompts(vectors, template)
        if kept:
            prompts = encode_prompts(tower, template, vectors[None], keep_cache=True).prompts
        options: dict[str, Any] = {"target": "batch", "reduction": "mean", "memory": TINY, "impl": impl}
        return outcome(spcl(tower, prompts, ImageBatch(*images, y), pairs=pairs, **options), [vectors, *images])

    whole = found(PairSelection(6, sample).part(start, stop))
    for one, other in zip(found(PairSelection(6, padded, window=torch.arange(low, high))), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_sample_need_not_begin_with_the_first_class(tower: TextTower, make_template: MakeTemplate) -> None:
    """One chunk of pairs of the last classes only."""
    template, y, (vectors, *images) = make_template(6), labels(6), inputs(6)
    sample = PairSample(torch.tensor([2, 3]), torch.tensor([4, 5]), torch.ones(2))

    def found(impl: str) -> list[Tensor]:
        prompts = encode_prompts(tower, template, vectors[None], keep_cache=True).prompts
        pairs = PairSelection(6, sample)
        return outcome(spcl(tower, prompts, ImageBatch(*images, y), pairs=pairs, impl=impl), [vectors, *images])

    for one, other in zip(found("eager"), found("reference"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
