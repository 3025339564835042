"""What the prompts are compared with: fixed templates on the same CLIP, and a ridge probe on its image features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from .clip import tokenize

POSITIVE = "Findings suggesting {}."
NEGATIVE = "No evidence of {}."


@torch.inference_mode()
def template_probabilities(
    clip: open_clip.CLIP, image_globals: Tensor, names: Sequence[str], device: torch.device
) -> dict[str, NDArray[np.float64]]:
    """Zero-shot probabilities (N,C) of a CLIP with fixed templates (paper 3.1, eq. 2; templates of footnote 3).

    `positive–negative` is the softmax over both templates; `positive only` and `plain name` have no second prompt,
    so theirs is the sigmoid of the scaled cosine: a ranking, not calibrated.

    Args:
        image_globals: (N,D) raw global image features.
        names: C class names.
    """

    def encode(texts: list[str]) -> Tensor:
        tokens = tokenize(texts, clip.context_length)
        parts = [clip.encode_text(part.to(device), normalize=True) for part in tokens.split(256)]
        return torch.cat(parts).float()

    images = nn.functional.normalize(image_globals.to(device).float(), dim=-1)
    scale = clip.logit_scale.exp().float()
    positive = scale * images @ encode([POSITIVE.format(name) for name in names]).T
    negative = scale * images @ encode([NEGATIVE.format(name) for name in names]).T
    plain = scale * images @ encode(list(names)).T
    logits = {"positive–negative": positive - negative, "positive only": positive, "plain name": plain}
    return {name: torch.sigmoid(value.double()).cpu().numpy() for name, value in logits.items()}


def ridge_probe(
    train_features: NDArray[np.floating],
    train_labels: NDArray[np.floating],
    test_features: NDArray[np.floating],
    *,
    alpha: float = 10.0,
) -> NDArray[np.float64]:
    """Ridge regression from features (N,F) to each class; scores (M,C) clipped to [0, 1].

    Labels of -1 are left out class by class; a class with one label value scores its mean everywhere.
    """
    scaler = StandardScaler().fit(train_features)
    train, test = scaler.transform(train_features), scaler.transform(test_features)
    scores = np.empty((len(test), train_labels.shape[1]))
    for column, labels in enumerate(train_labels.T):
        known = labels >= 0
        if not known.any():
            scores[:, column] = 0.5
            continue
        scores[:, column] = Ridge(alpha=alpha).fit(train[known], labels[known]).predict(test)
    return np.clip(scores, 0.0, 1.0)
