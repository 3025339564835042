"""Calibration and errors at a threshold of the method under evaluation, as the report shows them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..calibration import calibrated, log_odds
from ..reliability import AtThreshold, Reliability, at_thresholds, reliability
from .evaluation import Evaluation


@dataclass(frozen=True)
class Operating:
    """What holds on the images of an evaluation."""

    before: Reliability
    """of the method's own probabilities"""
    after: Reliability | None
    """of the calibrated ones; None: there is no calibration"""
    classes: list[AtThreshold]
    """those that have a threshold"""
    point: str
    """what the thresholds are"""


def operating(evaluation: Evaluation) -> Operating:
    """Measured on the images of the evaluation; what was fitted was fitted on others."""
    labels, probabilities = np.asarray(evaluation.labels), np.asarray(evaluation.probabilities)
    names, fitted = evaluation.class_names, evaluation.fitted
    before = reliability(labels, probabilities)
    if fitted is None:
        threshold = evaluation.main.per_class[0].threshold
        rows = at_thresholds(labels, probabilities, names, [threshold] * len(names))
        return Operating(before, None, rows, f"the threshold {threshold:g} of the settings")
    after = calibrated(log_odds(probabilities), fitted.classes)
    rows = at_thresholds(labels, after, names, [row.threshold for row in fitted.classes])
    return Operating(before, reliability(labels, after), rows, f"{fitted.point}, on {fitted.images} validation images")
