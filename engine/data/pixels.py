"""Pixels that a model sees of an image, and how files are read: decided once for training, evaluation and predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from torch import Tensor

from ..config import Resize
from ..utils.documents import Within
from .any_image import AnyImage, grey_image
from .bad_image import MAX_MEGAPIXELS
from .cache.pixel_cache import PixelCache
from .images import normalize, resize, to_uint8
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

    def read(self, image: AnyImage, *, bit_depth: int | None = None, name: str = "image") -> Tensor:
        """An image as the tower's input, float32 (3,h,w).

        Args:
            image: a PNG, JPEG or DICOM file, a PIL image, an array or a tensor; see `any_image.grey_image`.
            bit_depth: of 16-bit pixels, if known.
            name: of what is no file, for errors.

        Raises:
            UserError: it cannot be read.
        """
        square = resize(grey_image(image, bit_depth=bit_depth, name=name), self.size, self.resize)
        return normalize(to_uint8(square), self.mean, self.std)


class ReadingLimits(TypedDict):
    """How `images.read_image` reads a file."""

    max_megapixels: float
    bit_depth: int | None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Settings for reading the files of a data set."""

    on_bad_image: Literal["error", "skip"] = "error"
    """stop at an unreadable image, or leave it out and list it"""
    max_megapixels: float = MAX_MEGAPIXELS
    """million pixels above which an image counts as unreadable"""
    bit_depth: int | None = None
    """true depth of 16-bit PNGs; None: told by their pixels"""
    cache: str | Path | None = None
    """folder of `prepare cache` that holds the images; None: decode the files"""

    timeout_s: float = 600
    """seconds that a batch may take before the loader counts as standing still"""

    @property
    def limits(self) -> ReadingLimits:
        """Arguments of `read_image`."""
        return {"max_megapixels": self.max_megapixels, "bit_depth": self.bit_depth}

    def open_cache(self, samples: Sequence[Sample], size: int, resize: Resize) -> PixelCache | None:
        """The cached pixels of `samples`, if a cache is configured.

        Raises:
            UserError: see `PixelCache.open`.
        """
        if self.cache is None:
            return None
        return PixelCache.open(self.cache, samples, size=size, resize=resize, bit_depth=self.bit_depth)
