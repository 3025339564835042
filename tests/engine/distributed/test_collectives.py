"""Shares of ranks, and what a group of one rank must compute: the same as torch without ranks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pspg.engine.distributed.batch_norm import SyncBatchNorm2d, convert_sync_batch_norm
from pspg.engine.distributed.collectives import all_gather_rows, in_order, local_slice, split
from pspg.engine.distributed.world import start
from pspg.engine.training.losses import contrastive_loss


@pytest.mark.parametrize("count", [0, 1, 5, 8, 13])
@pytest.mark.parametrize("pieces", [1, 2, 3, 8])
def test_pieces_cover_everything_once_and_are_even(count: int, pieces: int) -> None:
    found = split(count, pieces)
    assert [row for first, stop in found for row in range(first, stop)] == list(range(count))
    sizes = [stop - first for first, stop in found]
    assert len(sizes) == pieces
    assert max(sizes) - min(sizes) <= 1


def test_batches_of_ranks_come_in_the_order_of_the_data_set() -> None:
    assert in_order([[(0, "a"), (8, "c")], [], [(4, "b"), (12, "d")]]) == ["a", "b", "c", "d"]


def test_batch_norm_of_one_rank_is_torchs() -> None:
    """Outputs, gradients of input and weights, and running statistics."""
    start("cpu")
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3, momentum=0.3).double()
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    shared = convert_sync_batch_norm(copy.deepcopy(plain), torch.device("cpu"))
    assert isinstance(shared, SyncBatchNorm2d)
    results = []
    for layer in (plain, shared):
        x = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
        y = layer(x)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        (y * weight).sum().backward()
        results.append([y, x.grad, layer.weight.grad, layer.bias.grad, *layer.buffers(), layer.eval()(x)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_contrastive_loss_by_rows_is_the_whole_loss() -> None:
    start("cpu")
    torch.manual_seed(0)
    results = []
    for counts in (None, [5]):
        torch.manual_seed(1)
        inputs = [torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        loss = contrastive_loss(*inputs, scale, counts)
        results.append([loss, *torch.autograd.grad(loss, [*inputs, scale])])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_share_of_another_length_is_refused() -> None:
    start("cpu")
    assert local_slice(7) == (0, 7)
    with pytest.raises(ValueError, match=r"all_gather_rows: 2 rows on rank 0, counts are \[3\]"):
        all_gather_rows(torch.ones(2, 1), [3])
