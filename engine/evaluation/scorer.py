"""Models and frozen classifiers as `predict` uses them: text features once, or anew for each batch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoints.calibration import Calibration
from ..checkpoints.classifier import CLASSIFIER, Classifier, freeze_classifier, load_classifier
from ..checkpoints.model_folder import LoadedModel, Pixels, is_classifier, load_model
from ..config import BlendName
from ..data.batch import Batch
from ..models.blend import blended, weight_of
from ..models.clip import ImageFeatures
from ..models.features import frozen_features
from ..models.pspg import PsPG
from ..utils.errors import UserError

log = logging.getLogger(__name__)


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
    blend_kind: BlendName | None
    """what a calibration is bound to; None: a classifier, whose blend is part of its weights"""
    blend_weight: float | None
    calibration: Calibration | None
    """of these classes; None: the probabilities are the model's own"""

    def score(
        self, batch: Batch, device: torch.device, autocast: torch.dtype | None
    ) -> tuple[ImageFeatures, tuple[Tensor, Tensor], Tensor]:
        """Image features, text features, and logits (B,2,C) in float64, not calibrated."""
        features = frozen_features(self.model, batch, device, autocast)
        sides = self.text(features)
        logits, _ = self.model.channel_attention.class_logits(self.model.logit_scale, features.tokens, *sides)
        return features, sides, blended(logits, features.tokens, self.blend).double()


def open_scorer(
    source: Path,
    class_names: str | list[str] | None,
    device: torch.device,
    autocast: torch.dtype | None,
    *,
    bank: bool,
    blend: BlendName | None = None,
    blend_weight: float | None = None,
    calibrated: bool = True,
) -> Scorer:
    """Model or classifier of a folder, on the device, with the classes to score.

    Under the bank a model is frozen into a classifier here, so that both score in the same way.

    Args:
        source: run, model folder or classifier.
        class_names: classes to score, a list or a text file; None: those of the folder.
        bank: the prompts attend to the context bank; else to the images of a batch.
        blend, blend_weight: see `models/blend.py`; None: novelty, with its own weight. A classifier's is frozen.
        calibrated: with the calibration of the folder, if it has one that fits.

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
        if not calibrated:
            classifier.calibrate(None)
        if class_names is not None:
            classifier.set_classes(class_names)
        return _of_classifier(classifier, source / CLASSIFIER)
    loaded = load_model(source)
    loaded.set_classes(class_names)
    if not calibrated:
        loaded.calibration = None
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
    kind = blend or "novelty"
    weight = weight_of(kind, blend_weight)
    if bank and loaded.bank is None:
        raise UserError(f"context: {source} holds no context bank; use --context batch")
    model = loaded.model.to(device)
    if bank:
        classifier = freeze_classifier(loaded, autocast, blend=kind, blend_weight=blend_weight)
        return _of_classifier(classifier, loaded.weights, kind, weight)
    if loaded.calibration is not None:
        log.info("context: batch; the calibration is for bank, so probabilities are not calibrated")
    model.freeze(autocast)
    added = loaded.blend(model.class_set, kind, blend_weight, autocast)

    def text(features: ImageFeatures) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            found = model.head.text_features(features.global_, model.class_set, model.tower)
        return found.positive, found.negative

    return Scorer(
        model, model.class_set.names, loaded.pixels, loaded.weights, text, added, kind, weight, calibration=None
    )


def _of_classifier(
    classifier: Classifier, weights: Path, kind: BlendName | None = None, weight: float | None = None
) -> Scorer:
    positive, negative = classifier.text_features
    texts = (positive, negative)
    return Scorer(
        classifier,
        classifier.class_names,
        classifier.pixels,
        weights,
        lambda _: texts,
        classifier.blend_features,
        kind,
        weight,
        classifier.calibration,
    )
