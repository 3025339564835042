"""How well probabilities and thresholds hold: reliability, calibration error, Brier score, errors at a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from .metrics import Floats, Labels

Flags = NDArray[np.bool_]
BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Probabilities against what was found, over all unmasked entries of some classes."""

    ece: float
    """expected calibration error: Σ over bins of share of entries · |mean probability − share of positives|"""
    class_ece: float
    """the same a class at a time, mean over the classes that have labels; small classes have it from chance alone"""
    brier: float
    """mean of (probability − label)²"""
    means: list[float]
    """mean probability of each bin that has entries; the bins are as wide as one another"""
    shares: list[float]
    """share of positives in each"""
    counts: list[int]
    """entries in each"""


@dataclass(frozen=True)
class AtThreshold:
    """One class at its threshold; NaN where nothing defines a value."""

    name: str
    threshold: float
    tp: int
    fp: int
    fn: int
    tn: int
    sensitivity: float
    sensitivity_interval: tuple[float, float]
    """95 %, Wilson's"""
    specificity: float
    specificity_interval: tuple[float, float]
    precision: float
    f1: float


def reliability(labels: Labels, probabilities: Floats) -> Reliability:
    """Of probabilities (N,C) and labels (N,C) in {1, 0, −1}; NaN where all labels are masked."""
    known = labels >= 0
    counts, means, shares = _bins(labels[known], probabilities[known])
    used = counts > 0
    errors = [_ece(labels[rows, c], probabilities[rows, c]) for c, rows in enumerate(known.T) if rows.any()]
    return Reliability(
        ece=_ece(labels[known], probabilities[known]),
        class_ece=float(np.mean(errors)) if errors else float("nan"),
        brier=float(np.mean((probabilities[known] - labels[known]) ** 2)) if known.any() else float("nan"),
        means=means[used].tolist(),
        shares=shares[used].tolist(),
        counts=counts[used].astype(int).tolist(),
    )


def at_thresholds(
    labels: Labels, probabilities: Floats, names: Sequence[str], thresholds: Sequence[float | None]
) -> list[AtThreshold]:
    """Counts and rates of each class above its threshold (N,C); classes without one are left out."""
    return [
        _at_threshold(
            name, labels[labels[:, c] >= 0, c] == 1, probabilities[labels[:, c] >= 0, c] > threshold, threshold
        )
        for c, (name, threshold) in enumerate(zip(names, thresholds, strict=True))
        if threshold is not None
    ]


def _at_threshold(name: str, truth: Flags, found: Flags, threshold: float) -> AtThreshold:
    tp, fp = int((truth & found).sum()), int((~truth & found).sum())
    fn, tn = int(truth.sum()) - tp, int((~truth).sum()) - fp
    return AtThreshold(
        name,
        threshold,
        tp,
        fp,
        fn,
        tn,
        _share(tp, tp + fn),
        wilson(tp, tp + fn),
        _share(tn, tn + fp),
        wilson(tn, tn + fp),
        _share(tp, tp + fp),
        _share(2 * tp, 2 * tp + fp + fn),
    )


def wilson(count: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; it holds at 0 and 1, where resampled images would give no width."""
    if not total:
        return float("nan"), float("nan")
    interval = binomtest(count, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def _share(count: int, total: int) -> float:
    return count / total if total else float("nan")


def _ece(labels: Labels, probabilities: Floats) -> float:
    if not labels.size:
        return float("nan")
    counts, means, shares = _bins(labels, probabilities)
    return float(counts @ np.abs(means - shares) / labels.size)


def _bins(labels: Labels, probabilities: Floats) -> tuple[Floats, Floats, Floats]:
    """Entries, mean probability and share of positives of each bin; 0 where it is empty."""
    place = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    counts = np.bincount(place, minlength=BINS).astype(np.float64)
    total = np.maximum(counts, 1)
    means = np.bincount(place, weights=probabilities, minlength=BINS) / total
    return counts, means, np.bincount(place, weights=labels, minlength=BINS) / total
