"""Losses of both phases."""

from .contrastive import contrastive_loss
from .pair._base import GlobalBatch
from .prompt_loss import PromptLoss

__all__ = ["GlobalBatch", "PromptLoss", "contrastive_loss"]
