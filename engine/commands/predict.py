"""`pspg-engine predict`: probabilities of images, films in DICOM included, as a CSV table, and maps of where."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..checkpoints.classifier import CLASSIFIER, Classifier, freeze_classifier, load_classifier
from ..checkpoints.model_folder import is_classifier, load_model
from ..config import PredictConfig, check_workers, require
from ..data.dataset import ImageDataset
from ..data.labels import select_classes
from ..data.loaders.choose import load_with, pick_loader
from ..data.loaders.evaluation import EvalLoader, make_eval_loader
from ..data.manifest import Sample, load_manifest
from ..data.pixels import Pixels, Reading
from ..evaluation.report.write import write_csv
from ..evaluation.similarity_maps import MapWriter, similarity_maps
from ..models.clip import ImageFeatures
from ..models.features import frozen_features
from ..models.pspg import PsPG, probabilities
from ..training.telemetry import report_bad, say
from ..utils.device import autocast_dtype, pick_device
from ..utils.errors import UserError
from ..utils.files import check_new_folder, check_output, new_folder


@dataclass
class Predictions:
    """N scored images."""

    ids: list[str]
    class_names: list[str]
    probabilities: NDArray[np.float64]
    """(N,C)"""


class Scorer(NamedTuple):
    """What scores images."""

    model: PsPG | Classifier
    class_names: list[str]
    pixels: Pixels
    weights: Path
    """file to name if its scores are no numbers"""
    text: Callable[[ImageFeatures], tuple[Tensor, Tensor]]
    """positive and negative text features (C,D) for the images of a batch"""


def predict(config: PredictConfig) -> Predictions:
    """Score every image of `config.input`, write `config.output` and, where asked for, `config.maps`.

    Raises:
        UserError: wrong settings, an unusable model, or (on_bad_image = error) an unreadable image.
    """
    require(checkpoint=config.checkpoint, input=config.input, output=config.output)
    check_workers("workers", config.workers)
    if config.batch_size < 1:
        raise UserError(f"batch_size: must be at least 1, got {config.batch_size}")
    check_output(config.output, folder=False)
    _check_maps(config)
    samples = find_images(config)
    device = pick_device(config.device)
    autocast = autocast_dtype(config.precision, device)
    scorer = open_scorer(config, device, autocast)
    drawn = select_classes(scorer.class_names, config.map_classes, key="map_classes")[1]
    reading = Reading(on_bad_image=config.on_bad_image, max_megapixels=config.max_megapixels)
    dataset = ImageDataset(samples, scorer.pixels, reading)
    load = load_with(pick_loader("loader", config.loader, device), device)
    loader = make_eval_loader(dataset, batch_size=config.batch_size, workers=config.workers, load=load)
    output = Path(config.output)
    with ExitStack() as stack:
        maps = None
        if config.maps is not None:
            folder = stack.enter_context(new_folder(config.maps, key="maps"))
            maps = MapWriter(folder, scorer.class_names, drawn, config.map_threshold or 0.0, len(samples))
            stack.callback(maps.close)
        predictions = _score(scorer, loader, device, autocast, maps)
        pairs = zip(predictions.ids, predictions.probabilities, strict=True)
        rows = ([name, *map(float, row)] for name, row in pairs)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_csv(output, ["id", *scorer.class_names], rows)
    say(f"{len(predictions.ids)} images, {len(scorer.class_names)} classes: {config.output}")
    if maps is not None:
        say(f"{maps.drawn} images with maps: {config.maps}")
    report_bad(loader.bad)
    return predictions


def open_scorer(config: PredictConfig, device: torch.device, autocast: torch.dtype | None) -> Scorer:
    """Model or classifier of `config.checkpoint`, on the device, with the classes to score.

    Under the bank a model is frozen into a classifier here, so that both score in the same way.

    Raises:
        UserError: an unusable folder, unknown classes, or a context that it does not have.
    """
    source = Path(config.checkpoint)
    if is_classifier(source):
        if config.context != "bank":
            raise UserError(f"context: {source} holds a classifier, whose context is frozen; use --context bank")
        classifier = load_classifier(source, autocast).to(device)
        if config.class_names is not None:
            classifier.set_classes(config.class_names)
        return _of_classifier(classifier, source / CLASSIFIER)
    loaded = load_model(source)
    loaded.set_classes(config.class_names)
    if config.context == "bank" and loaded.bank is None:
        raise UserError(f"context: {config.checkpoint} holds no context bank; use --context batch")
    model = loaded.model.to(device)
    if config.context == "bank":
        return _of_classifier(freeze_classifier(loaded, autocast), loaded.weights)
    model.freeze(autocast)

    def text(features: ImageFeatures) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            found = model.head.text_features(features.global_, model.vocabulary, model.tower)
        return found.positive, found.negative

    return Scorer(model, model.vocabulary.names, loaded.pixels, loaded.weights, text)


def _of_classifier(classifier: Classifier, weights: Path) -> Scorer:
    positive, negative = classifier.text_features
    return Scorer(classifier, classifier.class_names, classifier.pixels, weights, lambda _: (positive, negative))


@torch.inference_mode()
def _score(
    scorer: Scorer, loader: EvalLoader, device: torch.device, autocast: torch.dtype | None, maps: MapWriter | None
) -> Predictions:
    """Probabilities of all readable images, batch by batch, and their maps.

    Raises:
        UserError: no image could be read, or scores that are not finite.
    """
    model = scorer.model
    ids: list[str] = []
    parts: list[NDArray[np.float64]] = []
    for batch in tqdm(loader, "predicting", unit="batch", leave=False, dynamic_ncols=True, disable=None):
        features = frozen_features(model, batch, device, autocast)
        sides = scorer.text(features)
        logits, _ = model.channel_attention.class_logits(model.logit_scale, features.tokens, *sides)
        found = probabilities(logits.double()).cpu().numpy()
        if not np.isfinite(found).all():
            raise UserError(f"{scorer.weights}: gives scores that are not finite; its training diverged")
        if maps is not None:
            maps.write(batch.ids, batch.pixels, similarity_maps(features.tokens, *sides, model.logit_scale), found)
        ids += batch.ids
        parts.append(found)
    if not parts:
        raise UserError(next(iter(loader.bad.values()), "there are no images"))
    return Predictions(ids, scorer.class_names, np.concatenate(parts))


def _check_maps(config: PredictConfig) -> None:
    """Refuse settings of maps that cannot be met.

    Raises:
        UserError: naming the key.
    """
    threshold = config.map_threshold
    if config.maps is not None:
        check_new_folder(config.maps, key="maps")
    elif config.map_classes is not None or threshold is not None:
        key = "map_classes" if config.map_classes is not None else "map_threshold"
        raise UserError(f"{key}: needs maps, the folder to draw to; give --maps")
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"map_threshold: must lie between 0 and 1, got {threshold}")


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
