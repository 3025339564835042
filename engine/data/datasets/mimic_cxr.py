"""MIMIC-CXR-JPG (https://physionet.org/content/mimic-cxr-jpg) with the reports of MIMIC-CXR (.../mimic-cxr).

Expects in the source `mimic-cxr-2.0.0-metadata.csv`, `-split.csv` and `-chexpert.csv` (plain or .gz) and the images as
`files/p10/p10000032/s50414267/….jpg`; and in `reports` the unpacked `mimic-cxr-reports.zip`, that is
`files/p10/p10000032/s50414267.txt`.

The paper's choices: frontal views (ViewPosition PA or AP); the text is the report's impression or conclusion, see
`reports.py`, and images whose report has none are left out and counted by the reason: no text, no headings, an
impression that is another's or empty, or none at all. Official splits. Labels are CheXpert's 14,
given for each study (null where it is not in the table), as in `chexpert.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...utils.errors import UserError
from ..preparation.dataset import DataSet, PrepareConfig
from ..preparation.reports import impression, why_none
from ..preparation.rows import Journal, Labels, Row
from ..tables import Table, find_table

SPLITS = {"train": "train", "validate": "val", "test": "test"}


@dataclass(kw_only=True)
class MimicConfig(PrepareConfig):
    """Manifests from MIMIC-CXR-JPG: frontal views with the impression of their report, official splits."""

    reports: str | None = None
    """folder that holds the reports' files/p10/…; null: no texts, for phase 2 only"""


def read(config: MimicConfig, journal: Journal) -> tuple[list[str], Iterator[Row]]:
    """Class names in the order of the table, and the frontal views."""
    if config.reports is None:
        journal.warn("no reports: the manifests hold no text, which phase 1 needs; name the folder with --reports")
    elif not Path(config.reports, "files").is_dir():
        raise UserError(f"reports: {config.reports} holds no folder files/; unpack mimic-cxr-reports.zip")
    metadata = Table(_find(config, "metadata"), ["dicom_id", "subject_id", "study_id", "ViewPosition"])
    labels = Table(_find(config, "chexpert"), ["subject_id", "study_id"])
    splits = Table(_find(config, "split"), ["dicom_id", "split"])
    classes = [name for name in labels.columns if name and name not in {"subject_id", "study_id"}]
    return classes, _rows(metadata, _splits(splits), _labels(labels, classes), classes, config, journal)


def _find(config: MimicConfig, name: str) -> Path:
    return find_table(config.source, f"mimic-cxr-2.*-{name}.csv")


def _splits(table: Table) -> dict[str, str]:
    try:
        return {line["dicom_id"]: SPLITS[line["split"]] for line in table}
    except KeyError:
        raise UserError(f"{table.path}: column 'split' must be train, validate or test") from None


def _labels(table: Table, classes: list[str]) -> dict[str, Labels]:
    return {line["study_id"]: line.labels(classes) for line in table}


def _rows(
    metadata: Table,
    splits: dict[str, str],
    labels: dict[str, Labels],
    classes: list[str],
    config: MimicConfig,
    journal: Journal,
) -> Iterator[Row]:
    texts: dict[str, tuple[str | None, str]] = {}
    for line in metadata:
        image, patient, study = line["dicom_id"], line["subject_id"], line["study_id"]
        if line["ViewPosition"] not in {"PA", "AP"}:
            known = "not a frontal view" if line["ViewPosition"] else "view position not given"
            journal.drop(known, line.place, image)
            continue
        if image not in splits:
            journal.drop("in no split", line.place, image)
            continue
        study_folder = f"files/p{patient[:2]}/p{patient}/s{study}"
        text = None
        if config.reports is not None:
            if study not in texts:
                texts[study] = _text(Path(config.reports, f"{study_folder}.txt"))
            text, reason = texts[study]
            if text is None:
                journal.drop(reason, line.place, f"{study_folder}.txt")
                continue
        yield Row(
            id=image,
            filepath=f"{study_folder}/{image}.jpg",
            split=splits[image],
            place=line.place,
            labels=labels.get(study, [None] * len(classes)),
            patient=patient,
            text=text,
        )


def _text(path: Path) -> tuple[str | None, str]:
    """The impression of a report, else why there is none."""
    if not path.is_file():
        return None, "no report"
    report = path.read_text("utf-8-sig", "replace")
    text = impression(report)
    return text, "" if text else why_none(report)


DATASET = DataSet(
    "mimic-cxr",
    "manifests from MIMIC-CXR-JPG and its reports",
    MimicConfig,
    read,
    "--source raw/mimic-cxr-jpg --reports raw/mimic-cxr --output data/mimic-cxr",
)
