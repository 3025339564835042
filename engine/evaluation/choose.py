"""The one source of an evaluation: chosen by the settings, checked against the others, opened."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

import torch

from ..utils.errors import UserError
from .config import EvaluateConfig
from .sources import SOURCES, Method, Source


def check_source(config: EvaluateConfig) -> type[Source]:
    """The one source that the settings select.

    Raises:
        UserError: none, several, or a setting that does not go with it.
    """
    sources = _sources()
    for name in config.other_source:
        if hasattr(config, SOURCES[name].name):
            raise UserError(f"other_source: {name} has a setting of its own; give --{name}")
    source = next(source for source in sources if source.value(config))
    for key in dict.fromkeys(key for other in sources for key in other.settings):
        if getattr(config, key) and key not in source.settings:
            raise UserError(
                f"{key}: goes with {_either(s for s in sources if key in s.settings)}, not with {source.name}"
            )
    if config.loader == "dali" and not source.engine_loader:
        others = _either(s for s in sources if s.engine_loader)
        raise UserError(f"loader: dali goes with {others}, not with {source.name}; use auto")
    if config.method is not None and (
        not config.method.strip() or config.method.startswith(("template,", "ridge probe"))
    ):
        raise UserError(f"method: {config.method!r} is empty or a baseline's name; choose another")
    return source


def open_source(
    source: type[Source], config: EvaluateConfig, device: torch.device, autocast: torch.dtype | None
) -> Method:
    """The method of the source, ready to score.

    Raises:
        UserError: it is unusable, or its scores do not depend on a context where that is set.
    """
    if config.evaluation.context == "bank" and not source.has_context(config):
        raise UserError("evaluation.context: only PsPG's scores have a context; leave it at batch")
    if config.evaluation.blend != "none" and not source.has_context(config):
        raise UserError("evaluation.blend: only learned prompts are blended with templates; leave it at none")
    return source.open(config, device, autocast)


def _sources() -> list[type[Source]]:
    """Every source, in the order of its settings; those without one come last."""
    order = [field.name for field in fields(EvaluateConfig)]
    names = SOURCES.names()
    return [SOURCES[name] for name in sorted(names, key=lambda n: order.index(n) if n in order else len(order))]


def _either(sources: Iterable[type[Source]]) -> str:
    return " or ".join(source.name for source in sources)
