"""SPCL: co-occurrence within the batch (paper eqs. 5 to 8)."""

from . import PAIR_LOSSES
from ._base import PairPromptLoss


@PAIR_LOSSES.register
class SPCL(PairPromptLoss):
    """A pair's target is 1 if any image of the batch has both labels; its logit is the largest over the batch."""

    name = "spcl"
    target = "batch"
