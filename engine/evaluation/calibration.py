"""Calibration of scores by class group, and thresholds at an operating point, fitted on validation images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_curve

from ..checkpoints.calibration import ClassCalibration
from .metrics import Floats, Labels

Method = Literal["platt", "temperature"]
Point = Literal["f1", "sensitivity", "specificity"]
FEW = "classes with few positives"
"""name of the group of classes that are not fitted by themselves"""


def log_odds(probabilities: Floats) -> Floats:
    """Log-odds, of 0 and 1 large but finite."""
    return np.asarray(logit(np.clip(probabilities, 1e-15, 1 - 1e-15)), dtype=np.float64)


def calibrated(odds: Floats, classes: Sequence[ClassCalibration]) -> Floats:
    """Probabilities (N,C) of log-odds (N,C)."""
    slope, intercept = (np.array([getattr(row, key) for row in classes]) for key in ("slope", "intercept"))
    return np.asarray(expit(slope * odds + intercept), dtype=np.float64)


def point_name(point: Point, target: float) -> str:
    """What thresholds are chosen for, as reports and messages have it."""
    return "best F1" if point == "f1" else f"{point} of at least {target:g}"


def fit_classes(
    odds: Floats,
    labels: Labels,
    names: Sequence[str],
    *,
    method: Method = "platt",
    groups: Mapping[str, Sequence[str]] | None = None,
    min_positives: int = 10,
    point: Point = "f1",
    target: float = 0.9,
) -> tuple[list[ClassCalibration], dict[str, str]]:
    """Calibration and threshold of each class, and class name → why it is not calibrated.

    Args:
        odds: (N,C) log-odds.
        labels: (N,C) in {1, 0, −1}; −1 is left out.
        names: C names.
        method: slope and intercept, or slope alone.
        groups: name → classes that share slope and intercept; other classes are fitted by themselves, and together
            where they have fewer than `min_positives` positives or negatives.
        min_positives: see there.
        point, target: see `pick_threshold`.
    """
    positives, negatives = (labels == 1).sum(0), (labels == 0).sum(0)
    group_of = {name: group for group, members in (groups or {}).items() for name in members}
    reasons: dict[str, str] = {}
    members: dict[str, list[int]] = {}
    for c, name in enumerate(names):
        if not positives[c] or not negatives[c]:
            missing = "labels" if not positives[c] + negatives[c] else "negatives" if positives[c] else "positives"
            reasons[name] = f"no {missing} in the validation"
        else:
            alone = min(positives[c], negatives[c]) >= min_positives
            members.setdefault(group_of.get(name, name if alone else FEW), []).append(c)
    lines: dict[int, tuple[str | None, float, float]] = {}
    for group, columns in members.items():
        known = labels[:, columns] >= 0
        slope, intercept = fit_line(odds[:, columns][known], labels[:, columns][known], method)
        if slope > 0:
            lines.update(dict.fromkeys(columns, (group, slope, intercept)))
        else:
            reasons |= {names[c]: "its scores rank the validation images below chance" for c in columns}
    classes = []
    for c, name in enumerate(names):
        own, slope, intercept = lines.get(c, (None, 1.0, 0.0))
        known = labels[:, c] >= 0
        threshold = pick_threshold(labels[known, c], expit(slope * odds[known, c] + intercept), point, target)
        classes.append(
            ClassCalibration(
                name=name,
                slope=slope,
                intercept=intercept,
                group=own,
                threshold=threshold,
                positives=int(positives[c]),
            )
        )
    return classes, reasons


def fit_line(odds: Floats, labels: Labels, method: Method) -> tuple[float, float]:
    """Slope and intercept (0 for temperature) of maximal likelihood, by scikit-learn's logistic regression.

    The targets are Platt's, (N₊ + 1)/(N₊ + 2) and 1/(N₋ + 2) (Platt 1999): so slopes stay finite where scores part
    the labels.

    Args:
        odds: (M,).
        labels: (M,) in {1, 0}, both present.
        method: see `fit_classes`.
    """
    positive = labels == 1
    count = positive.sum()
    target = np.where(positive, (count + 1) / (count + 2), 1 / (labels.size - count + 2))
    scale = max(float(odds.std()), 1e-12)  # of order 1, which the solver needs
    model = LogisticRegression(C=np.inf, fit_intercept=method == "platt", tol=1e-8, max_iter=1000)
    both = np.concatenate([odds, odds])[:, None] / scale
    model.fit(both, np.repeat([1, 0], labels.size), sample_weight=np.concatenate([target, 1 - target]))
    return float(model.coef_[0, 0]) / scale, float(model.intercept_[0]) if method == "platt" else 0.0


def pick_threshold(labels: Labels, probabilities: Floats, point: Point, target: float) -> float | None:
    """The threshold, midway between two probabilities, above which a class counts as found.

    Args:
        labels: (M,) in {1, 0}.
        probabilities: (M,).
        point: f1: the best F1; sensitivity or specificity: the most of the other at which it is at least `target`.
        target: of sensitivity or specificity.

    Returns:
        None where a value has no label.
    """
    positives = int((labels == 1).sum())
    negatives = labels.size - positives
    if not positives or not negatives:
        return None
    false, true, edges = roc_curve(labels, probabilities, drop_intermediate=False)
    hits, alarms = true * positives, false * negatives  # found at p ≥ edge; at edges[0] nothing is
    if point == "f1":
        place = int(np.argmax(2 * hits / (hits + alarms + positives)))
    elif point == "sensitivity":
        place = int(np.argmax(hits >= target * positives - 1e-9))
    else:
        place = int(np.flatnonzero(negatives - alarms >= target * negatives - 1e-9)[-1])
    upper: float = edges[place] if place else 1.0
    lower: float = edges[place + 1] if place + 1 < edges.size else 0.0
    middle = (upper + lower) / 2
    return float(middle if lower <= middle < upper else lower)


def left_line(reasons: Mapping[str, str], classes: int, most: int = 5) -> str:
    """The classes that `fit_classes` could not fit, in a line: how many of all, and why the first ones."""
    listed = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:most])
    more = f"; and {len(reasons) - most} more" if len(reasons) > most else ""
    return f"the probabilities of {len(reasons)} of {classes} classes are left as they are: {listed}{more}"
