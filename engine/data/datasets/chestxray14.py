"""ChestX-ray14 of the NIH (https://nihcc.app.box.com/v/ChestXray-NIHCC).

Expects `Data_Entry_2017*.csv` (labels joined by `|`), `train_val_list.txt` and `test_list.txt`, and the images in
`images_001/images/` … `images_012/images/`, in one folder `images/`, or in the source itself. Under `missing: keep`,
where files are not looked for, they are taken to be in `images/`.

All images are frontal (PA or AP). The official test list stays as it is; validation patients are drawn from the other.
Fifteen classes: 14 findings and No Finding, with spaces for underscores; a class that a row does not list is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...utils.errors import UserError
from ..preparation.dataset import DataSet, SplitConfig
from ..preparation.rows import Journal, Row
from ..preparation.splits import split_by_hash
from ..tables import Line, Table, find_table

FOLDERS = ("images", "", *(f"images_{number:03d}/images" for number in range(1, 13)))


@dataclass(kw_only=True)
class ChestXray14Config(SplitConfig):
    """Manifests from ChestX-ray14: 15 classes; the official test list, validation patients from the rest."""

    split: Literal["official", "hash"] = "official"
    """official: test_list.txt is the test and test_fraction is not used; hash: no lists are needed"""


def read(config: ChestXray14Config, journal: Journal) -> tuple[list[str], list[Row]]:
    """Class names in alphabetical order, and all rows."""
    columns = ("Image Index", "Finding Labels", "Patient ID")
    table = Table(find_table(config.source, "Data_Entry_2017*.csv"), columns)
    official = _official(config)
    lines = list(table)
    found = [_names(line) for line in lines]
    classes = sorted(set().union(*found), key=str.casefold)
    rows = []
    for line, names in zip(lines, found, strict=True):
        image, patient = line["Image Index"], line["Patient ID"]
        fractions = {"val": config.val_fraction}
        if official is None:
            fractions = {"test": config.test_fraction, "val": config.val_fraction}
        elif image not in official:
            journal.drop("in neither split list", line.place, image)
            continue
        split = split_by_hash(patient, config.seed, fractions)
        rows.append(
            Row(
                id=image.rsplit(".", 1)[0],
                filepath=image,
                folders=FOLDERS,
                split="test" if official and official[image] == "test" else split,
                place=line.place,
                labels=[int(name in names) for name in classes],
                patient=patient,
            )
        )
    return classes, rows


def _names(line: Line) -> set[str]:
    return {name.replace("_", " ").strip() for name in line["Finding Labels"].split("|")} - {""}


def _official(config: ChestXray14Config) -> dict[str, str] | None:
    """Image → train_val or test."""
    if config.split == "hash":
        return None
    try:
        found: dict[str, str] = {}
        for name in ("train_val", "test"):
            path = find_table(config.source, f"{name}_list.txt")
            for number, image in enumerate(path.read_text(encoding="utf-8-sig").split(), 1):
                if found.setdefault(image, name) != name:
                    raise UserError(f"{path}:{number}: {image} is in both split lists; download them again")
        return found
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; download it again") from None


DATASET = DataSet(
    "chestxray14",
    "manifests from the NIH's ChestX-ray14",
    ChestXray14Config,
    read,
    "--source raw/ChestX-ray14 --output data/chestxray14",
)
