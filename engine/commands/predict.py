"""`pspg-engine predict`: probabilities of images as a CSV table, and maps of where they resemble a class."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.bad_image import report_bad
from ..data.find_images import find_images
from ..data.labels import select_classes
from ..data.loaders.evaluation import EvalLoader
from ..evaluation.map_pictures import MapWriter
from ..evaluation.similarity_maps import similarity_maps
from ..models.hub import local_folder
from ..models.pspg import probabilities
from ..utils.files import new_folder
from ..utils.freed_memory import freed_memory_kept
from ..utils.settings import as_settings
from ..utils.tables import write_csv
from ..utils.terminal import show_table
from .image_scores import ImageScores
from .settings import PredictConfig, check_predict

log = logging.getLogger(__name__)

IMAGES, FINDINGS = 20, 3
"""images shown in the terminal, and classes of each"""
FOUND = "above threshold"
"""heading of the column of the classes found"""


@dataclass
class Predictions:
    """Probabilities of N images."""

    ids: list[str]
    class_names: list[str]
    probabilities: NDArray[np.float64]
    """(N,C)"""
    thresholds: NDArray[np.float64] | None = None
    """(C,) probabilities above which a class counts as found, NaN where that is not known; None: not calibrated"""

    def found(self, row: NDArray[np.float64]) -> list[str]:
        """The cell of the classes found in an image, given its probabilities (C,); none where not calibrated."""
        if self.thresholds is None:
            return []
        return ["|".join(name for name, above in zip(self.class_names, row > self.thresholds, strict=True) if above)]


def predict(config: PredictConfig | Mapping[str, Any] | str | Path | None = None, **more: Any) -> Predictions:
    """Score every image of `config.input`, write `config.output` and, where asked for, `config.maps`.

    Args:
        config, more: settings, as `utils.settings.as_settings` takes them.

    Raises:
        UserError: wrong settings, an unusable model, or (on_bad_image = error) an unreadable image.
    """
    config = as_settings(PredictConfig, config, **more)
    check_predict(config)
    checkpoint = local_folder(config.checkpoint, "checkpoint")
    samples = find_images(Path(config.input), image_root=config.image_root)
    scores = ImageScores(config, checkpoint, bank=config.context == "bank", calibrated=config.calibrated)
    scorer = scores.scorer
    drawn = select_classes(scorer.class_names, config.map_classes, key="map_classes")[1]
    loader = scores.loader(samples)
    output = Path(config.output)
    with ExitStack() as stack:
        stack.enter_context(freed_memory_kept(scores.device))
        maps = None
        if config.maps is not None:
            folder = stack.enter_context(new_folder(config.maps, key="maps"))
            maps = MapWriter(folder, scorer.class_names, drawn, config.map_threshold or 0.0, len(samples))
            stack.callback(maps.close)
        predictions = _score(scores, loader, maps)
        pairs = zip(predictions.ids, predictions.probabilities, strict=True)
        rows = ([name, *map(float, row), *predictions.found(row)] for name, row in pairs)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_csv(output, ["id", *scorer.class_names, *([FOUND] if predictions.thresholds is not None else [])], rows)
    _show(predictions)
    log.info(f"{len(predictions.ids)} images, {len(scorer.class_names)} classes: {config.output}")
    if scorer.calibration is not None:
        log.info(f"calibrated on {scorer.calibration.data}; thresholds for {scorer.calibration.point}")
    if maps is not None:
        log.info(f"{maps.drawn} images with maps: {config.maps}")
    report_bad(loader.bad)
    return predictions


@torch.inference_mode()
def _score(scores: ImageScores, loader: EvalLoader, maps: MapWriter | None) -> Predictions:
    """Probabilities of all readable images, batch by batch, and their maps.

    Raises:
        UserError: no image could be read, or scores that are not finite.
    """
    scorer, calibration = scores.scorer, scores.scorer.calibration
    lines = None if calibration is None else calibration.lines()
    ids: list[str] = []
    parts: list[NDArray[np.float64]] = []
    for batch, features, sides, logits in scores.of(loader, "predicting"):
        found = probabilities(logits, lines).cpu().numpy()
        if maps is not None:
            drawn = similarity_maps(features.tokens, *sides, scorer.model.logit_scale, blend=scorer.blend)
            maps.write(batch.ids, batch.pixels, drawn, found)
        ids += batch.ids
        parts.append(found)
    thresholds = None if calibration is None else calibration.thresholds()
    return Predictions(ids, scorer.class_names, np.concatenate(parts), thresholds)


def _show(predictions: Predictions) -> None:
    """Print the classes with the highest probabilities of the first images."""

    def _mark(row: NDArray[np.float64], c: int) -> str:
        return "*" if predictions.thresholds is not None and row[c] > predictions.thresholds[c] else ""

    rows = []
    for name, row in zip(predictions.ids[:IMAGES], predictions.probabilities, strict=False):
        top = np.argsort(-row, kind="stable")[:FINDINGS]
        rows.append([name, ", ".join(f"{_mark(row, c)}{predictions.class_names[c]} {row[c]:.2f}" for c in top)])
    marked = "" if predictions.thresholds is None else " (*: above the threshold)"
    show_table(["image", "highest probabilities" + marked], rows)
    if len(predictions.ids) > IMAGES:
        print(f"… and {len(predictions.ids) - IMAGES} more images")
