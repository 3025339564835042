"""Pair loss of generated prompts, from prompts to loss."""

from .op import pair_features, spcl

__all__ = ["pair_features", "spcl"]
