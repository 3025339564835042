"""PadChest (https://bimcv.cipf.es/bimcv-projects/padchest).

Expects `PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv` and the images either in the folders of the column
ImageDir (`0/` … `54/`, as the archives are called) or all in one.

The paper's subset: rows labelled by radiologists (`MethodLabel` is Physician) in the projections PA, AP and
AP_horizontal, and labels with more than 50 positives among them: 26,432 images and 108 classes. Labels come as Python
lists with stray spaces and empty strings. A class that a row does not list is 0. There are no official splits. The
reports are Spanish, reduced to word stems, and not used.

Three of the paper's 108 classes are not seen in the one image: `exclude` and `suboptimal study` say that it should not
be read, `unchanged` compares it with an earlier one. `not_findings` says what becomes of them; the default is the
paper's. `normal` is a class like others, an absence (`models/absence.py`).
"""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from ..preparation.dataset import DataSet, SplitConfig
from ..preparation.rows import Journal, Row
from ..preparation.splits import split_by_hash
from ..tables import Line, Table, find_table

FRONTAL = {"PA", "AP", "AP_horizontal"}
UNUSABLE = {"exclude", "suboptimal study"}
NOT_FINDINGS = UNUSABLE | {"unchanged"}
COLUMNS = ("ImageID", "ImageDir", "PatientID", "Projection", "MethodLabel", "Labels")


@dataclass(kw_only=True)
class PadChestConfig(SplitConfig):
    """Manifests from PadChest: frontal views labelled by radiologists, labels with enough positives."""

    min_positives: int = 51
    """labels with fewer positives are left out (the paper keeps those with more than 50: 108 of them)"""
    not_findings: Literal["keep", "drop_classes", "drop_images"] = "keep"
    """what becomes of exclude, suboptimal study and unchanged. keep: they are classes, as in the paper; drop_classes:
    they are none, their images stay; drop_images: likewise, and images marked exclude or suboptimal study go, too"""


def read(config: PadChestConfig, journal: Journal) -> tuple[list[str], list[Row]]:
    """Class names in alphabetical order, and the rows of the paper's subset."""
    table = Table(find_table(config.source, "PADCHEST_chest_x_ray_images_labels_160K*.csv"), COLUMNS)
    found = [(line, names) for line in table if (names := _select(line, config, journal)) is not None]
    positives = Counter(name for _, names in found for name in names)
    classes = sorted((name for name, number in positives.items() if number >= config.min_positives), key=str.casefold)
    if config.not_findings != "keep":
        for name in sorted(NOT_FINDINGS & set(classes)):
            journal.drop("class that is no finding (not_findings)", table.path.name, f"{name} ({positives[name]})")
        classes = [name for name in classes if name not in NOT_FINDINGS]
    for name, number in positives.most_common():
        if number < config.min_positives:
            journal.drop("class with too few positives", table.path.name, f"{name} ({number})")
    fractions = {"test": config.test_fraction, "val": config.val_fraction}
    rows = [
        Row(
            id=line["ImageID"].rsplit(".", 1)[0],
            filepath=line["ImageID"],
            folders=(line["ImageDir"], ""),
            split=split_by_hash(line["PatientID"] or line["ImageID"], config.seed, fractions),
            place=line.place,
            labels=[int(name in names) for name in classes],
            patient=line["PatientID"] or None,
        )
        for line, names in found
    ]
    return classes, rows


def _select(line: Line, config: PadChestConfig, journal: Journal) -> set[str] | None:
    """The labels of a row that belongs to the subset."""
    image = line["ImageID"]
    if line["MethodLabel"] != "Physician":
        journal.drop("not labelled by a radiologist", line.place, image)
    elif line["Projection"] not in FRONTAL:
        journal.drop("not a frontal view", line.place, image)
    elif (names := parse_labels(line["Labels"])) is None:
        journal.drop("labels that are no list", line.place, image)
    elif config.not_findings == "drop_images" and names & UNUSABLE:
        journal.drop("marked exclude or suboptimal study (not_findings)", line.place, image)
    else:
        return names
    return None


def parse_labels(cell: str) -> set[str] | None:
    """Names in a Python list of strings, less stray spaces and empty strings; None: it is no such list."""
    try:
        names = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return {" ".join(name.split()) for name in names} - {""}


DATASET = DataSet(
    "padchest",
    "manifests from PadChest",
    PadChestConfig,
    read,
    "--source raw/PadChest --output data/padchest",
)
