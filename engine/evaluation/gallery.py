"""Pictures for the gallery of a report: chosen by the scores, drawn by the method."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from .calibration import calibrated, log_odds
from .config import EvaluateConfig
from .report.evaluation import Fitted, Picture
from .report.gallery import choose_entries
from .scoring import Scores
from .sources import Method, Split


def make_gallery(
    config: EvaluateConfig, method: Method, split: Split, scores: Scores, names: list[str], fitted: Fitted | None
) -> list[Picture]:
    """The entries to show, `config.gallery` of each kind, with what the method made of them.

    Args:
        config: of the evaluation.
        method: under evaluation.
        split: its images.
        scores: of them, those left out aside.
        names: C class names.
        fitted: calibration and thresholds; None: the probabilities as they are, and the threshold of the settings.
    """
    if not config.gallery or scores.labels is None:
        return []
    probabilities, thresholds = scores.probabilities, np.full(len(names), float(config.evaluation.threshold))
    if fitted is not None:
        probabilities = calibrated(log_odds(probabilities), fitted.classes)
        thresholds = np.array([np.nan if row.threshold is None else row.threshold for row in fitted.classes])
    chosen = choose_entries(scores.labels.astype(np.int8), probabilities, thresholds, config.gallery)
    row_of = {sample.id: row for row, sample in enumerate(split.manifest.samples)}
    entries = [(row_of[scores.ids[one.row]], one.column) for one in chosen]
    images = method.pictures(config, split, entries) if entries else []
    return [
        Picture(
            one.kind,
            f"{names[one.column]} {probabilities[one.row, one.column]:.3f} (threshold {thresholds[one.column]:.3f}), "
            f"label {int(scores.labels[one.row, one.column])}: {scores.ids[one.row]}",
            _encoded(image),
        )
        for one, image in zip(chosen, images, strict=True)
    ]


def _encoded(image: np.ndarray) -> bytes:
    """JPEG: a few pictures of 512 pixels as PNG weigh more than the whole page."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=88)
    return out.getvalue()
