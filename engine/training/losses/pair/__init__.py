"""Pair losses, one file each: the file's name is a value of `loss.pair`."""

from ....utils.registry import Registry
from ._base import PairLoss

PAIR_LOSSES: Registry[type[PairLoss]] = Registry("loss.pair", __name__, __file__)

__all__ = ["PAIR_LOSSES", "PairLoss"]
