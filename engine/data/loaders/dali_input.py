"""Inputs of the DALI pipeline, prepared batch by batch in loader processes that know nothing of DALI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ..augment import Crop, Jitter, Plan, Warp
from ..bad_image import check_extent
from ..batch import Batch
from ..bounds import bytes_a_pixel, check_memory
from ..dataset import ImageDataset
from ..images import read_bytes, read_image, resize
from ..plain_files import plain_size
from ..sampler import Key

Parameters = dict[str, NDArray[Any]]
"""name → array (B,…)"""


@dataclass
class Prepared:
    """A batch of B images before decoding and augmentation."""

    keys: list[Key]
    """keys of the readable images"""
    batch: Batch
    """its pixels are still to come, uint8 (0,h,w)"""
    images: Tensor
    """uint8 (B,h,w,1) from the pixel cache, or the encoded files one after the other"""
    lengths: list[int] | None
    """bytes of each file"""
    parameters: Parameters
    """see `steps_of`, `DaliInput.augmentation` and `_padding`"""

    def inputs(self) -> dict[str, Any]:
        """Inputs of the pipeline by name: arrays (B,…), or B arrays."""
        images = self.images.numpy()
        if self.lengths is None:
            return {"pixels": images, **self.parameters}
        return {"files": np.split(images, np.cumsum(self.lengths)[:-1]), **self.parameters}


class DaliInput(Dataset[Prepared]):
    """Prepares batches of an image data set; `ImageDataset` says what the settings mean."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: Sequence[Key]) -> Prepared:
        """The batch of `keys`, less the unreadable images, from the pixel cache or the files.

        Files that are not plain are decoded and resized here and go on as PGM, an encoding without loss.

        Raises:
            UserError: an unreadable image, if `on_bad_image` is error.
        """
        return self.prepare(keys, decode=False)

    def prepare(self, keys: Sequence[Key], *, decode: bool) -> Prepared:
        """The same; `decode`: take no file for plain."""
        side, epochs = self.dataset.rule.size, {row: epoch for epoch, row in keys}
        none = torch.empty(0, side, side, 1, dtype=torch.uint8)
        lengths, padding, cache = None, {}, self.dataset.cache
        if cache is not None:
            rows, cached, bad = self.dataset.readable(keys, lambda _, row: torch.from_numpy(cache[row].copy()))
            images = torch.stack(cached).unsqueeze(-1) if cached else none
        else:
            rows, files, bad = self.dataset.readable(keys, lambda _, row: self.file(row, decode=decode))
            images = torch.frombuffer(bytearray().join(file for file, _ in files), dtype=torch.uint8) if files else none
            lengths = [len(file) for file, _ in files]
            if self.dataset.rule.resize == "pad":
                padding = _padding([size for _, size in files], side)
        kept = [(epochs[row], row) for row in rows]
        batch = self.dataset.batch(rows, none.squeeze(-1), bad)
        return Prepared(kept, batch, images, lengths, padding | self.augmentation(kept))

    def augmentation(self, keys: Sequence[Key]) -> Parameters:
        """Parameters of what the settings ask for."""
        settings = self.dataset.augmentation
        if settings is None:
            return {}
        plans = [self.dataset.plan(*key) for key in keys]
        return {
            **(steps_of(plans, self.dataset.rule.size) if settings.augment else {}),
            **({"flip": np.array([plan.flip for plan in plans], dtype=np.int32)} if settings.flip else {}),
        }

    def file(self, row: int, *, decode: bool) -> tuple[bytes, tuple[int, int]]:
        """An encoded image and its width and height.

        Raises:
            BadImage: it cannot be read.
        """
        path, limit = Path(self.dataset.paths[row]), self.dataset.reading.max_megapixels
        content = read_bytes(path)
        size = None if decode or path.suffix.lower() == ".dcm" else plain_size(content)
        if size is not None:
            check_extent(path, *size, limit)
            check_memory(path, *size, bytes_a_pixel(content), len(content), limit)
            return content, size
        rule = self.dataset.rule
        image = resize(read_image(path, content, **self.dataset.reading.limits), rule.size, rule.resize)
        return b"P5\n%d %d\n255\n" % image.size + image.tobytes(), image.size


def steps_of(plans: Sequence[Plan], side: int) -> Parameters:
    """Steps of B plans as arrays for one order of operations: warp, crop, jitter, crop, warp.

    A plan's first step takes a place in the left half, its second one in the right half, jitter the middle: whatever
    two steps a plan has, in whatever order, they find their places. Places that are left do nothing.

    Returns:
        warp0, warp1: (B,2,3), see `augment.Warp`.
        start0, end0, start1, end1: (B,2), top left and bottom right corner (y,x) of the crops.
        factor0, mean0, factor1, mean1: (B,), the two blends of jitter: the factor, and 1 for one with the mean
            (contrast), 0 for one with black (brightness).
    """
    count = len(plans)
    arrays: Parameters = {}
    for place in "01":
        arrays[f"warp{place}"] = np.tile(np.eye(2, 3, dtype=np.float32), (count, 1, 1))
        arrays[f"start{place}"] = np.zeros((count, 2), dtype=np.float32)
        arrays[f"end{place}"] = np.full((count, 2), side, dtype=np.float32)
        arrays[f"factor{place}"] = np.ones(count, dtype=np.float32)
        arrays[f"mean{place}"] = np.zeros(count, dtype=np.float32)
    for row, plan in enumerate(plans):
        for place, step in zip("01", plan.steps, strict=False):
            if isinstance(step, Warp):
                arrays[f"warp{place}"][row] = np.reshape(step.matrix, (2, 3))
            elif isinstance(step, Crop):
                arrays[f"start{place}"][row] = step.top, step.left
                arrays[f"end{place}"][row] = step.bottom, step.right
            elif isinstance(step, Jitter):
                first, second = (0, 1) if step.brightness_first else (1, 0)
                arrays[f"factor{first}"][row], arrays[f"factor{second}"][row] = step.brightness, step.contrast
                arrays[f"mean{second}"][row] = 1
    return arrays


def _padding(sizes: Sequence[tuple[int, int]], side: int) -> Parameters:
    """Parameters of `images.resize` with mode pad: height and width to resize to, and where the square starts (y,x)."""
    inner = [[max(1, round(length * (side / max(size)))) for length in reversed(size)] for size in sizes]
    shape = np.array(inner, dtype=np.float32).reshape(-1, 2)
    return {"shape": shape, "corner": -((side - shape) // 2).astype(np.int32)}
