"""SPCL of parts of the pairs: losses and gradients add up to the whole, and so does the work."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pspg.kernels.pairs import PairSample, PairSelection, pair_indices
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


def test_part_that_is_no_part_is_refused() -> None:
    for part in ((-1, 2), (2, 1), (0, 4)):
        with pytest.raises(ValueError, match="of 3 pairs"):
            PairSelection(3).part(*part)
    with pytest.raises(ValueError, match="of 2 pairs"):
        PairSelection(3).part(1, 3).part(0, 3)


def test_part_of_a_part() -> None:
    whole, part = PairSelection(5), PairSelection(5).part(2, 9).part(1, 4)
    assert len(part) == 3
    for some, every in zip(part.to(CPU)[:2], whole.to(CPU)[:2], strict=True):
        assert torch.equal(some, every[3:6])


@pytest.mark.parametrize("part", [(0, 10), (3, 3), (1, 9), (4, 5), (0, 1)])
def test_chunks_of_a_part_cover_it(part: tuple[int, int]) -> None:
    first, second = pair_indices(5)
    begin, end = part
    pairs = PairSelection(5).part(*part)
    chunks = list(pairs.chunks(2))
    assert [pair for start, stop, _, _ in chunks for pair in range(start, stop)] == list(range(end - begin))
    for start, stop, low, high in chunks:
        assert pairs.rows[0] + low == first[begin + start]
        assert pairs.rows[0] + high == first[begin + stop - 1] + 1
    sampled = PairSelection(5, PairSample(first, second, torch.ones(10))).part(*part)
    assert list(sampled.chunks(2)) == chunks
    assert sampled.rows == pairs.rows


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
