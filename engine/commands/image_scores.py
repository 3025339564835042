"""How `predict` and `calibrate` go through images: alike, so that a calibration fits what is predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..data.batch import Batch
from ..data.dataset import ImageDataset
from ..data.loaders.choose import load_with, pick_loader
from ..data.loaders.evaluation import EvalLoader, make_eval_loader
from ..data.manifest import Sample
from ..data.pixels import Reading
from ..evaluation.scorer import Scorer, open_scorer
from ..models.clip import ImageFeatures
from ..utils.device import autocast_dtype, pick_device
from ..utils.errors import UserError
from ..utils.numerics import fix_numerics
from .settings import CalibrateConfig, PredictConfig


class Scored(NamedTuple):
    """A batch of B images and what the model makes of it."""

    batch: Batch
    features: ImageFeatures
    sides: tuple[Tensor, Tensor]
    """positive and negative text features (C,D)"""
    logits: Tensor
    """(B,2,C) float64, finite, not calibrated"""


class ImageScores:
    """A model on its device, and the images that it scores.

    Args:
        config: device, precision, classes, blend, and how images are read.
        source: run, model folder or classifier.
        bank, calibrated: see `open_scorer`.

    Attributes:
        device: where the model is.
        scorer: the model.

    Raises:
        UserError: an unusable model, or a device that is not there.
    """

    scorer: Scorer

    def __init__(self, config: PredictConfig | CalibrateConfig, source: Path, *, bank: bool, calibrated: bool) -> None:
        self._config, self.device = config, pick_device(config.device)
        fix_numerics(self.device)
        self._autocast = autocast_dtype(config.precision, self.device)
        self.scorer = open_scorer(
            source,
            config.class_names,
            self.device,
            self._autocast,
            bank=bank,
            blend=config.blend,
            blend_weight=config.blend_weight,
            calibrated=calibrated,
        )

    def loader(self, samples: Sequence[Sample], labels: NDArray[np.float32] | None = None) -> EvalLoader:
        """Batches of images, with their labels (N,C) if there are some."""
        config = self._config
        reading = Reading(
            on_bad_image=config.on_bad_image, max_megapixels=config.max_megapixels, bit_depth=config.bit_depth
        )
        dataset = ImageDataset(samples, self.scorer.pixels, reading, labels=labels)
        load = load_with(pick_loader("loader", config.loader, self.device), self.device)
        return make_eval_loader(dataset, batch_size=config.batch_size, workers=config.workers, load=load)

    @torch.inference_mode()
    def of(self, loader: EvalLoader, title: str) -> Iterator[Scored]:
        """Batch by batch, with a progress bar.

        Raises:
            UserError: an unreadable image (on_bad_image = error), no image at all, or scores that are not finite.
        """
        empty = True
        for batch in tqdm(loader, title, unit="batch", leave=False, dynamic_ncols=True, disable=None):
            scored = Scored(batch, *self.scorer.score(batch, self.device, self._autocast))
            if not scored.logits.isfinite().all():
                raise UserError(f"{self.scorer.weights}: gives scores that are not finite; its training diverged")
            yield scored
            empty = False
        if empty:
            raise UserError(next(iter(loader.bad.values()), "there are no images"))
