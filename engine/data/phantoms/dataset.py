"""Phantom data set: drawn chest radiographs with reports and labels, so that the engine runs and is tested anywhere.

It never passes as clinical. Sides are the patient's: the patient's right is on the image's left, so a horizontal flip
makes labels wrong; train with `data.flip: 0`.

*Unseen* is said of class lists: `unseen.txt` and `unseen_types.txt` name classes that phase 2 never trains on. Images
and reports show and mention everything in every split, as image–report pairs in the wild do.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tqdm import tqdm

from ...utils.documents import read_json
from ...utils.errors import UserError
from ...utils.files import naming, partial_folder, replacing, write_text
from .drawing import draw_radiograph
from .report import write_report
from .vocabulary import Finding, draw_findings, label_row, make_vocabulary

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
FORMAT = 1  # raise it whenever the same configuration gives other images, reports or labels
CONFIG_FILE = "phantoms.json"
STORED = {"image_size": "size"}
"""settings that files have under an earlier name"""
FINDINGS_FILE = "findings.jsonl"
CHUNK = 64


@dataclass(kw_only=True)
class PhantomConfig:
    """A phantom data set. Images depend on the seed, the split, their index there, image_size and classes."""

    train: int = 6000
    """training images"""
    val: int = 600
    """validation images"""
    test: int = 1500
    """test images"""
    image_size: int = 64
    """side of an image, pixels"""
    classes: int = 52
    """class names in all: seen ones, unseen compositions and unseen types; images show only kinds that they name"""
    seed: int = 0


def check_phantoms(config: PhantomConfig) -> None:
    """Refuse values that cannot be drawn.

    Raises:
        UserError: naming the key and its range.
    """
    for key in SPLITS:
        if getattr(config, key) < 0:
            raise UserError(f"{key}: must not be negative, got {getattr(config, key)}")
    if config.train + config.val + config.test == 0:
        raise UserError("train: no images asked for; give train, val or test at least 1")
    if not 16 <= config.image_size <= 2048:
        raise UserError(f"image_size: must lie between 16 and 2048 pixels, got {config.image_size}")
    if config.seed < 0:
        raise UserError(f"seed: must not be negative, got {config.seed}")
    make_vocabulary(config.classes)


def write_phantoms(config: PhantomConfig, folder: str | Path, *, workers: int | None = None) -> None:
    """Write images/*.png (8-bit grey), {train,val,test}.jsonl, findings.jsonl, phantoms.json and the class lists.

    Class lists: classes.txt (all names, the order of the manifests' label lists), seen.txt, unseen.txt (compositions)
    and unseen_types.txt. The same configuration gives the same bytes on any number of `workers` (null: all cores) with
    the same NumPy and Pillow. Nothing half-written is left at `folder`: files grow in a sibling folder that is renamed
    at the end. A folder that holds the same configuration is kept as it is, with a message.

    Raises:
        UserError: an impossible configuration, or `folder` is a file or holds anything else.
    """
    check_phantoms(config)
    target = Path(folder)
    if _holds(target, config):
        log.info(f"{target}: already holds these phantoms; reused")
        return
    with partial_folder(target.resolve()) as partial:
        (partial / "images").mkdir()
        _write(config, partial, workers)


def _holds(target: Path, config: PhantomConfig) -> bool:
    """True if `target` holds these phantoms, False if it is empty or not there; anything else is refused."""
    if not target.exists():
        return False
    if not target.is_dir():
        raise UserError(f"{target}: is a file; name a new or empty folder for the phantoms")
    if not any(target.iterdir()):
        return False
    try:
        stored = read_json(target / CONFIG_FILE)
    except UserError:
        raise UserError(f"{target}: not empty and not a phantom data set; name a new or empty folder") from None
    if stored != _stored(config):
        raise UserError(f"{target}: holds phantoms of another configuration; name a new folder or delete it")
    return True


def _stored(config: PhantomConfig) -> dict[str, Any]:
    return {"format": FORMAT, "config": {STORED.get(key, key): value for key, value in asdict(config).items()}}


def _write(config: PhantomConfig, folder: Path, workers: int | None) -> None:
    vocabulary = make_vocabulary(config.classes)
    lists = {
        "classes": vocabulary.names,
        "seen": vocabulary.seen,
        "unseen": vocabulary.unseen,
        "unseen_types": vocabulary.unseen_types,
    }
    for stem, names in lists.items():
        write_text(folder / f"{stem}.txt", "".join(f"{name.name}\n" for name in names))
    places = [(split, index) for split in SPLITS for index in range(getattr(config, split))]
    with naming(folder), ExitStack() as stack:
        files = {
            stem: stack.enter_context((folder / f"{stem}.jsonl").open("w", encoding="utf-8"))
            for stem in (*SPLITS, "findings")
        }
        drawn = tqdm(
            _map(config, folder, places, workers), total=len(places), desc="phantoms", unit="img", disable=None
        )
        for (split, _), (row, findings) in zip(places, drawn, strict=True):
            files[split].write(json.dumps(row) + "\n")
            shown = {"id": row["id"], "findings": [asdict(finding) for finding in findings]}
            files["findings"].write(json.dumps(shown) + "\n")
    write_text(folder / CONFIG_FILE, json.dumps(_stored(config), indent=2) + "\n")


Radiograph = tuple[dict[str, Any], list[Finding]]


def _map(
    config: PhantomConfig, folder: Path, places: list[tuple[str, int]], workers: int | None
) -> Iterator[Radiograph]:
    make = partial(_make_radiograph, config, str(folder))
    workers = min(workers or len(os.sched_getaffinity(0)), -(-len(places) // CHUNK))
    if workers <= 1:
        yield from map(make, places)
        return
    # Not fork: the caller may hold torch's threads.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(make, places, chunksize=CHUNK)


def _make_radiograph(config: PhantomConfig, folder: str, place: tuple[str, int]) -> Radiograph:
    """Draw and save one image; its manifest row and findings."""
    pixels, row, findings = _drawn(config, *place)
    path = Path(folder, row["filepath"])
    with naming(path):
        Image.fromarray(pixels).save(path, compress_level=4)
    return row, findings


def draw_phantom(config: PhantomConfig, split: str, index: int) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """One radiograph of the data set in memory: uint8 (image_size,image_size), and its line of the manifest.

    The same as `write_phantoms` writes, however many images the configuration counts.

    Raises:
        UserError: an impossible configuration, or no such split.
    """
    check_phantoms(config)
    if split not in SPLITS:
        raise UserError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    pixels, row, _ = _drawn(config, split, index)
    return pixels, row


def _drawn(config: PhantomConfig, split: str, index: int) -> tuple[NDArray[np.uint8], dict[str, Any], list[Finding]]:
    # One stream each: neither the size of the image nor the wording of the report changes what it shows.
    streams = [np.random.default_rng([config.seed, SPLITS.index(split), index, part]) for part in range(3)]
    vocabulary = make_vocabulary(config.classes)
    findings = draw_findings(vocabulary.kinds, streams[0])
    identifier = f"{split}-{index:06d}"
    row = {
        "id": identifier,
        "filepath": f"images/{identifier}.png",
        "text": write_report(findings, vocabulary.kinds, streams[2]),
        "labels": label_row(vocabulary.names, findings).tolist(),
    }
    return draw_radiograph(findings, config.image_size, streams[1]), row, findings


def read_findings(folder: str | Path) -> dict[str, list[Finding]]:
    """Findings of each radiograph, by id."""
    with (Path(folder) / FINDINGS_FILE).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {row["id"]: [Finding(**finding) for finding in row["findings"]] for row in rows}


def contact_sheet(
    folder: str | Path, path: str | Path, *, split: str = "test", count: int = 12, columns: int = 4, cell: int = 256
) -> None:
    """Write a PNG of the split's first images with their findings below each, so that a person sees what is learned.

    Raises:
        UserError: `folder` holds no phantoms, or the split has no images.
    """
    root = Path(folder)
    if not (root / FINDINGS_FILE).is_file():
        raise UserError(f"{root}: not a phantom data set (no {FINDINGS_FILE})")
    shown = [(i, f) for i, f in read_findings(root).items() if i.startswith(f"{split}-")][:count]
    if not shown:
        raise UserError(f"{root}: no images of split {split!r}")
    captions = ["\n".join(finding.name for finding in findings) or "normal" for _, findings in shown]
    height = cell + 6 + 15 * max(caption.count("\n") + 1 for caption in captions)
    rows = -(-len(shown) // columns)
    sheet = Image.new("L", (columns * (cell + 8) + 8, rows * height + 8), 255)
    pen = ImageDraw.Draw(sheet)
    for number, ((identifier, _), caption) in enumerate(zip(shown, captions, strict=True)):
        x, y = 8 + (number % columns) * (cell + 8), 8 + (number // columns) * height
        with Image.open(root / "images" / f"{identifier}.png") as image:
            sheet.paste(image.resize((cell, cell), Image.Resampling.BICUBIC), (x, y))
        pen.multiline_text((x, y + cell + 2), caption, fill=0, spacing=2)
    with replacing(Path(path)) as file:
        sheet.save(file, format="PNG")
