"""How new a class name is to a model: names compared by their text features, relative to the training classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SAME = 1e-6
"""a name as near as this to a training class's, in 1 − cosine, is that class, up to rounding"""


def centred(features: Tensor, training: Tensor) -> Tensor:
    """f̃ (C,D), float32: unit(f − μ) of unit features f, μ the mean of the K training classes' unit features.

    Args:
        features: (C,D) text features of the plain names.
        training: (K,D) those of the training classes.
    """
    own, known = (F.normalize(side.float(), dim=-1) for side in (features, training))
    return F.normalize(own - known.mean(dim=0), dim=-1)


def novelty(features: Tensor, training: Tensor) -> Tensor:
    """ν = 1 − max over training classes t of f̃·f̃_t, (C,) in [0, 2], float32; exactly 0 for training classes.

    With one training class alone every other name has ν = 1. Arguments as `centred`.
    """
    own, known = (F.normalize(side.float(), dim=-1) for side in (features, training))
    found = 1 - (centred(features, training) @ centred(training, training).T).amax(dim=1)
    return torch.where((own @ known.T).amax(dim=1) > 1 - SAME, 0.0, found.clamp(min=0))
