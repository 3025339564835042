"""CheXpert (https://stanfordmlgroup.github.io/competitions/chexpert), small or full size.

Expects `train.csv` and `valid.csv` (Path, Sex, Age, Frontal/Lateral, AP/PA, then 14 labels of 1, 0, -1 or nothing) and
the folders `train/` and `valid/` beside them; or, side by side, what the archives of the full size unpack to:
`CheXpert-v1.0 batch 1 (validate & csv)/` with the tables and `valid/`, and `CheXpert-v1.0 batch 2 (train 1)/` to
`batch 4 (train 3)/`. The radiologists' test labels were published later, with CheXlocalize (`test_labels.csv`, or
`groundtruth.csv`: Path, then the 14 labels); the images belong in `test/`.

Paths are taken without their `CheXpert-v1.0(-small)/`, so that the source may have any name. Frontal views only,
official splits; -1 (uncertain) and null (not mentioned) are kept: training decides (`data.uncertain`, `data.blank`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...utils.errors import UserError
from ..preparation.dataset import DataSet, PrepareConfig
from ..preparation.rows import Journal, Row
from ..tables import Table, find_table, find_tables

ABOUT = {"Path", "Sex", "Age", "Frontal/Lateral", "AP/PA"}
# Where the images of a split may be; the first is where they are taken to be when nobody looks.
BATCH1 = "CheXpert-v1.0 batch 1 (validate & csv)"
FOLDERS = {
    "train": ("train", *(f"CheXpert-v1.0 batch {number + 1} (train {number})" for number in (1, 2, 3))),
    "valid": ("valid", f"{BATCH1}/valid"),
    "test": ("test",),
}
PREFIX = re.compile(r"^/?CheXpert-v1\.0[^/]*/")
PATH = re.compile(r"(train|valid|test)/((patient\d+)/.+)")


@dataclass(kw_only=True)
class CheXpertConfig(PrepareConfig):
    """Manifests from CheXpert: frontal views, 14 labels, official splits (train, valid and, if given, test)."""

    test_labels: str | None = None
    """table of the test labels; null: test_labels.csv or groundtruth.csv in the source, if there is one"""


def read(config: CheXpertConfig, journal: Journal) -> tuple[list[str], Iterator[Row]]:
    """Class names in the order of the tables, and the frontal views."""
    batch1 = Path(config.source, BATCH1)
    folder = batch1 if batch1.is_dir() and not find_tables(config.source, "train.csv") else config.source
    tables = {
        "train": Table(find_table(folder, "train.csv"), ["Path", "Frontal/Lateral"]),
        "val": Table(find_table(folder, "valid.csv"), ["Path", "Frontal/Lateral"]),
    }
    test = _test_table(config)
    if test is None:
        journal.warn("no test labels: neither test_labels.csv nor groundtruth.csv; there is no test split")
    else:
        tables["test"] = Table(test, ["Path"])
    classes = [name for name in tables["train"].columns if name and name not in ABOUT]
    for table in tables.values():
        if set(table.columns) - ABOUT - {""} != set(classes):
            raise UserError(f"{table.path}: its labels are not those of {tables['train'].path.name}")
    return classes, _rows(tables, classes, journal)


def _test_table(config: CheXpertConfig) -> Path | None:
    if config.test_labels is not None:
        return Path(config.test_labels)
    names = ("test_labels.csv", "groundtruth.csv")
    return find_table(config.source, *names) if find_tables(config.source, *names) else None


def _rows(tables: dict[str, Table], classes: list[str], journal: Journal) -> Iterator[Row]:
    for split, table in tables.items():
        for line in table:
            path = PREFIX.sub("", line["Path"])
            match = PATH.fullmatch(path)
            if match is None:
                raise UserError(f"{table.path}:{line.number}: column 'Path' must look like train/patient00001/…")
            folder, file, patient = match.groups()
            view = line.get("Frontal/Lateral") or ("Frontal" if "frontal" in path.rsplit("/", 1)[-1] else "Lateral")
            if view != "Frontal":
                journal.drop("lateral view", line.place, path)
                continue
            yield Row(
                id=path.rsplit(".", 1)[0],
                filepath=file,
                folders=FOLDERS[folder],
                split=split,
                place=line.place,
                labels=line.labels(classes),
                patient=patient,
            )


DATASET = DataSet(
    "chexpert",
    "manifests from CheXpert",
    CheXpertConfig,
    read,
    "--source raw/CheXpert-v1.0 --output data/chexpert",
)
