"""`pspg-engine predict`: probabilities of images, films in DICOM included, as a CSV table."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .config import PredictConfig, check_workers, require
from .data.loaders import load_with, pick_loader
from .data.manifest import Sample, load_label_names, load_manifest
from .data.torch_loader import ImageDataset, make_eval_loader
from .device import autocast_dtype, pick_device
from .errors import UserError
from .evaluation.report import write_csv
from .files import check_output
from .inference import Scores, score
from .model_folder import load_model
from .telemetry import report_bad, say


def predict(config: PredictConfig) -> Scores:
    """Score every image of `config.input` and write `config.output`.

    Raises:
        UserError: wrong settings, an unusable model, or (on_bad_image = error) an unreadable image.
    """
    require(checkpoint=config.checkpoint, input=config.input, output=config.output)
    check_workers("workers", config.workers)
    if config.batch_size < 1:
        raise UserError(f"batch_size: must be at least 1, got {config.batch_size}")
    check_output(config.output, folder=False)
    samples = find_images(config)
    loaded = load_model(config.checkpoint)
    names = config.class_names
    if names is not None:
        loaded.model.set_classes(load_label_names(names) if isinstance(names, str) else names)
    if config.context == "bank" and loaded.bank is None:
        raise UserError(f"context: {config.checkpoint} holds no context bank; use --context batch")
    device = pick_device(config.device)
    autocast = autocast_dtype(config.precision, device)
    model = loaded.model.to(device).freeze(autocast)
    pixels = loaded.pixels
    dataset = ImageDataset(
        samples,
        image_size=pixels.size,
        resize=pixels.resize,
        mean=pixels.mean,
        std=pixels.std,
        on_bad_image=config.on_bad_image,
        max_megapixels=config.max_megapixels,
    )
    load = load_with(pick_loader("loader", config.loader, device), device)
    loader = make_eval_loader(dataset, batch_size=config.batch_size, workers=config.workers, load=load)
    bank = loaded.bank.to(device) if config.context == "bank" and loaded.bank is not None else None
    batches = tqdm(loader, "predicting", unit="batch", leave=False, dynamic_ncols=True, disable=None)
    scores = score(model, model.head, [model.vocabulary], batches, device, autocast, context=bank, bad=loader.bad)
    if not np.isfinite(scores.probabilities).all():
        raise UserError(f"{loaded.weights}: gives scores that are not finite; its training diverged")
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = ([name, *map(float, row)] for name, row in zip(scores.ids, scores.probabilities, strict=True))
    write_csv(output, ["id", *model.vocabulary.names], rows)
    say(f"{len(scores.ids)} images, {len(model.vocabulary.names)} classes: {config.output}")
    report_bad(loader.bad)
    return scores


def find_images(config: PredictConfig) -> list[Sample]:
    """Samples of a manifest, of a folder (recursively, names as ids), or one file.

    Raises:
        UserError: nothing there.
    """
    source = Path(config.input)
    if source.suffix == ".jsonl":
        return load_manifest(source, image_root=config.image_root, need="image").samples
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.is_file() and _looks_like_image(path))
        if not files:
            raise UserError(f"input: {source} holds no images (png, jpg, jpeg, dcm or files without a suffix)")
        return [Sample(id=_printable(path.relative_to(source)), path=path) for path in files]
    if not source.exists():
        raise UserError(f"input: {source}: no such file or folder")
    return [Sample(id=_printable(Path(source.name)), path=source)]


def _looks_like_image(path: Path) -> bool:
    """By suffix; files without one are DICOM if they say so."""
    if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".dcm", ".dicom"}:
        return True
    if path.suffix:
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _printable(path: Path) -> str:
    """A file name as an id: bytes that are not UTF-8 and control characters escaped."""
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
