"""Pixels that a model sees of an image, and how files are read: decided once for training, evaluation and predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from torch import Tensor

from ..utils.documents import Within
from .bad_image import MAX_MEGAPIXELS
from .cache.pixel_cache import PixelCache
from .images import Resize, normalize, square_image, to_uint8
from .manifest import Sample


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Rule by which an image becomes the image tower's input. A checkpoint carries it."""

    size: Annotated[int, Within(1, 65536)]
    """side of the square, pixels"""
    resize: Resize
    """see `images.resize`"""
    mean: Annotated[float, Within(0, 1)]
    """pixel mean, in [0, 1]"""
    std: Annotated[float, Within(1e-9, 1e9)]
    """pixel standard deviation, in the same unit"""

    def read(self, path: str | Path) -> Tensor:
        """A PNG, JPEG or DICOM file as the tower's input, float32 (3,h,w).

        Raises:
            BadImage: it cannot be read.
        """
        return normalize(to_uint8(square_image(path, self.size, self.resize)), self.mean, self.std)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Settings for reading the files of a data set."""

    on_bad_image: Literal["error", "skip"] = "error"
    """stop at an unreadable image, or leave it out and list it"""
    max_megapixels: float = MAX_MEGAPIXELS
    """million pixels above which an image counts as unreadable"""
    cache: str | Path | None = None
    """folder of `prepare cache` that holds the images; None: decode the files"""

    timeout_s: float = 600
    """seconds that a batch may take before the loader counts as standing still"""

    def open_cache(self, samples: Sequence[Sample], size: int, resize: Resize) -> PixelCache | None:
        """The cached pixels of `samples`, if a cache is configured.

        Raises:
            UserError: see `PixelCache.open`.
        """
        return None if self.cache is None else PixelCache.open(self.cache, samples, size=size, resize=resize)
