"""Where the scores of an evaluation come from: exactly one source."""

from __future__ import annotations

from pathlib import Path

import torch

from ...checkpoints.model_folder import read_description
from ...config import EvaluateConfig
from ...utils.errors import UserError
from .adapter import Adapted
from .method import Method
from .predictions import Predictions
from .prompted import Prompted
from .templates import Templates

SOURCES = ("checkpoint", "clip", "predictions", "adapter")
MODELS = ("checkpoint", "clip")
"""sources whose images go through the engine's loader and whose image features are known"""
GO_WITH = {"clip_weights": ("clip",), "probe": MODELS, "cache": MODELS}


def check_source(config: EvaluateConfig) -> str:
    """Name of the one source.

    Raises:
        UserError: none, several, or a setting that does not go with it.
    """
    given = [key for key in SOURCES if getattr(config, key)]
    if len(given) != 1:
        one_of = ", ".join(f"--{key}" for key in SOURCES)
        raise UserError(f"give exactly one of {one_of}; got {' and '.join(f'--{key}' for key in given) or 'none'}")
    source = given[0]
    for key, sources in GO_WITH.items():
        if getattr(config, key) and source not in sources:
            raise UserError(f"{key}: goes with {' or '.join(sources)}, not with {source}")
    if config.loader == "dali" and source not in MODELS:
        raise UserError(f"loader: dali goes with {' or '.join(MODELS)}, not with {source}; use auto")
    if config.method is not None and (
        not config.method.strip() or config.method.startswith(("template,", "ridge probe"))
    ):
        raise UserError(f"method: {config.method!r} is empty or a baseline's name; choose another")
    return source


def open_source(source: str, config: EvaluateConfig, device: torch.device, autocast: torch.dtype | None) -> Method:
    """The method of the source, ready to score.

    Raises:
        UserError: it is unusable, or its scores do not depend on a context where that is set.
    """
    if source == "checkpoint" and read_description(Path(config.checkpoint))["kind"] == "pspg":
        return Prompted(config, device, autocast)
    if config.evaluation.context == "bank":
        raise UserError("evaluation.context: only PsPG's scores have a context; leave it at batch")
    if source == "checkpoint":
        return Templates.from_folder(config, device, autocast)
    if source == "clip":
        return Templates.from_open_clip(config, device, autocast)
    return Predictions(config) if source == "predictions" else Adapted(config, device)
