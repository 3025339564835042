"""Models and frozen classifiers as `predict` uses them: text features once, or anew for each batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoints.classifier import CLASSIFIER, Classifier, freeze_classifier, load_classifier
from ..checkpoints.model_folder import Pixels, is_classifier, load_model
from ..models.clip import ImageFeatures
from ..models.pspg import PsPG
from ..utils.errors import UserError


class Scorer(NamedTuple):
    """A model or a frozen classifier, and what it needs to score images."""

    model: PsPG | Classifier
    class_names: list[str]
    pixels: Pixels
    weights: Path
    """file to name if its scores are no numbers"""
    text: Callable[[ImageFeatures], tuple[Tensor, Tensor]]
    """positive and negative text features (C,D) for the images of a batch"""


def open_scorer(
    source: Path,
    class_names: str | list[str] | None,
    device: torch.device,
    autocast: torch.dtype | None,
    *,
    bank: bool,
) -> Scorer:
    """Model or classifier of a folder, on the device, with the classes to score.

    Under the bank a model is frozen into a classifier here, so that both score in the same way.

    Args:
        source: run, model folder or classifier.
        class_names: classes to score, a list or a text file; None: those of the folder.
        bank: the prompts attend to the context bank; else to the images of a batch.

    Raises:
        UserError: an unusable folder, unknown classes, or a context that it does not have.
    """
    if is_classifier(source):
        if not bank:
            raise UserError(f"context: {source} holds a classifier, whose context is frozen; use --context bank")
        classifier = load_classifier(source, autocast).to(device)
        if class_names is not None:
            classifier.set_classes(class_names)
        return _of_classifier(classifier, source / CLASSIFIER)
    loaded = load_model(source)
    loaded.set_classes(class_names)
    if bank and loaded.bank is None:
        raise UserError(f"context: {source} holds no context bank; use --context batch")
    model = loaded.model.to(device)
    if bank:
        return _of_classifier(freeze_classifier(loaded, autocast), loaded.weights)
    model.freeze(autocast)

    def text(features: ImageFeatures) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            found = model.head.text_features(features.global_, model.class_set, model.tower)
        return found.positive, found.negative

    return Scorer(model, model.class_set.names, loaded.pixels, loaded.weights, text)


def _of_classifier(classifier: Classifier, weights: Path) -> Scorer:
    positive, negative = classifier.text_features
    return Scorer(classifier, classifier.class_names, classifier.pixels, weights, lambda _: (positive, negative))
