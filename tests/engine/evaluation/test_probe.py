"""The text-informed probe: its minimum, and the classes that it leaves to the templates."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

from pspg.engine.evaluation.probe import text_informed_probe


def test_it_is_the_minimum_and_leaves_other_classes_alone() -> None:
    noise = np.random.default_rng(0)
    x, x_test = noise.normal(size=(40, 3)), noise.normal(size=(6, 3))
    text, text_test = noise.uniform(0.1, 0.9, (40, 3)), noise.uniform(0.1, 0.9, (6, 3))
    labels = (noise.random((40, 3)) < 0.4).astype(float)
    labels[:5, 0], labels[:, 2] = -1, 1
    found = text_informed_probe(x, labels, text, x_test, text_test, ["a", "b", "c"], {"a", "c"}, alpha=2.0)
    np.testing.assert_array_equal(found[:, 1], text_test[:, 1])  # not trained on
    np.testing.assert_array_equal(found[:, 2], text_test[:, 2])  # one label value

    known = labels[:, 0] >= 0
    mean, deviation = x.mean(0), x.std(0)
    odds, y = np.log(text[known, 0] / (1 - text[known, 0])), labels[known, 0]

    def cost(p: np.ndarray) -> float:
        errors = y - p[0] - p[1] * odds - (x[known] - mean) / deviation @ p[2:]
        return float(errors @ errors + 2.0 * p[2:] @ p[2:])

    best = minimize(cost, np.zeros(5), tol=1e-12).x
    odds_test = np.log(text_test[:, 0] / (1 - text_test[:, 0]))
    expected = best[0] + best[1] * odds_test + (x_test - mean) / deviation @ best[2:]
    np.testing.assert_allclose(found[:, 0], np.clip(expected, 0, 1), atol=1e-5)
