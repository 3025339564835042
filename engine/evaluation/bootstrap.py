"""Non-parametric bootstrap over images: percentile intervals of AUC and average precision.

A resample draws N images with replacement, the same for all classes, and is held as how often each image
was drawn. Each class is sorted once; a resample's curve then follows from cumulative sums of those counts,
and its areas are those that scikit-learn gives on the resampled rows, ties included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from tqdm import tqdm

from .metrics import Floats, Labels, check_scores, group_columns

CHUNK = 64  # resamples at a time: the counts of an image fill whole cache lines
BLOCK = 1024  # thresholds at a time: bounds the memory of a curve


@dataclass(frozen=True)
class Interval:
    """A percentile interval."""

    low: float
    high: float
    """NaN where no resample defines the metric"""
    resamples: int
    """resamples in which the metric is defined"""


@dataclass(frozen=True)
class Intervals:
    """Intervals of one class list on one set of images."""

    level: float
    resamples: int
    seed: int
    macro_auc: Interval
    micro_auc: Interval
    map_ap: Interval
    map_trapezoid: Interval
    auc: dict[str, Interval]
    """by class name"""
    ap: dict[str, Interval]
    ap_trapezoid: dict[str, Interval]


@dataclass(frozen=True)
class Samples:
    """Metrics of R resamples. Equal seed and N mean equal resamples, so two models' samples are paired."""

    macro_auc: Floats
    """(R,) over the classes that have both values in the resample"""
    micro_auc: Floats
    """(R,)"""
    map_ap: Floats
    """(R,)"""
    map_trapezoid: Floats
    """(R,)"""
    auc: Floats
    """(R,C), NaN where the class has one value only in the resample"""
    ap: Floats
    """(R,C)"""
    ap_trapezoid: Floats
    """(R,C)"""


def bootstrap(
    labels: ArrayLike,
    probabilities: ArrayLike,
    class_names: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    progress: bool = True,
) -> Intervals:
    """Percentile intervals of the macro, micro and per-class metrics.

    Images drawn twice lift average precision a little, so where positives are few its interval lies high, and
    may even leave the point estimate out: a property of this bootstrap, which is the paper's.

    Args:
        labels: (N,C) in {1, 0, −1}; −1 masks the entry.
        probabilities: (N,C) in [0, 1].
        class_names: C names.
        resamples: number of resamples, at least 1.
        seed: of the resamples.
        level: coverage; 0.95 is the paper's α = 0.05.
        progress: show a progress bar.

    Raises:
        UserError: as `metrics.evaluate`.
    """
    samples = resample(labels, probabilities, class_names, resamples=resamples, seed=seed, progress=progress)
    return intervals(samples, class_names, seed=seed, level=level)


def intervals(samples: Samples, class_names: Sequence[str], *, seed: int = 0, level: float = 0.95) -> Intervals:
    """Percentile intervals of the metrics of resamples; `seed` is what they were drawn with."""

    def per_class(values: Floats) -> dict[str, Interval]:
        return {name: interval(values[:, c], level) for c, name in enumerate(class_names)}

    return Intervals(
        level=level,
        resamples=len(samples.macro_auc),
        seed=seed,
        macro_auc=interval(samples.macro_auc, level),
        micro_auc=interval(samples.micro_auc, level),
        map_ap=interval(samples.map_ap, level),
        map_trapezoid=interval(samples.map_trapezoid, level),
        auc=per_class(samples.auc),
        ap=per_class(samples.ap),
        ap_trapezoid=per_class(samples.ap_trapezoid),
    )


def resample_groups(
    labels: ArrayLike,
    probabilities: ArrayLike,
    class_names: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    *,
    resamples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Samples]:
    """`resample` on each group of classes, as `metrics.evaluate_groups`; the groups share the resamples."""
    truth, scores = check_scores(labels, probabilities, class_names)
    options: dict[str, Any] = {"resamples": resamples, "seed": seed, "progress": progress}
    return {
        group: resample(truth[:, c], scores[:, c], list(groups[group]), **options)
        for group, c in group_columns(class_names, groups).items()
    }


