"""Every resample of the vectorised bootstrap equals scikit-learn on the resampled rows."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

import pspg.engine.evaluation.bootstrap as module
from pspg.engine.evaluation.bootstrap import bootstrap, draws, interval, intervals, resample, resample_groups
from pspg.engine.evaluation.metrics import evaluate
from pspg.engine.utils.errors import UserError

NAMES = ["Edema", "Mass", "Nodule", "Pneumonia", "Hernia"]


def sklearn_areas(labels: np.ndarray, scores: np.ndarray) -> tuple[float, float, float]:
    known = labels != -1
    labels, scores = labels[known], scores[known]
    if len(set(labels)) < 2:
        return np.nan, np.nan, np.nan
    precision, recall, _ = precision_recall_curve(labels, scores)
    return roc_auc_score(labels, scores), average_precision_score(labels, scores), auc(recall, precision)


def random_scores(images: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Class 2 has two positives, so that many resamples hold none; class 4 has none at all."""
    rng = np.random.default_rng(images + levels)
    labels = rng.choice([1, 0, -1], p=[0.3, 0.5, 0.2], size=(images, 5)).astype(np.float32)
    labels[:, 2] = np.where(np.arange(images) < 2, 1, 0)
    labels[:, 4] = np.minimum(labels[:, 4], 0)
    return labels, rng.integers(0, levels + 1, size=(images, 5)) / levels


@pytest.mark.parametrize("levels", [1, 6, 1_000_000], ids=["two scores", "ties", "distinct"])
@pytest.mark.parametrize("images", [8, 40])
def test_equals_sklearn_on_each_resample(images: int, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)  # neither chunks nor blocks divide the work evenly
    monkeypatch.setattr(module, "BLOCK", 3)
    labels, probabilities = random_scores(images, levels)
    samples = resample(labels, probabilities, NAMES, resamples=30, seed=5, progress=False)
    skipped = 0
    for r, rows in enumerate(draws(images, 30, seed=5)):
        y, p = labels[rows], probabilities[rows]
        expected = np.array([sklearn_areas(y[:, c], p[:, c]) for c in range(5)])
        got = np.stack([samples.auc[r], samples.ap[r], samples.ap_trapezoid[r]], axis=1)
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
        skipped += np.isnan(expected[2, 0])
        macro = [samples.macro_auc[r], samples.map_ap[r], samples.map_trapezoid[r]]
        np.testing.assert_allclose(macro, np.nanmean(expected, axis=0), rtol=1e-12)
        micro = sklearn_areas(y.reshape(-1), p.reshape(-1))[0]
        np.testing.assert_allclose(samples.micro_auc[r], micro, rtol=1e-12)
    assert 0 < skipped < 30


def test_intervals_are_percentiles_of_the_defined_resamples() -> None:
    labels, probabilities = random_scores(40, 50)
    samples = resample(labels, probabilities, NAMES, resamples=200, seed=1, progress=False)
    found = bootstrap(labels, probabilities, NAMES, resamples=200, seed=1, progress=False)
    assert found.macro_auc.low == pytest.approx(np.percentile(samples.macro_auc, 2.5))
    assert found.micro_auc.high == pytest.approx(np.percentile(samples.micro_auc, 97.5))
    assert found.ap["Nodule"].high == pytest.approx(np.nanpercentile(samples.ap[:, 2], 97.5))
    assert found.auc["Nodule"].resamples == np.isfinite(samples.auc[:, 2]).sum() < 200
    assert found.auc["Hernia"].resamples == 0
    assert np.isnan(found.auc["Hernia"].low)
    point = evaluate(labels, probabilities, NAMES)
    assert found.macro_auc.low < point.macro_auc < found.macro_auc.high


def test_resamples_do_not_depend_on_chunks_or_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, probabilities = random_scores(40, 50)
    whole = resample(labels, probabilities, NAMES, resamples=50, seed=2, progress=False)
    monkeypatch.setattr(module, "CHUNK", 11)
    again = resample(labels, probabilities, NAMES, resamples=50, seed=2, progress=False)
    np.testing.assert_array_equal(whole.auc, again.auc)
    opposite = resample(labels, 1 - probabilities, NAMES, resamples=50, seed=2, progress=False)
    np.testing.assert_allclose(whole.auc, 1 - opposite.auc, atol=1e-12)


def test_groups_share_the_resamples() -> None:
    labels, probabilities = random_scores(40, 50)
    options = {"resamples": 50, "seed": 3, "progress": False}
    alone = bootstrap(labels, probabilities, NAMES, **options)
    samples = resample_groups(labels, probabilities, NAMES, {"unseen": ["Mass", "Edema"]}, **options)["unseen"]
    assert intervals(samples, ["Mass", "Edema"], seed=3).auc["Mass"] == alone.auc["Mass"]


def test_interval_of_nothing() -> None:
    empty = interval(np.array([np.nan, np.nan]))
    assert empty.resamples == 0
    assert np.isnan(empty.low)


def test_nan_probabilities_are_refused() -> None:
    labels, probabilities = random_scores(40, 50)
    probabilities[3, 1] = np.nan
    with pytest.raises(UserError, match="class 'Mass': 1 of 40 rows"):
        bootstrap(labels, probabilities, NAMES, resamples=5)
