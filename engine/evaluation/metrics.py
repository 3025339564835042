"""Multi-label metrics in which a masked entry (label −1) counts nowhere: AUC, average precision, F1 and MCC.

A class whose unmasked labels have one value only has no AUC and no average precision: it is left out of every
macro average and named in `Metrics.skipped`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from sklearn.metrics import (
    auc,
    average_precision_score,
    f1_score,
    matthews_corrcoef,
    precision_recall_curve,
    roc_auc_score,
)
from tqdm import tqdm

from ..utils.errors import UserError

Floats = NDArray[np.float64]
Labels = NDArray[np.int8]


@dataclass(frozen=True)
class ClassMetrics:
    """Counts and metrics of one class; the metrics of a skipped class are NaN."""

    name: str
    positives: int
    negatives: int
    masked: int
    """rows labelled −1, left out"""
    auc: float
    ap: float
    """average precision, Σ (R_k − R_{k−1}) P_k"""
    ap_trapezoid: float
    """area under the precision-recall curve by the trapezoid rule, as the paper's authors report it"""
    f1: float
    mcc: float
    threshold: float
    """probability above which the class counts as predicted, for `f1` and `mcc`"""


@dataclass(frozen=True)
class Skip:
    """A class that the averages leave out, and why."""

    name: str
    reason: str


OWN: dict[str, Callable[[Labels, Floats], float]] = {}
"""metrics of the user's, by name; `report.evaluation.register_metric` adds them"""


@dataclass(frozen=True)
class Metrics:
    """Metrics of one class list on one set of images; NaN where nothing defines them."""

    images: int
    macro_auc: float
    """mean AUC of the classes that are not skipped"""
    micro_auc: float
    """AUC of all unmasked (image, class) entries together, those of skipped classes included"""
    map_ap: float
    """mean average precision of the classes that are not skipped"""
    map_trapezoid: float
    """mean trapezoid area under the precision-recall curve, likewise"""
    macro_f1: float
    micro_f1: float
    """F1 of all unmasked entries together"""
    macro_mcc: float
    per_class: list[ClassMetrics]
    """every class, in the order of the class list"""
    skipped: list[Skip]
    own: dict[str, float] = field(default_factory=dict)
    """metrics of the user's, by name; they are attributes, too"""

    def __getattr__(self, name: str) -> float:
        own = self.__dict__.get("own", {})
        if name not in own:
            raise AttributeError(name)
        return float(own[name])


def evaluate(
    labels: ArrayLike,
    probabilities: ArrayLike,
    class_names: Sequence[str],
    *,
    threshold: float = 0.5,
    progress: bool = True,
) -> Metrics:
    """Every metric of one class list.

    Args:
        labels: (N,C) in {1, 0, −1}; −1 masks the entry.
        probabilities: (N,C) in [0, 1].
        class_names: C names.
        threshold: probability above which a class counts as predicted.
        progress: show a progress bar if it takes more than a second.

    Raises:
        UserError: a probability is NaN, infinite or outside [0, 1]; a label has another value; no images.
    """
    truth, scores = check_scores(labels, probabilities, class_names)
    rows = tqdm(
        enumerate(class_names),
        total=len(class_names),
        desc="metrics",
        unit="class",
        leave=False,
        delay=1,
        disable=not progress,
    )
    per_class = [_class_metrics(name, truth[:, c], scores[:, c], threshold) for c, name in rows]
    skipped = [Skip(row.name, _skip_reason(row)) for row in per_class if not (row.positives and row.negatives)]
    counted = [row for row in per_class if row.positives and row.negatives]

    def macro(key: str) -> float:
        return float(np.mean([getattr(row, key) for row in counted])) if counted else float("nan")

    known = truth >= 0
    flat_truth, flat_scores = truth[known], scores[known]
    both_values = 0 < flat_truth.sum() < flat_truth.size
    return Metrics(
        images=len(truth),
        macro_auc=macro("auc"),
        micro_auc=float(roc_auc_score(flat_truth, flat_scores)) if both_values else float("nan"),
        map_ap=macro("ap"),
        map_trapezoid=macro("ap_trapezoid"),
        macro_f1=macro("f1"),
        micro_f1=_f1(flat_truth, flat_scores > threshold) if flat_truth.size else float("nan"),
        macro_mcc=macro("mcc"),
        per_class=per_class,
        skipped=skipped,
        own={name: _own(name, truth, scores) for name in OWN},
    )


def evaluate_groups(
    labels: ArrayLike,
    probabilities: ArrayLike,
    class_names: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    *,
    threshold: float = 0.5,
    progress: bool = True,
) -> dict[str, Metrics]:
    """`evaluate` on each group of classes: group name → names of its classes, all taken from `class_names`.

    Raises:
        UserError: as `evaluate`; a group is empty or names an unknown class.
    """
    truth, scores = check_scores(labels, probabilities, class_names)
    return {
        group: evaluate(truth[:, c], scores[:, c], list(groups[group]), threshold=threshold, progress=progress)
        for group, c in group_columns(class_names, groups).items()
    }


