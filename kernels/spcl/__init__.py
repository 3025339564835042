"""Pair loss of generated prompts, from prompts to loss."""

from ..pairs import PairSample, PairSelection
from .op import ImageBatch, pair_features, spcl
from .sampling import sample_pairs

__all__ = ["ImageBatch", "PairSample", "PairSelection", "pair_features", "sample_pairs", "spcl"]
