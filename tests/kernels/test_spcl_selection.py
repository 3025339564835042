"""SPCL of parts of the pairs: losses and gradients add up to the whole, and so does the work."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pspg.kernels.spcl import sample_pairs, spcl
from pspg.kernels.spcl.chunked_loss import row_major_chunks
from pspg.kernels.text_tower import Frame, TextTower, encode_prompts, number_of_pairs, pair_indices

MakeFrame = Callable[..., Frame]
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
    tower: TextTower, make_frame: MakeFrame, target: str, sampled: bool, impl: str, kept: bool
) -> None:
    """Also parts that cut a row, a part without pairs, and prefixes that single prompts share."""
    frame, y, tensors = make_frame(6, [1, 2, 1, 3, 1, 2]), labels(6), inputs(6)
    sample = sample_pairs(y, 4, torch.Generator().manual_seed(0)) if sampled else None
    pairs = number_of_pairs(6) if sample is None else len(sample.first)

    def found(part: tuple[int, int] | None) -> list[Tensor]:
        prefixes = encode_prompts(tower, frame, tensors[0][None], prefixes=True).prefixes if kept else None
        options = {"target": target, "reduction": "mean", "sample": sample, "prefixes": prefixes}
        return outcome(spcl(tower, frame, *tensors, y, part=part, memory=TINY, impl=impl, **options), tensors)

    cuts = [0, 2, 2, 7, pairs]
    parts = [found(part) for part in pairwise(cuts)]
    for one, other in zip(map(sum, zip(*parts, strict=True)), found(None), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_part_that_is_no_part_is_refused(tower: TextTower, make_frame: MakeFrame) -> None:
    for part in ((-1, 2), (2, 1), (0, 4)):
        with pytest.raises(ValueError, match="of 3 pairs"):
            spcl(tower, make_frame(3), *inputs(3), labels(3), part=part)


@pytest.mark.parametrize("part", [(0, 10), (3, 3), (1, 9), (4, 5), (0, 1)])
def test_chunks_of_a_part_cover_it(part: tuple[int, int]) -> None:
    first, _ = pair_indices(5)
    chunks = list(row_major_chunks(5, 2, part))
    assert [pair for start, stop, _, _ in chunks for pair in range(start, stop)] == list(range(*part))
    for start, stop, low, high in chunks:
        assert (low, high) == (first[start], first[stop - 1] + 1)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_work_of_a_part_is_its_share_of_the_pairs(tower: TextTower, make_frame: MakeFrame, ranks: int) -> None:
    classes = 12
    frame, y, tensors = make_frame(classes), labels(classes), inputs(classes)
    prefixes = encode_prompts(tower, frame, tensors[0][None], prefixes=True).prefixes

    def work(part: tuple[int, int] | None) -> int:
        with FlopCounterMode(display=False) as counter:
            spcl(tower, frame, *tensors, y, part=part, prefixes=prefixes, memory=10 * TINY, impl="eager")
        return counter.get_total_flops() - constant

    constant = 0
    constant = work((0, 0))  # first-layer projections of the tails, the same on every rank
    pairs = number_of_pairs(classes)
    cuts = [pairs * rank // ranks for rank in range(ranks + 1)]
    parts, whole, one = [work(part) for part in pairwise(cuts)], work(None), work((0, 1))
    assert sum(parts) == whole
    assert max(parts) <= whole / ranks + one
