"""Generated or learned prompts: a phase-2 run, or a model folder made of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checkpoints.calibration import Calibration
from ...checkpoints.model_folder import load_model, without_places
from ...checkpoints.run import run_of
from ...data.batch import Batch
from ...data.dataset import ImageDataset
from ...data.loaders.evaluation import make_eval_loader
from ...data.manifest import Manifest
from ...models.blend import weight_of
from ...models.decoders import DECODERS
from ...models.features import frozen_features
from ...models.pspg import method_name
from ...models.templates import template_probabilities, template_texts
from ...utils.errors import UserError
from ...utils.metrics_log import read_metrics
from ..config import EvaluateConfig
from ..map_pictures import beside
from ..scoring import Scores, score_batches
from ..similarity_maps import similarity_maps
from ._base import ImageMethod, Split, square_images


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
        self.training = read_metrics(run_of(Path(config.checkpoint)) / "metrics.jsonl")
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

    def calibration(self, class_lists: Sequence[list[str]]) -> Calibration | None:
        found, settings = self._loaded.calibration, self._evaluation
        if found is None or settings.context != "bank" or len(class_lists) != 1:
            return None
        misfit = found.misfit(class_lists[0], settings.blend, weight_of(settings.blend, settings.blend_weight))
        return None if misfit else found.of(class_lists[0])

    @torch.inference_mode()
    def pictures(
        self, config: EvaluateConfig, split: Split, entries: Sequence[tuple[int, int]]
    ) -> list[NDArray[np.uint8]]:
        """The image as the tower sees it and, beside it, the map of the class, on a scale of its own."""
        model, device, autocast = self._model, self._device, self._autocast
        lists = [(names, c) for names in split.class_lists for c in range(len(names))]
        samples = [split.manifest.samples[row] for row, _ in entries]
        manifest = Manifest(split.manifest.path, samples, split.manifest.label_names)
        dataset = self.dataset(config, manifest, split.labels[[row for row, _ in entries]])
        loader = make_eval_loader(dataset, batch_size=config.evaluation.batch_size)
        bank = self._loaded.bank if self._bank is None else self._bank
        texts: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        found, place = [], 0
        for batch in loader:
            features = frozen_features(model, batch, device, autocast)
            for row in range(len(batch.ids)):
                names, column = lists[entries[place][1]]
                place += 1
                if id(names) not in texts:
                    class_set = model.class_set if names == self._loaded.class_names else model.class_set_of(names)
                    context = features.global_ if bank is None else bank.to(device)
                    with torch.autocast(device.type, autocast, enabled=autocast is not None):
                        text = model.head.text_features(context, class_set, model.tower)
                    kind, weight = self._evaluation.blend, self._evaluation.blend_weight
                    blend = self._loaded.blend(class_set, kind, weight, autocast)
                    texts[id(names)] = (text.positive, text.negative, blend)
                positive, negative, blend = texts[id(names)]
                maps = similarity_maps(
                    features.tokens[row : row + 1],
                    positive[column : column + 1],
                    negative[column : column + 1],
                    model.logit_scale,
                    blend=None if blend is None else blend[column : column + 1],
                )[0].cpu()
                found.append(beside(batch.pixels[row].cpu().numpy(), maps))
        return found

    def baselines(self, scores: Scores, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        width = scores.features.shape[1] // 2
        features = torch.from_numpy(scores.features[:, :width])
        clip = self._model.clip
        texts = template_texts(clip, names, self._device, absences=self._absences)
        found = template_probabilities(clip, features, texts)
        return {f"template, {name}": values for name, values in found.items()}
