"""No pair loss."""

from . import PAIR_LOSSES
from ._base import PairInputs, PairLoss


@PAIR_LOSSES.register
class NoPairLoss(PairLoss):
    """The classification loss alone."""

    name = "none"

    def __call__(self, inputs: PairInputs) -> None:
        return None
