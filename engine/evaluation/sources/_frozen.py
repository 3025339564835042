"""A frozen classifier, as `export-checkpoint --layout classifier` writes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ...checkpoints.calibration import Calibration
from ...checkpoints.classifier import CLASSIFIER, load_classifier, load_towers, read_classifier
from ...data.batch import Batch
from ...data.dataset import ImageDataset
from ...data.labels import select_classes
from ...data.manifest import Manifest
from ...models.features import frozen_features
from ...models.templates import template_probabilities, template_texts
from ...utils.errors import UserError
from ..config import EvaluateConfig
from ..scoring import Scores
from ._base import ImageMethod, square_images


class Frozen(ImageMethod):
    """Its text features are frozen, so a score depends on the image and the class alone.

    Its baselines are the fixed templates of the CLIP that it was frozen with.

    Raises:
        UserError: missing, damaged or mismatching files.
    """

    context = "none"
    library = "pspg-engine"

    def __init__(self, config: EvaluateConfig, device: torch.device, autocast: torch.dtype | None) -> None:
        folder = Path(config.checkpoint)
        description = read_classifier(folder)
        self._classifier = load_classifier(folder, autocast).to(device)
        self._calibration = self._classifier.calibration
        self._classifier.calibrate(None)  # the report shows what it changes
        self._clip = load_towers(folder) if config.baselines else None
        self._device = device
        blend = description.blend or "none"
        self.name = config.method or "frozen classifier"
        self.about = (
            "compares an image with two text features a class, which were written once and frozen"
            f"{'' if blend == 'none' else f' ({blend} blend)'}; no text tower runs."
        )
        self.settings = {
            "checkpoint": str(folder / CLASSIFIER),
            "pixels": asdict(self._classifier.pixels),
            "fusion": description.fusion,
            "blend": blend,
        }
        self.training_data = description.training

    def dataset(self, config: EvaluateConfig, manifest: Manifest, labels: NDArray[np.float32]) -> ImageDataset:
        return square_images(config, manifest, labels, **asdict(self._classifier.pixels))

    def calibration(self, class_lists: Sequence[list[str]]) -> Calibration | None:
        found = self._calibration
        return None if found is None else found.of([name for names in class_lists for name in names])

    @torch.inference_mode()
    def score(self, class_lists: Sequence[list[str]], batches: Iterable[Batch]) -> Iterable[Scores]:
        names = [name for group in class_lists for name in group]
        try:
            columns = select_classes(self._classifier.class_names, names, key="class_lists")[1] if names else []
        except UserError as error:
            raise UserError(
                f"{error} (the classes are frozen; name some of them by class_lists, or export the model again)"
            ) from None
        for batch in batches:
            features = frozen_features(self._classifier, batch, self._device, None)
            found = self._classifier.score(features.tokens)[:, columns].double().cpu().numpy()
            pooled = torch.cat([features.global_, features.tokens[:, 1:].mean(1)], dim=1)
            labels = None if batch.labels is None else batch.labels.double().cpu().numpy()
            yield Scores(batch.ids, found, labels, pooled.float().cpu().numpy())

    def baselines(self, scores: Scores, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        if self._clip is None:
            return {}
        width = scores.features.shape[1] // 2
        features = torch.from_numpy(scores.features[:, :width])
        clip = self._clip.to(self._device)
        found = template_probabilities(clip, features, template_texts(clip, names, self._device))
        return {f"template, {name}": values for name, values in found.items()}
