"""What batch norm keeps for evaluation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Running(NamedTuple):
    """Statistics over the batches so far, updated in place; torch's names are running_mean and so on."""

    mean: Tensor
    """(C,)"""
    variance: Tensor
    """(C,), unbiased: over one less than the numbers of a channel"""
    batches: Tensor
    """() int64, how many there were: num_batches_tracked"""
