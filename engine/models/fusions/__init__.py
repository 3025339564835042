"""Fusions of an image's tokens into logits, one file each: the file's name is a value of `model.fusion`."""

from ...utils.registry import Registry
from ._base import Fusion

FUSIONS: Registry[type[Fusion]] = Registry("model.fusion", __name__, __file__)

__all__ = ["FUSIONS", "Fusion"]
