"""Generated or learned prompts: a phase-2 run, or a model folder made of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ...checkpoints.model_folder import load_model, without_places
from ...data.batch import Batch
from ...data.dataset import ImageDataset
from ...data.manifest import Manifest
from ...models.decoders import DECODERS
from ...models.pspg import method_name
from ...models.templates import template_probabilities, template_texts
from ...utils.errors import UserError
from ...utils.metrics_log import read_metrics
from ..config import EvaluateConfig
from ..scoring import Scores, score_batches
from ._base import ImageMethod, square_images


class Prompted(ImageMethod):
    """A prompt head on its CLIP; its baselines are the fixed templates of the same CLIP.

    Raises:
        UserError: an unusable model, or one without a bank where the context is to be one.
    """

    library = "pspg-engine"

    def __init__(self, config: EvaluateConfig, device: torch.device, autocast: torch.dtype | None) -> None:
        loaded = load_model(config.checkpoint)
        self.context = config.evaluation.context
        if self.context == "bank" and loaded.bank is None:
            raise UserError(f"evaluation.context: {config.checkpoint} holds no context bank; use batch")
        head = loaded.model.config
        blend = config.evaluation.blend
        self.name = config.method or method_name(head) + ("" if blend == "none" else f", {blend} blend")
        decoder = DECODERS[head.decoder]
        self.about = decoder.about
        if not decoder.uses_context:
            self.context = "none"
        self.settings = {
            "checkpoint": str(loaded.weights),
            "pixels": asdict(loaded.pixels),
            "model": without_places(asdict(head)),
        }
        self.parameters = sum(p.numel() for p in loaded.model.head.parameters() if p.requires_grad)
        self.baseline_parameters = sum(parameter.numel() for parameter in loaded.model.clip.parameters())
        self.training = read_metrics(Path(config.checkpoint) / "metrics.jsonl")
        self.training_data = loaded.training
        self.training_classes = loaded.class_names
        self._device, self._autocast = device, autocast
        self._evaluation, self._absences = config.evaluation, config.template_absences
        self._loaded = loaded
        self._model = loaded.model.to(device).freeze(autocast)
        self._bank = loaded.bank.to(device) if config.evaluation.context == "bank" and loaded.bank is not None else None

    def dataset(self, config: EvaluateConfig, manifest: Manifest, labels: NDArray[np.float32]) -> ImageDataset:
        return square_images(config, manifest, labels, **asdict(self._loaded.pixels))

    def score(self, class_lists: Sequence[list[str]], batches: Iterable[Batch]) -> Iterable[Scores]:
        model = self._model
        class_sets = [
            model.class_set if names == self._loaded.class_names else model.class_set_of(names) for names in class_lists
        ]
        device, autocast = self._device, self._autocast
        kind, weight = self._evaluation.blend, self._evaluation.blend_weight
        blends = [self._loaded.blend(class_set, kind, weight, autocast) for class_set in class_sets]
        found = score_batches(
            model, model.head, class_sets, batches, device, autocast, context=self._bank, blends=blends
        )
        return [scores for _, scores in found]

    def baselines(self, scores: Scores, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        width = scores.features.shape[1] // 2
        features = torch.from_numpy(scores.features[:, :width])
        clip = self._model.clip
        texts = template_texts(clip, names, self._device, absences=self._absences)
        found = template_probabilities(clip, features, texts)
        return {f"template, {name}": values for name, values in found.items()}
