"""Any CLIP that open_clip can build, with the paper's templates."""

from __future__ import annotations

import torch

from ..config import EvaluateConfig
from . import SOURCES
from ._base import Method, Source
from ._templates import Templates


@SOURCES.register
class Clip(Source):
    """An open_clip model name or JSON file; its weights are the setting `clip_weights`."""

    name = "clip"
    settings = ("clip_weights", "probe", "cache")
    engine_loader = True

    @classmethod
    def open(cls, config: EvaluateConfig, device: torch.device, autocast: torch.dtype | None) -> Method:
        return Templates.from_open_clip(config, device, autocast)
