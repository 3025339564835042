"""PCL: co-occurrence within each image (paper, table 2)."""

from . import PAIR_LOSSES
from ._base import PairPromptLoss


@PAIR_LOSSES.register
class PCL(PairPromptLoss):
    """Every image has its own target and logit of a pair."""

    name = "pcl"
    target = "sample"
