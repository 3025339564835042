"""Pair loss of generated prompts, from prompts to loss."""

from .op import pair_features, spcl
from .sampling import PairSample, sample_pairs

__all__ = ["PairSample", "pair_features", "sample_pairs", "spcl"]