def macro_auc(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """`Metrics.macro_auc` alone, from ranks: quick enough for validation after every epoch.

    Args:
        labels: (N,C) in {1, 0, −1}.
        probabilities: (N,C).

    Returns:
        NaN where no class has both values.

    Raises:
        UserError: as `evaluate`.
    """
    names = [f"number {c}" for c in range(np.shape(labels)[-1])]
    truth, scores = check_scores(labels, probabilities, names)
    areas = []
    for c in range(truth.shape[1]):
        known = truth[:, c] >= 0
        positive = truth[known, c] == 1
        positives = int(positive.sum())
        negatives = int(known.sum()) - positives
        if positives and negatives:
            ranks = rankdata(scores[known, c])
            above = ranks[positive].sum() - positives * (positives + 1) / 2  # Mann–Whitney U, ties count half
            areas.append(above / (positives * negatives))
    return float(np.mean(areas)) if areas else float("nan")


def check_scores(labels: ArrayLike, probabilities: ArrayLike, class_names: Sequence[str]) -> tuple[Labels, Floats]:
    """Labels (N,C) as int8 and probabilities (N,C) as float64, checked.

    Raises:
        ValueError: shapes that do not belong together.
        UserError: bad values (named: the class and how many rows), equal class names, no images or classes.
    """
    truth, scores = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if truth.ndim != 2 or truth.shape != scores.shape or truth.shape[1] != len(class_names):
        raise ValueError(
            f"labels {truth.shape}, probabilities {scores.shape} and {len(class_names)} names do not match"
        )
    if not truth.size:
        raise UserError(f"nothing to evaluate: {truth.shape[0]} images, {truth.shape[1]} classes")
    if len(set(class_names)) < len(class_names):
        twice = next(name for i, name in enumerate(class_names) if name in class_names[:i])
        raise UserError(f"class '{twice}': named twice in the class list; keep one")
    _refuse(
        ~np.isfinite(scores),
        class_names,
        "NaN or infinite probabilities; the model has diverged, or a prediction file is damaged",
    )
    _refuse((scores < 0) | (scores > 1 + 1e-6), class_names, "probabilities outside [0, 1]; are these logits?")
    _refuse(~np.isin(truth, (1, 0, -1)), class_names, "labels other than 1, 0 and -1")
    return truth.astype(np.int8), scores


def group_columns(class_names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Columns of each group's classes.

    Raises:
        UserError: a group is empty or names an unknown class.
    """
    column = {name: c for c, name in enumerate(class_names)}
    for group, names in groups.items():
        if not names:
            raise UserError(f"group '{group}': has no classes; leave it out")
        unknown = [name for name in names if name not in column]
        if unknown:
            raise UserError(f"group '{group}': class '{unknown[0]}' is not in the class list that was evaluated")
    return {group: [column[name] for name in names] for group, names in groups.items()}


def _refuse(bad: NDArray[np.bool_], class_names: Sequence[str], what: str) -> None:
    columns = np.flatnonzero(bad.any(axis=0))
    if columns.size:
        first = columns[0]
        others = f" (and {columns.size - 1} other classes)" if columns.size > 1 else ""
        row = int(bad[:, first].argmax())
        raise UserError(
            f"class '{class_names[first]}'{others}: {int(bad[:, first].sum())} of {len(bad)} rows, "
            f"the first is row {row}, have {what}"
        )


def _class_metrics(name: str, labels: Labels, scores: Floats, threshold: float) -> ClassMetrics:
    known = labels >= 0
    truth, score = labels[known], scores[known]
    positives = int(truth.sum())
    negatives = truth.size - positives
    values = dict.fromkeys(("auc", "ap", "ap_trapezoid", "f1", "mcc"), float("nan"))
    if positives and negatives:
        precision, recall, _ = precision_recall_curve(truth, score)
        predicted = score > threshold
        values = {
            "auc": float(roc_auc_score(truth, score)),
            "ap": float(average_precision_score(truth, score)),
            "ap_trapezoid": float(auc(recall, precision)),
            "f1": _f1(truth, predicted),
            "mcc": float(matthews_corrcoef(truth, predicted)),
        }
    masked = labels.size - truth.size
    return ClassMetrics(name, positives, negatives, masked, threshold=threshold, **values)


def _own(name: str, truth: Labels, scores: Floats) -> float:
    """Value of a metric of the user's.

    Raises:
        UserError: it fails, or gives no number.
    """
    try:
        return float(OWN[name](truth.copy(), scores.copy()))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"metric {name}: {OWN[name].__module__}: {reason}") from error


def _f1(truth: Labels, predicted: NDArray[np.bool_]) -> float:
    return float(f1_score(truth, predicted, zero_division=0))


def _skip_reason(row: ClassMetrics) -> str:
    known = row.positives + row.negatives
    if not known:
        return f"all {row.masked} labels are masked"
    missing = "negatives" if row.positives else "positives"
    return f"no {missing} among {known} labelled images ({row.masked} masked)"
