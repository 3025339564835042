"""What a batch norm has."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Norm(NamedTuple):
    """Weights, statistics over the batches so far and settings of a batch norm, by torch's names.

    The weights may have a dtype of their own, float32 under autocast. The statistics are updated in place.
    """

    weight: Tensor
    """(C,), γ"""
    bias: Tensor
    """(C,), β"""
    running_mean: Tensor
    """(C,)"""
    running_var: Tensor
    """(C,), unbiased: over one less than the numbers of a channel"""
    num_batches_tracked: Tensor
    """() int64"""
    momentum: float = 0.1
    """what a batch counts in the statistics"""
    eps: float = 1e-5
    """added to the variance"""
