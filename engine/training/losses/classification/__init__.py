"""Classification losses, one file each: the file's name is a value of `loss.classification`."""

from ....utils.registry import Registry
from ._base import ClassificationLoss

CLASSIFICATION_LOSSES: Registry[type[ClassificationLoss]] = Registry("loss.classification", __name__, __file__)

__all__ = ["CLASSIFICATION_LOSSES", "ClassificationLoss"]
