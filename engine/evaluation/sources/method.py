"""What `evaluate` asks of a method that scores images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...config import EvaluateConfig
from ...data.batch import Batch
from ...data.dataset import ImageDataset
from ...data.images import Resize
from ...data.manifest import Manifest
from ...data.pixels import Pixels, Reading
from ..scoring import Scores


class Method:
    """A method under evaluation.

    Attributes:
        name: in the report.
        about: what it is, for the model card, after its name; None: PsPG, which the card describes.
        context: what its scores depend on, a key of `report.CONTEXTS`.
        settings: what the report says of it. JSON values.
        parameters: how many its training adapts; None: not known.
        baseline_parameters: likewise, of the baselines.
        training: rows of metrics.jsonl.
        training_data: what it was trained on.
    """

    name: str
    about: str | None = None
    context: str
    settings: Mapping[str, Any]
    parameters: int | None = None
    baseline_parameters: int | None = None
    training: Sequence[Mapping[str, Any]] = ()
    training_data: str | None = None

    def baselines(self, scores: Scores, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Probabilities (N,C) by name of what the method is compared with on the same features."""
        return {}


class ImageMethod(Method, ABC):
    """A method that is run over images, on its device."""

    @abstractmethod
    def dataset(self, config: EvaluateConfig, manifest: Manifest, labels: NDArray[np.float32]) -> ImageDataset:
        """The images of a manifest as this method sees them; labels (N,C)."""

    @abstractmethod
    def score(self, groups: Sequence[list[str]], batches: Iterable[Batch]) -> Iterable[Scores]:
        """Of each batch of `dataset`, the probabilities of its images for the classes of all groups, each by itself.

        Args:
            groups: class lists; none: only labels and features.
        """


def square_images(
    config: EvaluateConfig,
    manifest: Manifest,
    labels: NDArray[np.float32],
    *,
    size: int,
    resize: Resize,
    mean: float,
    std: float,
) -> ImageDataset:
    """The images of a manifest, resized to `size` and normalised, from the cache if there is one."""
    reading = Reading(on_bad_image=config.on_bad_image, max_megapixels=config.max_megapixels, cache=config.cache)
    return ImageDataset(manifest.samples, Pixels(size=size, resize=resize, mean=mean, std=std), reading, labels=labels)
