"""Calibration and thresholds: likelihood, order, operating points, and what the measures of both say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit
from sklearn.metrics import brier_score_loss, confusion_matrix, f1_score, roc_auc_score

from pspg.engine.evaluation.calibration import FEW, calibrated, fit_classes, fit_line, log_odds, pick_threshold
from pspg.engine.evaluation.reliability import at_thresholds, reliability, wilson

NAMES = ["a", "b", "rare", "rarer", "none", "masked", "below chance"]


def validation(images: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds that are twice too sure and shifted, and labels; the last classes are those of their names."""
    rng = np.random.default_rng(0)
    true = rng.normal(-1.5, 1.5, (images, len(NAMES)))
    labels = (rng.random(true.shape) < expit(true)).astype(np.int8)
    labels[rng.random(true.shape) < 0.1] = -1
    for column, keep in ((2, 6), (3, 3), (4, 0)):
        rows = np.flatnonzero(labels[:, column] == 1)
        labels[rows[keep:], column] = 0
    labels[:, 5] = -1
    true[:, 6] *= -1
    return 2 * true + 1, labels


def test_the_line_is_of_maximal_likelihood() -> None:
    z, y = validation(300)
    z, y = 30 * z[:, 0][y[:, 0] >= 0], y[:, 0][y[:, 0] >= 0]
    positives, negatives = (y == 1).sum(), (y == 0).sum()
    target = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(line: np.ndarray) -> float:
        odds = line[0] * z + (line[1] if line.size > 1 else 0)
        return float(np.sum(np.logaddexp(0, odds) - target * odds))

    for method, start in (("platt", [0.02, 0.0]), ("temperature", [0.02])):
        best = minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-10, "maxiter": 4000})
        slope, intercept = fit_line(z, y, method)
        np.testing.assert_allclose([slope, intercept][: best.x.size], best.x, rtol=1e-4, atol=1e-5)
    assert np.isfinite(fit_line(np.array([-1.0, 1.0]), np.array([0, 1]), "platt")).all()  # parted labels


def test_what_was_wrong_is_put_right_and_the_order_stays() -> None:
    z, y = validation()
    classes, reasons = fit_classes(z, y, NAMES)
    assert reasons.keys() == {"none", "masked", "below chance"}
    assert reasons["none"] == "no positives in the validation"
    assert [row.group for row in classes] == ["a", "b", FEW, FEW, None, None, None]
    for row in classes[:2]:
        assert row.slope == pytest.approx(0.5, abs=0.06)
        assert row.intercept == pytest.approx(-0.5, abs=0.15)
    assert (classes[2].slope, classes[2].intercept) == (classes[3].slope, classes[3].intercept)
    before, after = expit(z), calibrated(z, classes)
    np.testing.assert_allclose(after[:, 4:], before[:, 4:], atol=1e-15)
    for c in range(4):
        known = y[:, c] >= 0
        assert roc_auc_score(y[known, c], after[known, c]) == roc_auc_score(y[known, c], before[known, c])
        assert (np.argsort(after[:, c], kind="stable") == np.argsort(before[:, c], kind="stable")).all()
    wrong, right = reliability(y[:, :2], before[:, :2]), reliability(y[:, :2], after[:, :2])
    assert right.ece < 0.02 < wrong.ece
    assert right.brier < wrong.brier


def test_groups_share_a_line() -> None:
    z, y = validation()
    classes, _ = fit_classes(z, y, NAMES, groups={"pair": ["a", "b"]}, method="temperature")
    assert classes[0].slope == classes[1].slope != classes[2].slope
    assert {row.intercept for row in classes} == {0.0}


@pytest.mark.parametrize("target", [0.5, 0.8, 0.95, 1.0])
def test_thresholds_reach_their_point(target: float) -> None:
    z, y = validation(500)
    p, y = expit(np.round(z[:, 0], 1))[y[:, 0] >= 0], y[:, 0][y[:, 0] >= 0]  # with ties
    edges = np.unique(np.r_[0, p, 1])
    candidates = (edges[1:] + edges[:-1]) / 2

    def rates(threshold: float) -> tuple[float, float]:
        (tn, fp), (fn, tp) = confusion_matrix(y, p > threshold)
        return tp / (tp + fn), tn / (tn + fp)

    sensitivity, specificity = np.array([rates(t) for t in candidates]).T
    found = rates(pick_threshold(y, p, "sensitivity", target))
    assert found == (sensitivity[sensitivity >= target].min(), specificity[sensitivity >= target].max())
    found = rates(pick_threshold(y, p, "specificity", target))
    assert found == (sensitivity[specificity >= target].max(), specificity[specificity >= target].min())
    best = f1_score(y, p > pick_threshold(y, p, "f1", target))
    assert best == pytest.approx(max(f1_score(y, p > t) for t in candidates))


def test_thresholds_where_there_is_little_to_choose() -> None:
    assert pick_threshold(np.array([1, 1]), np.array([0.2, 0.4]), "f1", 0.9) is None
    threshold = pick_threshold(np.array([0, 1]), np.array([1.0, 1.0]), "specificity", 0.9)
    assert threshold == 1.0  # nothing is found
    threshold = pick_threshold(np.array([0, 1]), np.array([0.5, np.nextafter(0.5, 1)]), "f1", 0.9)
    assert threshold == 0.5


def test_measures_agree_with_scikit_learn() -> None:
    z, y = validation(800)
    p = expit(z)
    known = y >= 0
    found = reliability(y, p)
    assert found.brier == pytest.approx(brier_score_loss(y[known], p[known]))
    assert sum(found.counts) == known.sum()
    assert found.ece == pytest.approx(
        sum(n * abs(m - s) for n, m, s in zip(found.counts, found.means, found.shares, strict=True)) / known.sum()
    )
    row = at_thresholds(y, p, NAMES, [0.3, *[None] * 6])[0]
    mask = known[:, 0]
    assert [[row.tn, row.fp], [row.fn, row.tp]] == confusion_matrix(y[mask, 0], p[mask, 0] > 0.3).tolist()
    assert row.f1 == pytest.approx(f1_score(y[mask, 0], p[mask, 0] > 0.3))
    assert row.sensitivity_interval[0] < row.sensitivity < row.sensitivity_interval[1]


def test_wilsons_interval() -> None:
    """Brown, Cai and DasGupta's formula."""
    n, k, z = 20, 20, 1.959963984540054
    centre, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * np.sqrt(k - k * k / n + z * z / 4)
    assert wilson(k, n) == pytest.approx((centre - half, min(centre + half, 1)))
    assert np.isnan(wilson(0, 0)).all()


def test_log_odds_of_certain_scores_are_finite() -> None:
    p = np.array([0.0, 1e-9, 0.5, 1.0])
    assert np.isfinite(log_odds(p)).all()
    np.testing.assert_allclose(log_odds(p)[1:3], logit(p[1:3]))
