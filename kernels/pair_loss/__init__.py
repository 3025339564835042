"""Soft Pairwise Co-occurrence Loss and its sample-level variant, on the features of pair prompts."""

from .op import pair_loss

__all__ = ["pair_loss"]
