"""The contract of sources, and of the methods that they open."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ...checkpoints.calibration import Calibration
from ...config import Resize
from ...data.batch import Batch
from ...data.dataset import ImageDataset
from ...data.images import read_image
from ...data.loaders.choose import load_with
from ...data.loaders.evaluation import make_eval_loader
from ...data.manifest import Manifest
from ...data.pixels import Pixels, Reading
from ...distributed.deepspeed import World
from ..config import EvaluateConfig
from ..scoring import Scores, score_together


@dataclass(frozen=True)
class Split:
    """Labelled images to score."""

    manifest: Manifest
    labels: NDArray[np.float32]
    """(N,C) in {1, 0, −1}; C counts the classes of all lists, one list after the other"""
    class_lists: Sequence[list[str]]
    """each is scored by itself; none: only labels and features are wanted"""
    title: str
    """title of the progress bar"""


class Method(ABC):
    """A method under evaluation.

    Attributes:
        name: in the report.
        about: what it is, for the model card, after its name; None: PsPG, which the card describes.
        context: what its scores depend on, a key of `report.evaluation.CONTEXTS`.
        settings: rows of the report's settings that describe it. JSON values.
        parameters: how many its training adapts; None: not known.
        baseline_parameters: likewise, of the baselines.
        training: rows of metrics.jsonl.
        training_data: what it was trained on.
        training_classes: class names that its training saw labels of; None: not known.
        library: Python package that loads the model, for the model card; None: not known.
    """

    name: str
    about: str | None = None
    context: str
    settings: Mapping[str, Any]
    parameters: int | None = None
    baseline_parameters: int | None = None
    training: Sequence[Mapping[str, Any]] = ()
    training_data: str | None = None
    training_classes: Sequence[str] | None = None
    library: str | None = None

    @abstractmethod
    def scores(self, config: EvaluateConfig, split: Split, world: World) -> tuple[Scores, dict[str, str]] | None:
        """Scores of a split in the order of its images, and id → reason of those left out.

        None on other ranks than the first.

        Raises:
            UserError: an image or a score that cannot be used.
        """

    def baselines(self, scores: Scores, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Probabilities (N,C) by name of what the method is compared with on the same features."""
        return {}

    def calibration(self, class_lists: Sequence[list[str]]) -> Calibration | None:
        """The calibration kept with the method that holds for its scores of these class lists; None: there is none."""
        return None

    def pictures(
        self, config: EvaluateConfig, split: Split, entries: Sequence[tuple[int, int]]
    ) -> list[NDArray[np.uint8]]:
        """For each (row of the manifest, column of the labels) a picture, (h,w) grey or (h,w,3).

        Here: the image alone, within 512 pixels.
        """
        found = []
        for row, _ in entries:
            path = split.manifest.samples[row].path
            image = read_image(path, max_megapixels=config.max_megapixels, bit_depth=config.bit_depth)
            image.thumbnail((512, 512))
            found.append(np.asarray(image))
        return found


class ImageMethod(Method):
    """A method that is run over images, on its device."""

    @abstractmethod
    def dataset(self, config: EvaluateConfig, manifest: Manifest, labels: NDArray[np.float32]) -> ImageDataset:
        """The images of a manifest as this method sees them; labels (N,C)."""

    @abstractmethod
    def score(self, class_lists: Sequence[list[str]], batches: Iterable[Batch]) -> Iterable[Scores]:
        """Scores of each batch of `dataset`: the probabilities for the classes of all lists, each scored by itself.

        Args:
            class_lists: class lists; none: only labels and features.
            batches: what this rank scores.
        """

    def scores(self, config: EvaluateConfig, split: Split, world: World) -> tuple[Scores, dict[str, str]] | None:
        loader = make_eval_loader(
            self.dataset(config, split.manifest, split.labels),
            batch_size=config.evaluation.batch_size,
            rank=world.rank,
            world_size=world.size,
            workers=config.workers,
            load=load_with(config.loader, world.device),
        )
        return score_together(partial(self.score, split.class_lists), loader, title=split.title)


class Source(ABC):
    """A place that scores come from: a class that opens a method.

    Selected by the setting of `EvaluateConfig` that has its name, or, where there is none, by an entry of
    `EvaluateConfig.other_source`.
    """

    name: ClassVar[str]
    """the setting that selects it"""
    settings: ClassVar[tuple[str, ...]] = ()
    """other settings that go with this source, and are refused with sources that do not name them"""
    engine_loader: ClassVar[bool] = False
    """its images go through the engine's loader, with DALI too; else Pillow reads them"""

    @classmethod
    def value(cls, config: EvaluateConfig) -> Any:
        """The value of its setting; an empty one does not select the source."""
        return getattr(config, cls.name) if hasattr(config, cls.name) else config.other_source.get(cls.name)

    @classmethod
    def has_context(cls, config: EvaluateConfig) -> bool:
        """The scores depend on a context, so that `evaluation.context` may be bank."""
        return False

    @classmethod
    @abstractmethod
    def open(cls, config: EvaluateConfig, device: torch.device, autocast: torch.dtype | None) -> Method:
        """The method, ready to score.

        Raises:
            UserError: missing, damaged or mismatching files or settings.
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
    reading = Reading(
        on_bad_image=config.on_bad_image,
        max_megapixels=config.max_megapixels,
        bit_depth=config.bit_depth,
        cache=config.cache,
        timeout_s=config.timeout_s,
    )
    return ImageDataset(manifest.samples, Pixels(size=size, resize=resize, mean=mean, std=std), reading, labels=labels)
