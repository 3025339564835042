"""Ridge probe on frozen image features: what a linear classifier trained on all labels reaches, a ceiling."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler


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
