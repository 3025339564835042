"""calibration.json of a model folder or classifier: its classes' calibration and operating points.

A class's probability is σ(slope · z + intercept) of its log-odds z, so that the order of its scores, and its AUC, stay.
They hold for the weights, the classes, the context bank and the blend that they were fitted with, and the file names
all of them. Its checksum is its own, as that of `state.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import BlendName
from ..utils.documents import Within, as_schema
from ..utils.errors import UserError
from .integrity import digest_of, sha256_of
from .run import read_json, write_json

FILE = "calibration.json"
REPEAT = "run pspg-engine calibrate again"


@dataclass(frozen=True, kw_only=True)
class ClassCalibration:
    """One class."""

    name: str
    slope: Annotated[float, Within(1e-12, 1e12)]
    intercept: Annotated[float, Within(-1e12, 1e12)]
    group: str | None
    """classes that share slope and intercept; None: not calibrated, slope 1 and intercept 0"""
    threshold: Annotated[float, Within(0, 1)] | None
    """probability above which the class counts as found; None: the validation could not tell"""
    positives: Annotated[int, Within(0)]
    """of the validation"""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """calibration.json."""

    format: Literal["pspg-calibration/1"] = "pspg-calibration/1"
    classes: list[ClassCalibration]
    blend: BlendName | None
    """None: that of a classifier, which is frozen"""
    blend_weight: float | None
    method: Literal["platt", "temperature"]
    point: str
    """what the thresholds were chosen for"""
    data: str
    """name of the validation manifest"""
    images: Annotated[int, Within(1)]
    """of the validation"""
    weights: str
    """SHA-256 of the file of weights"""

    @property
    def names(self) -> list[str]:
        return [row.name for row in self.classes]

    def of(self, names: Sequence[str]) -> Calibration:
        """Some of the classes, in this order."""
        row_of = {row.name: row for row in self.classes}
        return replace(self, classes=[row_of[name] for name in names])

    def lines(self) -> Tensor:
        """(2,C), float64: slopes and intercepts."""
        rows = [[row.slope for row in self.classes], [row.intercept for row in self.classes]]
        return torch.tensor(rows, dtype=torch.float64)

    def thresholds(self) -> NDArray[np.float64]:
        """(C,): the classes' thresholds, NaN where there is none."""
        return np.array([np.nan if row.threshold is None else row.threshold for row in self.classes])

    def misfit(self, names: Sequence[str], blend: BlendName, blend_weight: float | None) -> str | None:
        """Why it does not hold for a model's scores of these classes under its bank; None: it does.

        The classes of a list change one another's scores, so the list must be the same.
        """
        if set(names) != set(self.names):
            return f"was fitted for another class list, of {len(self.classes)} classes"
        if (blend, blend_weight) != (self.blend, self.blend_weight):
            weight = "" if self.blend_weight is None else f" of weight {self.blend_weight:g}"
            return f"was fitted under blend {self.blend}{weight}"
        return None


def write_calibration(folder: Path, calibration: Calibration, weights: Path) -> None:
    """Write calibration.json, bound to a file of weights and with its checksum."""
    document = asdict(replace(calibration, weights=sha256_of(weights)))
    write_json(folder / FILE, {**document, "sha256": digest_of(document)})


def read_calibration(folder: Path) -> Calibration | None:
    """The calibration in a folder; None if there is none. Whether it belongs to the weights is asked elsewhere.

    Raises:
        UserError: damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    document = read_json(file)
    try:
        calibration = as_schema(Calibration, document)
    except ValueError as error:
        raise UserError(f"{file}: is damaged ({error}); {REPEAT}, or remove it") from None
    if document.get("sha256") != digest_of(document):
        raise UserError(f"{file}: wrong checksum; {REPEAT}, or remove it")
    if not calibration.classes or len(set(calibration.names)) < len(calibration.names):
        raise UserError(f"{file}: is damaged (classes are missing or doubled); {REPEAT}, or remove it")
    return calibration
