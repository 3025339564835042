"""The data set that tests of both loaders go through."""

import numpy as np
import torch

from pspg.engine.data.augment import Augmentation
from pspg.engine.data.dataset import ImageDataset
from pspg.engine.data.pixels import Pixels, Reading


def tokenize(texts):
    return torch.tensor([[len(text), int(text.split()[1])] for text in texts])


def make(samples, *, size=16, resize="stretch", augment=True, flip=0.5, seed=3, **reading):
    return ImageDataset(
        samples,
        Pixels(size=size, resize=resize, mean=0.4, std=0.2),
        Reading(**reading),
        labels=np.arange(2 * len(samples), dtype=np.float32).reshape(-1, 2),
        tokenize=tokenize,
        augmentation=Augmentation(augment=augment, flip=flip, seed=seed),
    )
