"""Counts of a prepared data set, as data and as a table for people."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rows import Row
from .splits import SPLITS

NULL = -2
VALUES = {"1": 1, "0": 0, "-1": -1, "null": NULL}


def count(rows: Sequence[Row], classes: Sequence[str]) -> dict[str, Any]:
    """Rows, their digest, patients (None: not known), texts, and how often each class is 1, 0, -1 and null.

    In all and by split.
    """
    groups = {"all": list(rows)} | {split: [row for row in rows if row.split == split] for split in SPLITS}
    return {
        name: {
            "rows": len(group),
            "digest": digest(group),
            "patients": len({row.patient for row in group} - {None}) or None,
            "texts": sum(row.text is not None for row in group),
            "classes": _levels(group, classes),
        }
        for name, group in groups.items()
        if group
    }


def digest(rows: Sequence[Row]) -> str:
    """Of ids and labels, whatever the order of the rows: who has the same has the same split."""
    lines = sorted(json.dumps([row.id, row.labels]) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def cooccurrence(rows: Sequence[Row], classes: Sequence[str]) -> NDArray[np.int64]:
    """(C,C): rows in which both classes are 1; the diagonal counts each class."""
    present = (_matrix(rows, len(classes)) == 1).astype(np.float64)
    return (present.T @ present).astype(np.int64)


def _levels(rows: Sequence[Row], classes: Sequence[str]) -> dict[str, dict[str, int]]:
    matrix = _matrix(rows, len(classes))
    counts = {key: (matrix == value).sum(0).tolist() for key, value in VALUES.items()}
    return {name: {key: counts[key][column] for key in VALUES} for column, name in enumerate(classes)}


def _matrix(rows: Sequence[Row], width: int) -> NDArray[np.int8]:
    labels = [[NULL if value is None else value for value in row.labels or ()] for row in rows]
    return np.array(labels, dtype=np.int8).reshape(len(rows), width)


def without_positives(counts: dict[str, Any]) -> dict[str, list[str]]:
    """Split → classes that are 1 nowhere in it."""
    empty = {
        split: [name for name, levels in group["classes"].items() if not levels["1"]]
        for split, group in counts.items()
        if split != "all"
    }
    return {split: names for split, names in empty.items() if names}


def readable(counts: dict[str, Any]) -> str:
    """Two tables: splits, and classes with their positives in each split."""
    splits = [name for name in counts if name != "all"]
    sizes = [["split", "rows", "patients", "with text", "digest"]]
    for name in [*splits, "all"]:
        numbers = [counts[name][key] for key in ("rows", "patients", "texts")]
        cells = ["unknown" if number is None else f"{number:,}" for number in numbers]
        sizes.append([name, *cells, counts[name]["digest"]])
    classes = [["class", *VALUES, *(f"1 in {split}" for split in splits)]]
    for name, levels in counts["all"]["classes"].items():
        by_split = [counts[split]["classes"][name]["1"] for split in splits]
        classes.append([name, *(f"{number:,}" for number in [*levels.values(), *by_split])])
    return _table(sizes) + ("\n" + _table(classes) if len(classes) > 1 else "")


def _table(cells: list[list[str]]) -> str:
    first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    return "".join(
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], widths, strict=True))])
        + "\n"
        for row in cells
    )
