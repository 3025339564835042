"""A run of either phase, a model folder or a classifier: PsPG, or a CLIP of phase 1 with the paper's templates."""

from __future__ import annotations

from pathlib import Path

import torch

from ...checkpoints.model_folder import is_classifier, read_description
from ..config import EvaluateConfig
from . import SOURCES
from ._base import Method, Source
from ._frozen import Frozen
from ._prompted import Prompted
from ._templates import Templates


@SOURCES.register
class Checkpoint(Source):
    """A folder of this engine."""

    name = "checkpoint"
    settings = ("probe", "cache")
    engine_loader = True

    @classmethod
    def has_context(cls, config: EvaluateConfig) -> bool:
        folder = Path(config.checkpoint)
        return not is_classifier(folder) and bool(read_description(folder)["kind"] == "pspg")

    @classmethod
    def open(cls, config: EvaluateConfig, device: torch.device, autocast: torch.dtype | None) -> Method:
        if is_classifier(Path(config.checkpoint)):
            return Frozen(config, device, autocast)
        if cls.has_context(config):
            return Prompted(config, device, autocast)
        return Templates.from_folder(config, device, autocast)
