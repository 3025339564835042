"""The pairs of a selection, of its parts and of its chunks."""

from __future__ import annotations

import pytest
import torch

from pspg.kernels.pairs import PairSample, PairSelection, balanced_parts, pad_sample, pair_indices

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("classes", [1, 2, 3, 9])
def test_chunks_cover_every_pair_once_with_its_rows(classes: int, size: int) -> None:
    first, second = pair_indices(classes)
    chunks = list(PairSelection(classes).chunks(size))
    assert [pair for start, stop, *_ in chunks for pair in range(start, stop)] == list(range(len(first)))
    assert all(stop - start <= size for start, stop, *_ in chunks)
    assert [(low, high) for *_, low, high in chunks] == [
        (int(first[start]), int(first[stop - 1]) + 1) for start, stop, *_ in chunks
    ]
    sample = PairSample(first, second, torch.ones(len(first)))
    assert list(PairSelection(classes, sample).chunks(size)) == chunks


@pytest.mark.parametrize("count", [3, 4, 11])
def test_a_padded_sample_has_the_same_weight_of_every_pair(count: int) -> None:
    first, second = torch.tensor([0, 1, 3]), torch.tensor([2, 4, 4])
    sample = pad_sample(PairSample(first, second, torch.tensor([1.0, 2.5, 4.0])), count, 5)
    assert [len(tensor) for tensor in sample] == [count] * 3
    assert (sample.first.diff() >= 0).all()
    assert (sample.first < sample.second).all()
    assert sample.second.max() < 5
    weights = torch.zeros(5, 5).index_put((sample.first, sample.second), sample.weights, accumulate=True)
    expected = torch.zeros(5, 5)
    expected[first, second] = torch.tensor([1.0, 2.5, 4.0])
    assert torch.equal(weights, expected)
    assert all((low, high) == (0, 5) for _, _, low, high in PairSelection(5, sample).chunks(2))
    with pytest.raises(ValueError, match="3 pairs are more than 2"):
        pad_sample(PairSample(first, second, torch.ones(3)), 2, 5)


def cost(pairs: PairSelection, part: tuple[int, int], row_cost: float) -> float:
    """Of a part: its pairs, and the rows from its first to its last."""
    low, high = pairs.part(*part).rows
    return part[1] - part[0] + row_cost * (high - low) if part[1] > part[0] else 0.0


@pytest.mark.parametrize("pieces", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("row_cost", [0.0, 1.0, 2.5])
def test_parts_cost_about_the_same(pieces: int, row_cost: float) -> None:
    """More parts than pairs, rows without pairs, and one class without any pair included."""
    sparse = PairSample(torch.tensor([3, 3, 9, 9, 9, 10]), torch.tensor([4, 5, 10, 11, 12, 12]), torch.ones(6))
    selections = [PairSelection(1), PairSelection(2), PairSelection(5), PairSelection(60), PairSelection(14, sparse)]
    for pairs in selections:
        parts = balanced_parts(pairs, pieces, row_cost)
        assert len(parts) == pieces
        assert (parts[0][0], parts[-1][1]) == (0, len(pairs))
        assert [stop for _, stop in parts[:-1]] == [start for start, _ in parts[1:]]
        assert all(start <= stop for start, stop in parts)
        whole = cost(pairs, (0, len(pairs)), row_cost)
        assert max(cost(pairs, part, row_cost) for part in parts) <= whole / pieces + row_cost + 1


def test_parts_of_equal_cost_are_not_of_equal_number() -> None:
    pairs, by_number = PairSelection(60), [(885 * part, 885 * part + 885) for part in range(2)]
    parts = balanced_parts(pairs, 2, 1.0)
    costs, before = ([cost(pairs, part, 1.0) for part in found] for found in (parts, by_number))
    assert max(costs) < max(before)
    assert parts[0][1] > 885
    with pytest.raises(ValueError, match="a part already"):
        balanced_parts(pairs.part(0, 3), 2, 1.0)
