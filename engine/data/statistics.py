"""Mean and deviation of a data set's pixels, and the pixel rule that a run takes from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from ..config import Resize
from ..utils.errors import UserError
from .bad_image import BadImage
from .dataset import ImageDataset
from .manifest import Sample
from .pixels import Pixels, Reading
from .seeding import generator

if TYPE_CHECKING:
    from ..config import DataConfig


def training_pixels(data: DataConfig, samples: Sequence[Sample], carried: Pixels | None, source: str | None) -> Pixels:
    """The pixel rule of a run: mean and deviation of the settings, else of the backbone, else of the training images.

    Args:
        data: settings.
        samples: training images.
        carried: what the backbone was trained with; None: it does not say.
        source: where the backbone is, for messages.

    Raises:
        UserError: the settings contradict the backbone, or see `pixel_statistics`.
    """
    if carried is not None and carried.size != data.image_size:
        raise UserError(
            f"data.image_size: {data.image_size}, but the backbone in {source} was trained at {carried.size}"
        )
    if carried is not None and carried.resize != data.resize:
        raise UserError(f"data.resize: {data.resize}, but the backbone in {source} was trained with {carried.resize}")
    if data.mean is not None and data.std is not None:
        mean, std = data.mean, data.std
    elif carried is not None:
        mean, std = carried.mean, carried.std
    else:
        mean, std = pixel_statistics(samples, data.image_size, data.resize, reading_of(data))
    return Pixels(size=data.image_size, resize=data.resize, mean=mean, std=std)


def reading_of(data: DataConfig) -> Reading:
    """Settings by which a run reads its files."""
    return Reading(
        on_bad_image=data.on_bad_image,
        max_megapixels=data.max_megapixels,
        bit_depth=data.bit_depth,
        cache=data.cache,
    )


def pixel_statistics(
    samples: Sequence[Sample],
    size: int,
    resize: Resize = "stretch",
    reading: Reading | None = None,
    *,
    limit: int = 1024,
    seed: int = 0,
) -> tuple[float, float]:
    """Mean and standard deviation in [0, 1] over the resized pixels of at most `limit` random samples.

    Unreadable images are left out here: the loader that meets them reports them.

    Raises:
        UserError: no readable image among them, or images of one grey level only.
    """
    # Only its 8-bit pixels are asked for, which no mean or deviation has changed.
    dataset = ImageDataset(samples, Pixels(size=size, resize=resize, mean=0.0, std=1.0), reading)
    chosen = torch.randperm(len(samples), generator=generator(seed, "pixel statistics"))[:limit].tolist()
    histogram = np.zeros(256, dtype=np.int64)
    reason = "there are no samples"
    for row in tqdm(chosen, "measuring pixel mean and std", delay=2, disable=None, leave=False):
        try:
            pixels = dataset.pixels(0, row)
        except BadImage as error:
            reason = str(error)
            continue
        histogram += np.bincount(pixels.flatten().numpy(), minlength=256)
    count = histogram.sum()
    if not count:
        raise UserError(f"no image to measure pixel mean and std on: {reason}")
    levels = np.arange(256) / 255
    mean = float(levels @ histogram / count)
    std = float(np.sqrt((levels - mean) ** 2 @ histogram / count))
    if std == 0:
        raise UserError("all training images have one grey level; check data.train and data.image_root")
    return mean, std
