"""Probes on frozen image features, in closed form: a ceiling, and one that starts from the templates' scores."""

from __future__ import annotations

from collections.abc import Collection, Sequence

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


def text_informed_probe(
    train_features: NDArray[np.floating],
    train_labels: NDArray[np.floating],
    train_text: NDArray[np.floating],
    test_features: NDArray[np.floating],
    test_text: NDArray[np.floating],
    class_names: Sequence[str],
    trained: Collection[str],
    *,
    alpha: float = 10.0,
) -> NDArray[np.float64]:
    """What the templates' log-odds say of a class, corrected by a ridge regression on its training images.

    For a class with labels y the minimum of ‖y − a − b·z − Xβ‖² + α‖β‖²: the template's log-odds z and the offset are
    not penalised, the image features X are. Scores (M,C) are clipped to [0, 1]. A class that is not among `trained`,
    or has one label value, keeps the probability of the templates.

    Args:
        train_features, test_features: (N,F) and (M,F).
        train_labels: (N,C) in {1, 0, −1}; −1 is left out.
        train_text, test_text: (N,C) and (M,C) probabilities of the templates.
        class_names: C names.
        trained: names whose labels may be used.
        alpha: penalty, on standardised features.
    """
    scaler = StandardScaler().fit(train_features)
    train, test = scaler.transform(train_features), scaler.transform(test_features)
    scores = np.array(test_text, dtype=np.float64)
    for c, name in enumerate(class_names):
        known = train_labels[:, c] >= 0
        labels = train_labels[known, c].astype(np.float64)
        if name not in trained or len(np.unique(labels)) < 2:
            continue
        text = np.stack([np.ones(known.sum()), _odds(train_text[known, c])], axis=1)
        basis = np.linalg.qr(text)[0]
        free_x, free_y = (value - basis @ (basis.T @ value) for value in (train[known], labels))
        beta = Ridge(alpha=alpha, fit_intercept=False).fit(free_x, free_y).coef_
        offset = np.linalg.lstsq(text, labels - train[known] @ beta, rcond=None)[0]
        scores[:, c] = np.clip(offset[0] + offset[1] * _odds(test_text[:, c]) + test @ beta, 0.0, 1.0)
    return scores


def _odds(probabilities: NDArray[np.floating]) -> NDArray[np.float64]:
    inside = np.clip(np.asarray(probabilities, dtype=np.float64), 1e-12, 1 - 1e-12)
    return np.log(inside) - np.log1p(-inside)
