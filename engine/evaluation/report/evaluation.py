"""One evaluation: the images, the methods that scored them, and their metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...checkpoints.calibration import ClassCalibration
from ...config import EvaluationConfig
from ..bootstrap import Intervals, Samples, intervals, resample_groups
from ..metrics import OWN, Metrics, check_scores, evaluate_groups

SUMMARY = {
    "macro_auc": "Macro AUC",
    "micro_auc": "Micro AUC",
    "map_ap": "mAP",
    "map_trapezoid": "mAP (trapezoid)",
    "macro_f1": "F1",
    "macro_mcc": "MCC",
}
"""attribute of `Metrics` → heading of its column"""
Metric = Callable[[NDArray[np.int8], NDArray[np.float64]], float]
_BUILT_IN = frozenset(field.name for field in fields(Metrics))


def register_metric(name: str, heading: str | None = None) -> Callable[[Metric], Metric]:
    """Decorator that adds a metric to every evaluation: tables, page, card, metrics.json and the terminal.

    The function takes labels (N,C) in {1, 0, −1}, of which −1 masks an entry, and probabilities (N,C) of one group of
    classes, and returns a number, the greater the better, or NaN. Defined anew, it takes the place of the one before.

    Args:
        name: identifier of the metric.
        heading: of its column; None: the name.

    Raises:
        ValueError: no identifier, or a metric of the engine's.
    """
    if not name.isidentifier() or name in _BUILT_IN:
        raise ValueError(f"metric: {name!r} is no identifier, or a metric of the engine's; choose another name")

    def register(function: Metric) -> Metric:
        OWN[name] = function
        SUMMARY[name] = heading or name
        return function

    return register


CONTEXTS = {
    "batch": "scores depend on which images share a batch; the batch size is part of the result",
    "bank": "scores do not depend on batches: the prompts attend to a fixed bank of training images",
    "none": "scores depend on the image and the class alone",
    "unknown": "what scores depend on besides the image and the class is not known here",
}


@dataclass(frozen=True)
class MethodResult:
    """Metrics of one method, by group of classes."""

    name: str
    metrics: Mapping[str, Metrics]
    intervals: Mapping[str, Intervals] = field(default_factory=dict)
    """empty: no bootstrap"""
    parameters: int | None = None
    """how many its training adapts (a CLIP under templates: all of its own); None: not known"""
    samples: Mapping[str, Samples] = field(default_factory=dict)
    """metrics of the resamples, which are the same for all methods of an evaluation; empty: no bootstrap"""
    ceiling: bool = False
    """it saw labels that no method under evaluation has, and is never the best of a group"""


@dataclass(frozen=True)
class Fitted:
    """A calibration of the method under evaluation, fitted on other images than these."""

    classes: Sequence[ClassCalibration]
    """in the order of the class names"""
    reasons: Mapping[str, str]
    """class name → why it is not calibrated"""
    point: str
    """what the thresholds were chosen for"""
    data: str
    images: int


@dataclass(frozen=True)
class Picture:
    """An image of the gallery."""

    kind: str
    """a key of `gallery.KINDS`"""
    caption: str
    image: bytes
    """PNG or JPEG"""


@dataclass(kw_only=True)
class Evaluation:
    """Every result of one evaluation. The first method is the one under evaluation, the others are its baselines.

    The first group of classes is the main one: curves, bars and the per-class table show its classes, coloured by the
    last other group that holds them.

    Raises:
        UserError: bad scores (as `metrics.evaluate`).
        ValueError: values that do not belong together.
    """

    title: str
    """heading of the report and the model card"""
    methods: Sequence[MethodResult]
    class_names: Sequence[str]
    """C names, those of the first group"""
    ids: Sequence[str]
    """N image ids, for predictions.csv"""
    labels: ArrayLike
    """(N,C) in {1, 0, −1}; int8 after construction"""
    probabilities: ArrayLike
    """(N,C) in [0, 1] of the first method; float64 after construction"""
    settings: Mapping[str, Any]
    """what was run; must hold `context` (a key of CONTEXTS) and `batch_size`. JSON values"""
    about: str | None = None
    """what the first method is, for the model card, to go after its name; None: PsPG, which the card describes"""
    library: str | None = None
    """Python package that loads the model, for the model card"""
    pictures: Sequence[tuple[str, Path | bytes]] = ()
    """captions with a PNG or JPEG, as path or bytes"""
    training: Sequence[Mapping[str, Any]] = ()
    """rows of metrics.jsonl"""
    training_data: str | None = None
    """what the model was trained on, for the model card"""
    fitted: Fitted | None = None
    """calibration and thresholds; None: the method's own probabilities, and the threshold of the settings"""
    train: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """class name → positives and labelled images of the training; empty: not known"""
    splits: Mapping[str, int] = field(default_factory=dict)
    """name of a split → its images; these are added"""
    gallery: Sequence[Picture] = ()
    """images chosen by what the method made of them"""
    notes: Sequence[str] = ()
    """statements shown at the top, such as that phantoms are no clinical data"""

    def __post_init__(self) -> None:
        self.labels, self.probabilities = check_scores(self.labels, self.probabilities, self.class_names)
        if self.settings.get("context") not in CONTEXTS or "batch_size" not in self.settings:
            raise ValueError(f"settings must hold context ({', '.join(CONTEXTS)}) and batch_size")
        if not self.methods or not self.methods[0].metrics:
            raise ValueError("metrics must hold at least one group")
        if [row.name for row in self.main.per_class] != list(self.class_names):
            raise ValueError(f"class_names are not the classes of the first group '{self.main_group}'")
        if len(self.ids) != len(self.labels):
            raise ValueError(f"{len(self.ids)} ids for {len(self.labels)} rows")

    @property
    def method(self) -> MethodResult:
        """The method under evaluation."""
        return self.methods[0]

    @property
    def main_group(self) -> str:
        return next(iter(self.method.metrics))

    @property
    def main(self) -> Metrics:
        """Metrics of the method under evaluation on the main group."""
        return self.method.metrics[self.main_group]

    @property
    def main_intervals(self) -> Intervals | None:
        return self.method.intervals.get(self.main_group)

    @property
    def group_of(self) -> dict[str, str]:
        """Class name → the last group but the main one that holds it."""
        others = list(self.method.metrics.items())[1:]
        return {row.name: group for group, found in others for row in found.per_class}


def measure(
    name: str,
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: Mapping[str, Sequence[str]],
    settings: EvaluationConfig,
    *,
    parameters: int | None = None,
    ceiling: bool = False,
    progress: bool = True,
) -> MethodResult:
    """Metrics of a method on each group of classes, with intervals where the settings ask for resamples.

    Args:
        name: of the method.
        labels, probabilities: (N,C), the classes of the first group.
        groups: name → class names; the first one holds all.

    Raises:
        UserError: bad scores (as `metrics.evaluate`).
    """
    classes = next(iter(groups.values()))
    metrics = evaluate_groups(labels, probabilities, classes, groups, threshold=settings.threshold, progress=progress)
    found: Mapping[str, Intervals] = {}
    samples: Mapping[str, Samples] = {}
    if settings.bootstrap:
        options: dict[str, Any] = {"resamples": settings.bootstrap, "seed": settings.seed, "progress": progress}
        samples = resample_groups(labels, probabilities, classes, groups, **options)
        found = {group: intervals(each, groups[group], seed=settings.seed) for group, each in samples.items()}
    return MethodResult(name, metrics, found, parameters, samples, ceiling)
