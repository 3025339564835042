"""Metadata that is made for all chunks at once is that of every chunk alone; chunks are equal and fill the GPU."""

from __future__ import annotations

import pytest
import torch

from pspg.kernels.foreach import cast_all, copy_all
from pspg.kernels.pairs import PairSelection
from pspg.kernels.spcl.chunked_loss import chunk_size
from pspg.kernels.text_tower import pair_chunks
from pspg.kernels.text_tower.block_operations import RaggedPairs

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 4, 6, 100])
@pytest.mark.parametrize("part", [(0, 36), (5, 23), (7, 8)])
def test_chunks_are_as_if_made_alone(size: int, part: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_chunks, "_BLOCK", 3)
    selection, lengths = PairSelection(9).part(*part), torch.arange(36) % 5
    first, second, _ = selection.to(CPU)
    suffix_index = (second * 7) % 18  # any suffix, as with class names of several lengths
    sizes = {"suffixes": 18, "prefix_tokens": 3, "suffix_tokens": 2}
    whole = pair_chunks.PairChunks(first, suffix_index, size, prefixes=9, prefix_lengths=lengths[: len(first)], **sizes)
    low = selection.rows[0]
    for number, chunk in enumerate(selection.chunks(size)):
        rows, pairs = (low + chunk.low, low + chunk.high), slice(chunk.start, chunk.stop)
        got = whole.chunk(number, *rows)
        alone = RaggedPairs(
            first[pairs] - rows[0],
            suffix_index[pairs],
            prefixes=rows[1] - rows[0],
            prefix_lengths=lengths[pairs],
            **sizes,
        )
        for name in ("prefix_index", "suffix_index", "prefix_lengths", "starts", "mask"):
            assert torch.equal(getattr(got, name), getattr(alone, name)), name
        assert all(map(torch.equal, got.by_suffix, alone.by_suffix))
        assert (got.prefixes, got.suffixes) == (alone.prefixes, alone.suffixes)


def test_chunks_are_equal_and_within_the_memory() -> None:
    assert chunk_size(0, 17, 5, None) == 1
    assert chunk_size(7, 17, 0, None) == 1
    assert chunk_size(10, 17, 100, None) == 10
    assert chunk_size(10, 17, 9, None) == 5
    for pairs in (91, 378, 5778, 18528):
        for most in (1, 30, 367, 571, 3000):
            for processors in (None, 108, 132):
                size = chunk_size(pairs, 17, most, processors)
                count = -(-pairs // size)
                assert size <= most
                assert pairs > (count - 1) * size
                assert count * size - pairs < count


def test_chunks_fill_the_processors() -> None:
    """Row tiles of 128 times two column tiles of 256, the narrowest product, in whole waves of 132 processors."""
    for pairs in (5778, 18528):
        tiles = 2 * -(-chunk_size(pairs, 17, 571, 132) * 17 // 128)
        assert 0.95 * 132 < tiles <= 132
    assert chunk_size(378, 17, 571, 132) == 378


def test_lists_of_tensors_are_cast_in_groups() -> None:
    tensors = [torch.tensor([1.5, 2.0]), torch.tensor([3.0], dtype=torch.bfloat16), torch.tensor(4.0).double()]
    cast = cast_all(tensors, [torch.bfloat16, torch.bfloat16, torch.float32])
    assert [tensor.dtype for tensor in cast] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert cast[1] is tensors[1]
    assert [tensor.tolist() for tensor in cast] == [[1.5, 2.0], [3.0], 4.0]
    copy_all([], [])
    with pytest.raises(ValueError, match="zip"):
        copy_all(tensors, [])
