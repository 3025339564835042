"""VinDr-CXR, from PhysioNet (https://physionet.org/content/vindr-cxr) or Kaggle (VinBigData Chest X-ray Abnormalities).

PhysioNet: `annotations/image_labels_train.csv` (image_id, rad_id, 28 labels; a row for each of three readers) and
`annotations/image_labels_test.csv` (image_id, 28 labels; the consensus of five readers), images `train/*.dicom` and
`test/*.dicom`. The official test stays as it is; validation images are drawn from the training images.

Kaggle: `train.csv` (image_id, class_name, class_id, rad_id, a box; a row for each box and reader; 14 findings and No
finding), images `train/*.dicom`. Its test set has no labels, so that all splits are drawn from the training images.

A class is 1 where `min_readers` of the readers say so, else 0. All views are PA. There are no patient ids.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jsonargparse.typing import PositiveInt

from ...utils.errors import UserError
from ..preparation.dataset import DataSet, SplitConfig
from ..preparation.rows import Journal, Row
from ..preparation.splits import split_by_hash
from ..tables import Line, Table, find_table, find_tables

# The two tables of PhysioNet do not agree on the number of this class.
SAME = {"Other disease": "Other diseases"}


@dataclass(kw_only=True)
class VinDrConfig(SplitConfig):
    """Manifests from VinDr-CXR (PhysioNet, 28 classes) or its Kaggle edition (15): consensus of the readers."""

    min_readers: PositiveInt = 2
    """readers who must see a class, of the three of a training image"""
    suffix: str = ".dicom"
    """suffix of the image files; .png or .jpg for copies that were converted"""


@dataclass
class Votes:
    """Readings of one image: reader → classes seen."""

    place: str
    readers: dict[str, set[str]]

    def labels(self, classes: list[str], min_readers: int) -> list[int | None]:
        """1 for the classes that at least `min_readers` saw."""
        return [int(sum(name in seen for seen in self.readers.values()) >= min_readers) for name in classes]


def read(config: VinDrConfig, journal: Journal) -> tuple[list[str], Iterator[Row]]:
    """Class names in the order of the training table (Kaggle: of the class numbers), and all images."""
    journal.warn("there are no patient ids: images are split one by one, and one patient's may be in two splits")
    for folder in (Path(config.source, "annotations"), Path(config.source)):
        if find_tables(folder, "image_labels_train.csv"):
            return _physionet(folder, config, journal)
    return _kaggle(config, journal)


def _physionet(folder: Path, config: VinDrConfig, journal: Journal) -> tuple[list[str], Iterator[Row]]:
    train = Table(find_table(folder, "image_labels_train.csv"), ["image_id", "rad_id"])
    test = Table(find_table(folder, "image_labels_test.csv"), ["image_id"])
    classes, of_test = _classes(train), _classes(test)
    if set(of_test.values()) != set(classes.values()):
        raise UserError(f"{test.path}: its labels are not those of {train.path.name}")
    names = list(classes.values())

    def rows() -> Iterator[Row]:
        votes: dict[str, Votes] = {}
        for line in train:
            seen = {name for name, value in zip(names, line.labels(list(classes)), strict=True) if value == 1}
            _vote(votes, line, line["rad_id"], seen)
        yield from _consensus(votes, names, config, {"val": config.val_fraction}, journal)
        for line in test:
            values = dict(zip(of_test.values(), line.labels(list(of_test)), strict=True))
            labels = [values[name] for name in names]
            yield _row(line["image_id"], "test", "test", line.place, labels, config)

    return names, rows()


def _kaggle(config: VinDrConfig, journal: Journal) -> tuple[list[str], Iterator[Row]]:
    path = find_table(config.source, "train.csv", "image_labels_train.csv")
    table = Table(path, ["image_id", "class_name", "class_id", "rad_id"])
    votes: dict[str, Votes] = {}
    numbers: dict[str, int] = {}
    for line in table:
        if not line["class_id"].isdecimal():
            raise UserError(f"{path}:{line.number}: column 'class_id' must be a number")
        numbers[line["class_name"]] = int(line["class_id"])
        _vote(votes, line, line["rad_id"], {line["class_name"]})
    classes = sorted(numbers, key=lambda name: numbers[name])
    fractions = {"test": config.test_fraction, "val": config.val_fraction}
    return classes, _consensus(votes, classes, config, fractions, journal)


def _classes(table: Table) -> dict[str, str]:
    """Column → class name."""
    return {name: SAME.get(name, name) for name in table.columns if name not in {"", "image_id", "rad_id"}}


def _vote(votes: dict[str, Votes], line: Line, reader: str, seen: set[str]) -> None:
    image = votes.setdefault(line["image_id"], Votes(line.place, defaultdict(set)))
    image.readers[reader] |= seen


def _consensus(
    votes: dict[str, Votes],
    classes: list[str],
    config: VinDrConfig,
    fractions: Mapping[str, float],
    journal: Journal,
) -> Iterator[Row]:
    for image, vote in votes.items():
        if len(vote.readers) < config.min_readers:
            journal.drop("fewer readers than min_readers", vote.place, image)
            continue
        split = split_by_hash(image, config.seed, fractions)
        yield _row(image, "train", split, vote.place, vote.labels(classes, config.min_readers), config)


def _row(image: str, folder: str, split: str, place: str, labels: list[int | None], config: VinDrConfig) -> Row:
    return Row(id=image, filepath=f"{folder}/{image}{config.suffix}", split=split, place=place, labels=labels)


DATASET = DataSet(
    "vindr-cxr",
    "manifests from VinDr-CXR or VinBigData",
    VinDrConfig,
    read,
    "--source raw/vindr-cxr --output data/vindr",
)
