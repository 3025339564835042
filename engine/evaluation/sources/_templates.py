"""The paper's fixed templates on a CLIP: one of phase 1, or any that open_clip can build."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ...checkpoints.model_folder import load_clip_folder, read_description, training_data, weights_of
from ...checkpoints.run import run_of
from ...data.batch import Batch
from ...data.dataset import ImageDataset
from ...data.manifest import Manifest
from ...models.any_clip import AnyClip, load_any_clip
from ...models.clip import tokenize
from ...models.templates import (
    NEGATIVE,
    PAIRED,
    POSITIVE,
    Absences,
    TemplateTexts,
    template_probabilities,
    template_texts,
)
from ...utils.errors import UserError
from ...utils.metrics_log import read_metrics
from ..config import EvaluateConfig
from ..scoring import Scores
from ._base import ImageMethod, square_images


class Templates(ImageMethod):
    """Softmax over a positive and a negative template (paper footnote 3); its baselines are the other variants."""

    context = "none"

    def __init__(
        self,
        name: str,
        clip: AnyClip,
        settings: Mapping[str, str],
        device: torch.device,
        autocast: torch.dtype | None,
        absences: Absences,
    ) -> None:
        self.name = name
        self.about = (
            "encodes the image and two sentences for each class name with a CLIP, "
            f"“{POSITIVE.format('…')}” and “{NEGATIVE.format('…')}”; a class's probability is the softmax over their "
            "similarities to the image. The sentences are fixed: nothing is trained for them."
        )
        if absences == "turned":
            self.about += " Classes that are an absence, such as No Finding, have the two in each other's place."
        pixels = {"size": clip.size, "resize": clip.resize, "mean": clip.mean, "std": clip.std}
        self.settings = {**settings, "pixels": pixels}
        self.parameters = self.baseline_parameters = sum(parameter.numel() for parameter in clip.model.parameters())
        self._clip, self._device, self._autocast, self._absences = clip, device, autocast, absences
        clip.model.to(device).eval()

    @classmethod
    def from_folder(cls, config: EvaluateConfig, device: torch.device, autocast: torch.dtype | None) -> Templates:
        """The CLIP of a phase-1 run or of its export: the paper's CLIP fine-tuned.

        Raises:
            UserError: missing, damaged or mismatching files.
        """
        folder = Path(config.checkpoint)
        model, pixels = load_clip_folder(folder)
        clip = AnyClip(
            model=model,
            tokenizer=partial(tokenize, context_length=model.context_length),
            size=pixels.size,
            resize=pixels.resize,
            mean=(pixels.mean,) * 3,
            std=(pixels.std,) * 3,
        )
        settings = {"checkpoint": str(weights_of(folder))}
        method = cls(config.method or "CLIP fine-tuned", clip, settings, device, autocast, config.template_absences)
        method.library = "pspg-engine"
        method.training = read_metrics(run_of(folder) / "metrics.jsonl")
        method.training_data = training_data(read_description(folder))
        return method

    @classmethod
    def from_open_clip(cls, config: EvaluateConfig, device: torch.device, autocast: torch.dtype | None) -> Templates:
        """Any CLIP, by model name or JSON file, with its weights.

        Raises:
            UserError: see `load_any_clip`; or no weights are given.
        """
        if config.clip is None or config.clip_weights is None:
            raise UserError("clip_weights: is required with clip; give a weights file or an open_clip tag")
        clip = load_any_clip(config.clip, config.clip_weights)
        settings = {"clip": config.clip, "clip_weights": config.clip_weights}
        name = Path(config.clip).stem if config.clip.endswith(".json") else config.clip
        method = cls(config.method or name, clip, settings, device, autocast, config.template_absences)
        method.library = "open_clip"
        return method

    def dataset(self, config: EvaluateConfig, manifest: Manifest, labels: NDArray[np.float32]) -> ImageDataset:
        # Pixels in [0, 1]: each colour has a mean of its own.
        return square_images(
            config, manifest, labels, size=self._clip.size, resize=self._clip.resize, mean=0.0, std=1.0
        )

    @torch.inference_mode()
    def score(self, class_lists: Sequence[list[str]], batches: Iterable[Batch]) -> Iterable[Scores]:
        model, device, autocast = self._clip.model, self._device, self._autocast
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (self._clip.mean, self._clip.std))
        names = [name for group in class_lists for name in group]
        texts = self._texts(names) if names else None
        for batch in batches:
            images = (batch.to(device, non_blocking=True).images - mean) / std
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                features = model.encode_image(images).float()
            yield Scores(
                batch.ids,
                template_probabilities(model, features, texts)[PAIRED] if texts else np.empty((len(batch), 0)),
                None if batch.labels is None else batch.labels.double().cpu().numpy(),
                features.cpu().numpy(),
            )

    def baselines(self, scores: Scores, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        found = template_probabilities(self._clip.model, torch.from_numpy(scores.features), self._texts(names))
        return {f"template, {name}": values for name, values in found.items() if name != PAIRED}

    def _texts(self, names: Sequence[str]) -> TemplateTexts:
        tokenizer = self._clip.tokenizer
        return template_texts(self._clip.model, names, self._device, tokenizer=tokenizer, absences=self._absences)
