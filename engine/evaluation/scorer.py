"""Models and frozen classifiers as `predict` uses them: text features once, or anew for each batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoints.classifier import CLASSIFIER, Classifier, freeze_classifier, load_classifier
from ..checkpoints.model_folder import LoadedModel, Pixels, is_classifier, load_model
from ..config import BlendName
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
    blend: Tensor | None
    """(C,D), as `blended` takes it"""


def open_scorer(
    source: Path,
    class_names: str | list[str] | None,
    device: torch.device,
    autocast: torch.dtype | None,
    *,
    bank: bool,
    blend: BlendName | None = None,
    blend_weight: float | None = None,
) -> Scorer:
    """Model or classifier of a folder, on the device, with the classes to score.

    Under the bank a model is frozen into a classifier here, so that both score in the same way.

    Args:
        source: run, model folder or classifier.
        class_names: classes to score, a list or a text file; None: those of the folder.
        bank: the prompts attend to the context bank; else to the images of a batch.
        blend, blend_weight: see `models/blend.py`; None: novelty, with its own weight. A classifier's is frozen.

    Raises:
        UserError: an unusable folder, unknown classes, or a context or blend that it does not have.
    """
    if is_classifier(source):
        if not bank:
            raise UserError(f"context: {source} holds a classifier, whose context is frozen; use --context bank")
        if blend is not None or blend_weight is not None:
            key = "blend" if blend is not None else "blend_weight"
            raise UserError(f"{key}: {source} holds a classifier, whose blend is frozen; leave it out")
        classifier = load_classifier(source, autocast).to(device)
        if class_names is not None:
            classifier.set_classes(class_names)
        return _of_classifier(classifier, source / CLASSIFIER)
    loaded = load_model(source)
    loaded.set_classes(class_names)
    return scorer_of(loaded, device, autocast, bank=bank, blend=blend, blend_weight=blend_weight)


def scorer_of(
    loaded: LoadedModel,
    device: torch.device,
    autocast: torch.dtype | None,
    *,
    bank: bool,
    blend: BlendName | None = None,
    blend_weight: float | None = None,
) -> Scorer:
    """The same of a model that is loaded, with its present classes.

    Raises:
        UserError: a context or blend that it does not have.
    """
    source = loaded.source
    if bank and loaded.bank is None:
        raise UserError(f"context: {source} holds no context bank; use --context batch")
    model = loaded.model.to(device)
    if bank:
        classifier = freeze_classifier(loaded, autocast, blend=blend or "novelty", blend_weight=blend_weight)
        return _of_classifier(classifier, loaded.weights)
    model.freeze(autocast)
    added = loaded.blend(model.class_set, blend or "novelty", blend_weight, autocast)

    def text(features: ImageFeatures) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            found = model.head.text_features(features.global_, model.class_set, model.tower)
        return found.positive, found.negative

    return Scorer(model, model.class_set.names, loaded.pixels, loaded.weights, text, added)


def _of_classifier(classifier: Classifier, weights: Path) -> Scorer:
    positive, negative = classifier.text_features
    texts = (positive, negative)
    return Scorer(
        classifier, classifier.class_names, classifier.pixels, weights, lambda _: texts, classifier.blend_features
    )
