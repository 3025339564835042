"""Other methods that stand beside the one under evaluation, scored on the same images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..distributed.deepspeed import World
from ..models.hub import local_folder
from ..utils.errors import UserError
from .choose import open_source
from .config import EvaluateConfig
from .scoring import Scores
from .sources import SOURCES, Method, Split

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rival:
    """A method that is compared, and its scores."""

    name: str
    parameters: int | None
    scores: Scores


def score_rivals(
    config: EvaluateConfig, split: Split, world: World, autocast: torch.dtype | None, taken: Sequence[str]
) -> list[Rival]:
    """Scores of every method of `config.compare`, one after the other; none on other ranks than the first.

    Args:
        config: of the evaluation.
        split: images and class lists.
        world: the ranks.
        autocast: low precision.
        taken: names of methods that the report has already.

    Raises:
        UserError: naming `compare`, the method and what is wrong with it.
    """
    rivals = []
    for name, place in config.compare.items():
        if name in taken or name.startswith(("template,", "ridge probe", "text-informed probe")):
            raise UserError(f"compare: {name!r} is a name that the report has already; choose another")
        method = _open(config, name, place, world.device, autocast)
        loader = config.loader if SOURCES[_source_of(place)].engine_loader else "torch"
        cache = config.cache if _source_of(place) == "checkpoint" else None
        found = method.scores(replace(config, loader=loader, cache=cache), split, world)
        if found is not None:
            rivals.append(Rival(name, method.parameters, found[0]))
    return rivals


def on_common_images(scores: Scores, rivals: Sequence[Rival]) -> tuple[Scores, list[Rival]]:
    """The same images for all, in the order of the first; those that a method could not score are left out."""
    common = set(scores.ids).intersection(*(rival.scores.ids for rival in rivals))
    if not common:
        raise UserError("compare: no image has scores of all methods")
    if len(common) < len(scores.ids):
        log.info(f"compare: {len(scores.ids) - len(common)} images lack a score of some method and were left out")
    kept = [name for name in scores.ids if name in common]
    aligned = [Rival(rival.name, rival.parameters, _rows(rival.scores, kept)) for rival in rivals]
    return _rows(scores, kept), aligned


def _open(config: EvaluateConfig, name: str, place: str, device: torch.device, autocast: torch.dtype | None) -> Method:
    """The method at a place; settings that only the first method has are as they are by default."""
    source = _source_of(place)
    found = SOURCES[source]
    own = replace(config, checkpoint="", clip=None, clip_weights=None, predictions=None, adapter=None, probe=None)
    if source == "checkpoint":
        place = str(local_folder(place, "compare"))
    place_of: dict[str, Any] = {source: place}
    own = replace(own, **place_of, other_source={}, method=name)
    if not found.has_context(own):
        plain = replace(config.evaluation, context="batch", blend="none", blend_weight=None)
        own = replace(own, evaluation=plain)
    return open_source(found, own, device, autocast)


def _source_of(place: str) -> str:
    """The source that a place of `compare` is read by."""
    if place.endswith((".csv", ".csv.gz")):
        return "predictions"
    return "adapter" if place.endswith(".py") else "checkpoint"


def _rows(scores: Scores, ids: Sequence[str]) -> Scores:
    if scores.ids == list(ids):
        return scores
    place = {name: row for row, name in enumerate(scores.ids)}
    rows = np.array([place[name] for name in ids])
    labels: NDArray[np.float64] | None = None if scores.labels is None else scores.labels[rows]
    return Scores(list(ids), scores.probabilities[rows], labels, scores.features[rows])
