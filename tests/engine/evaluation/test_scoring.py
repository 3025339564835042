"""Features that scoring keeps of an image, and the probe that is fitted on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from pspg.engine.config import ModelConfig
from pspg.engine.evaluation.probe import ridge_probe
from pspg.engine.evaluation.scoring import score_batches
from pspg.engine.models.clip import ImageFeatures
from pspg.engine.models.features import FeatureBatch
from pspg.engine.models.pspg import PsPG


def test_pooled_features_are_the_global_one_and_the_mean_of_the_local_ones(make_clip: Callable[..., Any]) -> None:
    model = PsPG(make_clip().float(), ModelConfig(prompt_length=2, hidden_size=8, decoder_heads=2), ["edema"])
    features = ImageFeatures(torch.randn(3, 24), torch.randn(3, 5, 24))
    batch = FeatureBatch(["a", "b", "c"], features, None, torch.arange(3))
    ((place, scores),) = score_batches(model, model.head, [], [batch], torch.device("cpu"), None, context=None)
    assert place == 0
    expected = torch.cat([features.global_, features.tokens[:, 1:].mean(1)], dim=1)
    np.testing.assert_allclose(scores.features, expected.numpy(), rtol=1e-6)


def test_the_probe_leaves_masked_labels_out() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(30, 3)), rng.normal(size=(5, 3))
    labels = (train[:, :1] > 0).astype(np.float64)
    labels[::3] = -1
    scaler, known = StandardScaler().fit(train), labels[:, 0] >= 0
    fitted = Ridge(alpha=10.0).fit(scaler.transform(train[known]), labels[known, 0])
    expected = np.clip(fitted.predict(scaler.transform(test)), 0, 1)
    np.testing.assert_allclose(ridge_probe(train, labels, test)[:, 0], expected)
