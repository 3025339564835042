"""Manifests, statistics and a report of what was left out, from the rows of any data set."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...config import check_values, require
from ...utils.errors import UserError
from ...utils.files import check_new_folder, naming, new_folder, write_text
from ...utils.tables import write_csv
from ...utils.text import printable
from ..file_names import spellings
from ..manifest import NOTE, UNPRINTABLE, Sample
from .counts import cooccurrence, count, readable, without_positives
from .dataset import DataSet, PrepareConfig, SplitConfig
from .rows import Journal, Row
from .splits import SPLITS, check_patients


def build(dataset: DataSet, config: PrepareConfig) -> None:
    """Read a data set, check it, print its statistics and write it to `config.output`.

    Args:
        dataset: which.
        config: its settings.

    Raises:
        UserError: impossible settings, unusable tables, missing images, a patient in two splits, nothing left, or an
            output folder that is not empty.
    """
    _check(config)
    journal = Journal()
    classes, collected = dataset.read(config, journal)
    _check_classes(classes)
    root = Path(config.image_root or config.source)
    rows = _with_images(_unique(collected, journal), root, config.missing, journal)
    if not rows:
        reasons = "; ".join(f"{reason}: {len(entries):,}" for reason, entries in journal.dropped.items())
        raise UserError(f"source: no row is left ({reasons or 'the tables are empty'})")
    check_patients(rows)
    counts = count(rows, classes)
    if 0 < (texts := counts["all"]["texts"]) < len(rows):
        journal.warn(f"{len(rows) - texts:,} rows have no text; phase 1 needs one in every row")
    for split, names in without_positives(counts).items():
        journal.warn(f"{split}: no positive of {', '.join(names)}")
    seen = _seen(rows, classes)
    if seen:
        known = Path(config.output or "OUTPUT", "seen.txt")
        journal.warn(
            f"train: {len(seen['unseen'])} classes have no label; train on the others: data.class_names {known}"
        )
    report = {
        "dataset": dataset.name,
        "settings": {key: value for key, value in asdict(config).items() if key != "salt"},
        "rows": len(rows),
        "dropped": journal.summary(),
        "warnings": journal.warnings,
    }
    statistics = {"splits": counts, "pixels": _pixels(rows, root, config)}
    for line in _describe(dataset.name, readable(counts), statistics, report).split("\n"):
        print(printable(line))
    if config.dry_run:
        print("dry run: nothing was written")
        return
    with new_folder(config.output) as folder:
        _write(folder, rows, {"classes": list(classes), **seen}, config.salt)
        write_text(folder / "statistics.json", _json(statistics))
        # Relative, so that manifests and images can be moved together.
        place = os.path.relpath(os.path.realpath(root), os.path.realpath(config.output))
        write_text(folder / NOTE, _json({**report, "image_root": place}))
        write_csv(folder / "dropped.csv", ["reason", "place", "what"], _dropped(journal))
        if classes:
            matrix = cooccurrence(rows, classes).tolist()
            lines = ((name, *line) for name, line in zip(classes, matrix, strict=True))
            write_csv(folder / "cooccurrence.csv", ["", *classes], lines)
    splits = [split for split in SPLITS if split in counts]
    written = ", ".join(f"{split}.jsonl" for split in splits)
    without = ", ".join(split for split in SPLITS if split not in counts)
    rest = f"; no image is in {without}" if without else ""
    print(printable(f"wrote {written} to {config.output}, whose images are in {root}{rest}"))


def _check(config: PrepareConfig) -> None:
    check_values(config)
    require(source=config.source)
    if not Path(config.source).is_dir():
        raise UserError(f"source: {config.source} is no folder; name the one that the data set was downloaded to")
    if config.image_root is not None and not Path(config.image_root).is_dir():
        raise UserError(f"image_root: {config.image_root} is no folder")
    if not config.dry_run:
        require(output=config.output)
        check_new_folder(config.output)
    if config.salt == "":
        raise UserError("salt: must not be empty; leave it null for a random one")
    if isinstance(config, SplitConfig) and config.val_fraction + config.test_fraction > 1:
        raise UserError("val_fraction: together with test_fraction it must not exceed 1")


def _check_classes(classes: Sequence[str]) -> None:
    for name in classes:
        if UNPRINTABLE.search(name) or classes.count(name) > 1:
            raise UserError(
                f"source: the class name {name!r} stands twice or holds a control character; rename the column"
            )


def _unique(rows: Iterable[Row], journal: Journal) -> list[Row]:
    """The first row of every id, and of every file however its path is spelled."""
    first: dict[str, Row] = {}
    files: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if UNPRINTABLE.search(row.id + row.filepath):
            raise UserError(f"{row.place}: the image's name holds a control character; rename the file")
        places = tuple(unicodedata.normalize("NFC", place) for place in row.candidates)
        earlier = first[row.id] if row.id in first else files.setdefault(places, row)
        if earlier is row:
            first[row.id] = row
        else:
            same = (earlier.labels, earlier.split, earlier.patient) == (row.labels, row.split, row.patient)
            reason = "duplicate row" if same else "duplicate row that says something else (the first was kept)"
            journal.drop(reason, row.place, row.id)
    return list(first.values())


def _with_images(rows: list[Row], root: Path, missing: str, journal: Journal) -> list[Row]:
    """Rows with the place of their file, relative to `root`."""
    if missing == "keep":
        for row in rows:
            row.filepath = row.candidates[0]
        return rows
    kept: list[Row] = []
    taken: set[str] = set()
    for row in tqdm(rows, "looking for images", delay=2, disable=None, leave=False):
        spelled = (name for place in row.candidates for name in spellings(place))
        place = next((name for name in spelled if (root / name).is_file()), None)
        if place is None:
            journal.drop("missing image", row.place, row.candidates[0])
        elif (real := os.path.realpath(root / place)) in taken:
            journal.drop("duplicate row: a link to the file of another (the first was kept)", row.place, place)
        else:
            taken.add(real)
            row.filepath = place
            kept.append(row)
    lost = journal.dropped.get("missing image", [])
    if lost and missing == "error":
        place, image = lost[0]
        raise UserError(
            f"{len(lost):,} of {len(rows):,} images are missing in {root}, the first {image} ({place});"
            " name their folder with --image_root, or set --missing skip or keep"
        )
    return kept


def _pixels(rows: Sequence[Row], root: Path, config: PrepareConfig) -> dict[str, float] | None:
    """Mean and standard deviation in [0, 1] over the training images (of all, where there are none)."""
    if config.missing == "keep" or not config.pixel_samples:
        return None
    from ..statistics import pixel_statistics  # imports torch

    chosen = [row for row in rows if row.split == "train"] or rows
    samples = [Sample(id=row.id, path=root / row.filepath) for row in chosen]
    mean, std = pixel_statistics(samples, config.image_size, limit=config.pixel_samples)
    return {"mean": mean, "std": std, "images": min(len(samples), config.pixel_samples)}


def _describe(name: str, tables: str, statistics: dict[str, Any], report: dict[str, Any]) -> str:
    lines = [name, "", tables]
    pixels = statistics["pixels"]
    if pixels is not None:
        lines.append(f"pixels: mean {pixels['mean']:.4f}, std {pixels['std']:.4f} ({pixels['images']:,} images)")
    for reason, entry in report["dropped"].items():
        lines.append(f"left out: {entry['count']:,} × {reason}, e.g. {'; '.join(entry['first'][:3])}")
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    return "\n".join(lines)


def _write(folder: Path, rows: Sequence[Row], lists: dict[str, list[str]], salt: str | None) -> None:
    key = hashlib.blake2b(secrets.token_bytes(32) if salt is None else salt.encode()).digest()
    for split in SPLITS:
        chosen = [row for row in rows if row.split == split]
        if chosen:
            path = folder / f"{split}.jsonl"
            with naming(path), path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(_line(row, key), ensure_ascii=False) + "\n" for row in chosen)
    for stem, names in lists.items():
        if names:
            write_text(folder / f"{stem}.txt", "".join(f"{name}\n" for name in names))


def _seen(rows: Sequence[Row], classes: Sequence[str]) -> dict[str, list[str]]:
    """Classes with and without a label in training; nothing where all have one, or where none can have."""
    labelled = np.zeros(len(classes), dtype=bool)
    for row in rows:
        if row.split == "train" and row.labels is not None:
            labelled |= np.array([value is not None for value in row.labels])
            if labelled.all():
                return {}
    if not labelled.any():
        return {}
    return {
        "seen": [name for name, known in zip(classes, labelled, strict=True) if known],
        "unseen": [name for name, known in zip(classes, labelled, strict=True) if not known],
    }


def _line(row: Row, key: bytes) -> dict[str, Any]:
    line: dict[str, Any] = {"id": row.id, "filepath": row.filepath}
    if row.text is not None:
        line["text"] = row.text
    if row.labels is not None:
        line["labels"] = row.labels
    if row.patient is not None:
        line["patient_id"] = hashlib.blake2b(row.patient.encode(), key=key, digest_size=8).hexdigest()
    return line


def _dropped(journal: Journal) -> Iterable[tuple[str, str, str]]:
    return ((reason, place, what) for reason, entries in journal.dropped.items() for place, what in entries)


def _json(document: Any) -> str:
    return json.dumps(document, indent=1) + "\n"
