"""A trained model in Python: images of any kind in, scores, features, prompts and maps out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoints.classifier import Classifier
from ..checkpoints.model_folder import LoadedModel, is_classifier
from ..checkpoints.model_folder import load_model as load_folder
from ..config import BlendName
from ..data.any_image import AnyImage
from ..data.pixels import Pixels
from ..models.blend import blended, unit_global
from ..models.clip import ImageFeatures
from ..models.hub import local_folder
from ..models.pspg import PsPG, probabilities
from ..utils.device import autocast_dtype, pick_device
from ..utils.errors import UserError
from ..utils.numerics import fix_numerics
from .scorer import Scorer, open_scorer, scorer_of
from .similarity_maps import similarity_maps


class Scored(NamedTuple):
    """Scores of N images for C classes."""

    logits: NDArray[np.float64]
    """(N,C) log-odds: how much more an image is like a class's positive prompt than its negative one"""
    probabilities: NDArray[np.float64]
    """(N,C) in [0, 1]: their sigmoid, after the calibration of the folder where it has one that fits"""
    class_names: list[str]
    thresholds: NDArray[np.float64] | None
    """(C,) probabilities above which a class counts as found, NaN where that is not known; None: not calibrated"""


class Model:
    """A run, model folder or classifier, ready to score; `load_model` makes it.

    An image is whatever `read` takes: a path (PNG, JPEG, DICOM), a PIL image, an array, or a tensor. Every method
    takes one image or a sequence of N, and a batch (N,3,h,w) of what `read` returns.

    Attributes:
        class_names: C classes that are scored.
        pixels: rule by which an image becomes the tower's input.
        loaded: the model with its bank; None for a classifier.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        autocast: torch.dtype | None,
        *,
        bank: bool,
        blend: BlendName | None,
        blend_weight: float | None,
        calibrated: bool,
    ) -> None:
        self._calibrated = calibrated
        self.folder, self.device, self._autocast = folder, device, autocast
        self._options: dict[str, Any] = {"bank": bank, "blend": blend, "blend_weight": blend_weight}
        self.loaded: LoadedModel | None = None
        self._scorer: Scorer
        if is_classifier(folder):
            self._scorer = open_scorer(folder, None, device, autocast, calibrated=calibrated, **self._options)
        else:
            self.loaded = load_folder(folder)
            if not calibrated:
                self.loaded.calibration = None
            self._scorer = scorer_of(self.loaded, device, autocast, **self._options)

    def __repr__(self) -> str:
        kind, tower = "frozen classifier", getattr(self._network.tower, "trunk", None)
        if self.loaded is not None:
            kind, tower = f"PsPG with decoder {self.loaded.model.config.decoder}", self.loaded.model.clip.visual
        classes = f"{len(self.class_names)} class{'' if len(self.class_names) == 1 else 'es'}"
        return f"Model({kind}, {type(tower).__name__}, {classes}, {self.pixels.size} px, {self.device}, {self.folder})"

    @property
    def model(self) -> PsPG | Classifier:
        """The network itself."""
        return self._scorer.model if self.loaded is None else self.loaded.model

    @property
    def class_names(self) -> list[str]:
        return list(self._scorer.class_names)

    @property
    def training_classes(self) -> list[str]:
        """The classes that the prompts were trained on; of a classifier, those that it was frozen with."""
        return self.class_names if self.loaded is None else list(self.loaded.class_names)

    @property
    def pixels(self) -> Pixels:
        return self._scorer.pixels

    def set_classes(self, names: str | Sequence[str]) -> None:
        """Score these classes from now on, trained on or not; a classifier has its frozen ones, or some of them.

        Args:
            names: a list, or the path of a text file, one a line.

        Raises:
            UserError: unreadable file, or names that cannot be scored.
        """
        chosen = names if isinstance(names, str) else list(names)
        if self.loaded is None:
            how = {**self._options, "calibrated": self._calibrated}
            self._scorer = open_scorer(self.folder, chosen, self.device, self._autocast, **how)
        else:
            self.loaded.set_classes(chosen)
            self._scorer = scorer_of(self.loaded, self.device, self._autocast, **self._options)

    def read(self, image: AnyImage, *, bit_depth: int | None = None) -> Tensor:
        """An image as the tower's input, float32 (3,h,w), on the CPU; see `Pixels.read`.

        Raises:
            UserError: it cannot be read.
        """
        return self.pixels.read(image, bit_depth=bit_depth)

    def score(self, images: Any, *, batch_size: int = 64) -> Scored:
        """Scores of one image or N, in their order.

        Args:
            images: see above.
            batch_size: images at a time; it changes scores only where the model was loaded with `context="batch"`.

        Raises:
            UserError: an image that cannot be read, naming its place; none; or scores that are not finite.
        """
        parts = []
        with torch.inference_mode():
            for features in self._features(images, batch_size):
                logits, _ = self._network.channel_attention.class_logits(
                    self._network.logit_scale, features.tokens, *self._scorer.text(features)
                )
                parts.append(blended(logits, features.tokens, self._scorer.blend).double().cpu())
        found = torch.cat(parts)
        if not found.isfinite().all():
            raise UserError(f"{self._scorer.weights}: gives scores that are not finite; its training diverged")
        odds = (found[:, 0] - found[:, 1]).numpy()
        calibration = self._scorer.calibration
        lines = None if calibration is None else calibration.lines()
        thresholds = None if calibration is None else calibration.thresholds()
        return Scored(odds, probabilities(found, lines).numpy(), self.class_names, thresholds)

    def probabilities(self, images: Any, *, batch_size: int = 64) -> NDArray[np.float64]:
        """Probabilities (N,C) alone, columns as `class_names`; arguments and errors as `score`."""
        return self.score(images, batch_size=batch_size).probabilities

    def embed(self, images: Any, *, batch_size: int = 64) -> NDArray[np.float32]:
        """Unit global image features (N,D); arguments and errors as `score`."""
        with torch.inference_mode():
            parts = [unit_global(found.tokens).float().cpu() for found in self._features(images, batch_size)]
        return torch.cat(parts).numpy()

    def maps(self, images: Any, *, batch_size: int = 64) -> NDArray[np.float32]:
        """Log-odds of each class at each place, (N,C,g,g) on a grid of g × g; arguments and errors as `score`.

        Raises:
            UserError: also where the backbone's tokens are no square grid.
        """
        network, scorer, parts = self._network, self._scorer, []
        with torch.inference_mode():
            for features in self._features(images, batch_size):
                sides = scorer.text(features)
                drawn = similarity_maps(features.tokens, *sides, network.logit_scale, blend=scorer.blend)
                parts.append(drawn.float().cpu())
        return torch.cat(parts).numpy()

    def prompts(self) -> Tensor:
        """The prompt vectors (2,C,n,W) of the classes under the context bank, positive first, on the CPU.

        (1,C,n,W) where there are positive prompts only.

        Raises:
            UserError: a classifier, whose prompts have been encoded already, or a model without a bank.
        """
        if self.loaded is None:
            raise UserError(f"{self.folder}: holds a classifier, which keeps no prompts; load the run or model folder")
        if self.loaded.bank is None:
            raise UserError(f"{self.folder}: holds no context bank for the prompts to attend to")
        model = self.loaded.model
        with torch.inference_mode():
            bank = self.loaded.bank.to(self.device)
            return model.prompt_learner(model.class_set.class_features, bank, impl=model.head.impl).cpu()

    @property
    def _network(self) -> PsPG | Classifier:
        """What the scorer runs: the model frozen under its bank, or the model."""
        return self._scorer.model

    def _features(self, images: Any, batch_size: int) -> Iterator[ImageFeatures]:
        """Features of the images, batch by batch; at least one."""
        if batch_size < 1:
            raise UserError(f"batch_size: must be > 0, got {batch_size}")
        items = _items(images)
        if not items:
            raise UserError("images: there are none")
        for start in range(0, len(items), batch_size):
            chosen = enumerate(items[start : start + batch_size], start)
            pixels = torch.stack([self._input(image, f"images[{place}]") for place, image in chosen]).to(self.device)
            with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
                yield self._network.image_features(pixels)

    def _input(self, image: Any, name: str) -> Tensor:
        if not (isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 3 and image.shape[0] == 3):
            return self.pixels.read(image, name=name)
        if image.shape[1:] != (self.pixels.size, self.pixels.size):
            side = self.pixels.size
            raise UserError(f"{name}: has the shape {tuple(image.shape)}; a tensor of `read` is (3,{side},{side})")
        return image.float().cpu()


def load_model(
    folder: str | Path,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    context: Literal["bank", "batch"] = "bank",
    blend: BlendName | None = None,
    blend_weight: float | None = None,
    calibrated: bool = True,
) -> Model:
    """Model of a run, an exported or imported folder, a classifier, or hf-hub:OWNER/NAME, with its best weights.

    Args:
        folder: where it is.
        device, precision: as the settings of `predict`.
        context: what the prompts attend to: the model's context bank, or the images of each batch.
        blend, blend_weight: templates blended into classes never trained on, as the settings of `predict`.
        calibrated: with the calibration of the folder, where it has one of the classes.

    Raises:
        UserError: missing, damaged or mismatching files, or a context or blend that it does not have.
    """
    place = pick_device(device)
    fix_numerics(place)
    return Model(
        local_folder(folder, "checkpoint"),
        place,
        autocast_dtype(precision, place),
        bank=context == "bank",
        blend=blend,
        blend_weight=blend_weight,
        calibrated=calibrated,
    )


def _items(images: Any) -> list[Any]:
    """One image, a sequence of them, or a batch (N,3,h,w), (N,h,w) or (N,h,w,3), as a list."""
    if isinstance(images, list | tuple):
        return list(images)
    if isinstance(images, Tensor | np.ndarray):
        many = images.ndim == 4 or (images.ndim == 3 and not {images.shape[0], images.shape[-1]} & {1, 3, 4})
        return list(images) if many else [images]
    if isinstance(images, Iterator):
        return list(images)
    return [images]