def resample(
    labels: ArrayLike,
    probabilities: ArrayLike,
    class_names: Sequence[str],
    *,
    resamples: int,
    seed: int,
    progress: bool = True,
) -> Samples:
    """The metrics of every resample; arguments and errors as `bootstrap`."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    truth, scores = check_scores(labels, probabilities, class_names)
    images, classes = truth.shape
    curves = [_Curve(np.arange(images), truth[:, c], scores[:, c]) for c in range(classes)]
    rows = np.repeat(np.arange(images), classes)
    curves.append(_Curve(rows, truth.reshape(-1), scores.reshape(-1)))  # micro: all entries as one class

    areas = np.empty((resamples, classes + 1, 3))
    drawn = draws(images, resamples, seed)
    with tqdm(
        total=resamples,
        desc="bootstrap",
        unit="resample",
        leave=False,
        dynamic_ncols=True,
        disable=not progress,
    ) as bar:
        for start in range(0, resamples, CHUNK):
            stop = min(start + CHUNK, resamples)
            counts = np.empty((images, stop - start), np.int32)
            for r in range(stop - start):
                counts[:, r] = np.bincount(next(drawn), minlength=images)
            for c, curve in enumerate(curves):
                areas[start:stop, c] = curve.areas(counts)
            bar.update(stop - start)
    macro = _mean_defined(areas[:, :-1])
    auc, ap, trapezoid = np.moveaxis(areas[:, :-1], 2, 0)
    return Samples(macro[:, 0], areas[:, -1, 0], macro[:, 1], macro[:, 2], auc, ap, trapezoid)


def draws(images: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """The resamples, one after the other: the (N,) indices of the images drawn."""
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield rng.integers(images, size=images)


def interval(samples: Floats, level: float = 0.95) -> Interval:
    """Percentile interval of samples (R,), those that are NaN left out."""
    defined = samples[~np.isnan(samples)]
    if not defined.size:
        return Interval(float("nan"), float("nan"), 0)
    tail = 50 * (1 - level)
    low, high = np.percentile(defined, [tail, 100 - tail])
    return Interval(float(low), float(high), int(defined.size))


class _Curve:
    """One class, sorted by falling score and cut at the K thresholds (distinct scores) that have positives.

    Threshold k owns three runs of entries: the negatives that score between thresholds k−1 and k, the
    positives at k, the negatives tied with them. A sparse 0/1 matrix sums the counts of each run:
    (3K,N) @ (N,R). No area needs the thresholds without positives, so a rare class costs little more than
    reading its counts.

    Args:
        rows: (E,) image of each entry.
        labels: (E,) in {1, 0, −1}.
        scores: (E,).
    """

    def __init__(self, rows: NDArray[np.intp], labels: Labels, scores: Floats) -> None:
        known = labels >= 0
        rows, labels, scores = rows[known], labels[known], scores[known]
        rank = np.unique(-scores, return_inverse=True)[1]  # 0 is the highest score
        thresholds = np.unique(rank[labels == 1])
        threshold = np.searchsorted(thresholds, rank)  # the first one at or below the entry's score
        tied = np.append(thresholds, -1)[threshold] == rank
        run = 3 * threshold + np.where(tied, np.where(labels == 1, 1, 2), 0)
        order = np.argsort(run, kind="stable")
        columns = rows[order].astype(np.int32)
        starts = np.searchsorted(run[order], np.arange(3 * thresholds.size + 2))
        images = int(rows.max(initial=-1)) + 1

        def block(first: int, last: int) -> csr_array:
            pointers = starts[first : last + 1]
            inside = columns[pointers[0] : pointers[-1]]
            ones = np.ones(inside.size, np.int32)
            indptr = (pointers - pointers[0]).astype(np.int32)
            return csr_array((ones, inside, indptr), shape=(last - first, images))

        end = 3 * thresholds.size
        self._images = images
        self._blocks = [block(first, min(first + 3 * BLOCK, end)) for first in range(0, end, 3 * BLOCK)]
        self._below = block(end, end + 1)  # negatives below the last threshold

    def areas(self, counts: NDArray[np.int32]) -> Floats:
        """AUC, average precision and trapezoid area (R,3) of R resamples, NaN where one value is missing.

        Args:
            counts: (N,R) how often each image was drawn.
        """
        counts = counts[: self._images]
        true, false = np.zeros(counts.shape[1]), np.zeros(counts.shape[1])  # drawn so far, from the top
        above, steps, trapezoids = np.zeros_like(true), np.zeros_like(true), np.zeros_like(true)
        for block in self._blocks:
            runs = (block @ counts).reshape(-1, 3, counts.shape[1])
            between, positive, tied = runs[:, 0], runs[:, 1], runs[:, 2]
            tp = true + np.cumsum(positive, axis=0, dtype=np.float64)
            fp = false + np.cumsum(between + tied, axis=0, dtype=np.float64)
            precision = tp / np.maximum(tp + fp, 1)
            tp_before, fp_before = tp - positive, fp - tied
            before = tp_before + fp_before
            precision_before = np.where(before > 0, tp_before / np.maximum(before, 1), 1)  # starts at (0, 1)
            above += (positive * (fp + fp_before)).sum(axis=0)
            steps += (positive * precision).sum(axis=0)
            trapezoids += (positive * (precision + precision_before)).sum(axis=0)
            true, false = tp[-1], fp[-1]
        false = false + (self._below @ counts)[0]
        areas = np.full((counts.shape[1], 3), np.nan)
        both = (true > 0) & (false > 0)
        areas[both, 0] = 1 - above[both] / (2 * true[both] * false[both])
        areas[both, 1] = steps[both] / true[both]
        areas[both, 2] = trapezoids[both] / (2 * true[both])
        return areas


def _mean_defined(areas: Floats) -> Floats:
    """Mean over classes (R,C,3) → (R,3) of what is not NaN; NaN where nothing is left."""
    defined = ~np.isnan(areas)
    count = defined.sum(axis=1)
    total = np.where(defined, areas, 0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
