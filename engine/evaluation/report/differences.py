"""The method under evaluation against each other one: differences on the same images and the same resamples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..bootstrap import Interval, interval
from .evaluation import Evaluation, MethodResult

TOTALS = ("macro_auc", "micro_auc", "map_ap", "map_trapezoid")
PER_CLASS = ("auc", "ap")


@dataclass(frozen=True)
class Difference:
    """A metric of the method under evaluation less that of another, with its paired 95 % interval."""

    value: float
    interval: Interval

    @property
    def clear(self) -> bool:
        """The interval leaves out zero."""
        return self.interval.low > 0 or self.interval.high < 0


def differences(evaluation: Evaluation, other: MethodResult, group: str) -> Mapping[str, Difference]:
    """Differences of the totals of a group; none where one of the two was not resampled."""
    own = evaluation.method
    if group not in own.samples or group not in other.samples:
        return {}
    return {
        key: Difference(
            getattr(own.metrics[group], key) - getattr(other.metrics[group], key),
            interval(getattr(own.samples[group], key) - getattr(other.samples[group], key)),
        )
        for key in TOTALS
    }


def class_differences(evaluation: Evaluation, other: MethodResult) -> dict[str, dict[str, Difference]]:
    """Class name → differences of AUC and average precision, of the classes of the main group."""
    own, group = evaluation.method, evaluation.main_group
    if group not in own.samples or group not in other.samples:
        return {}
    one, two = own.samples[group], other.samples[group]
    pairs = zip(own.metrics[group].per_class, other.metrics[group].per_class, strict=True)
    return {
        mine.name: {
            key: Difference(
                getattr(mine, key) - getattr(theirs, key), interval(getattr(one, key)[:, c] - getattr(two, key)[:, c])
            )
            for key in PER_CLASS
        }
        for c, (mine, theirs) in enumerate(pairs)
    }
