"""Asymmetric loss of multi-label classification."""

from .op import asymmetric_loss

__all__ = ["asymmetric_loss"]
