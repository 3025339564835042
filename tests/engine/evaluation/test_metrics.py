"""Metrics against scikit-learn, with ties, masked entries and classes that have one value only."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, matthews_corrcoef, roc_auc_score

from pspg.engine.evaluation.metrics import evaluate, evaluate_groups, macro_auc
from pspg.engine.utils.errors import UserError

NAMES = ["Edema", "Mass", "Nodule", "Pneumonia"]


@pytest.fixture
def scores() -> tuple[np.ndarray, np.ndarray]:
    """Labels with masked entries, probabilities with many ties."""
    rng = np.random.default_rng(3)
    labels = rng.choice([1, 0, -1], p=[0.3, 0.5, 0.2], size=(60, 4)).astype(np.float32)
    return labels, rng.integers(0, 9, size=(60, 4)) / 8


def test_each_class_equals_sklearn_on_its_unmasked_rows(scores: tuple[np.ndarray, np.ndarray]) -> None:
    labels, probabilities = scores
    metrics = evaluate(labels, probabilities, NAMES, threshold=0.4)
    for c, row in enumerate(metrics.per_class):
        known = labels[:, c] != -1
        y, p = labels[known, c], probabilities[known, c]
        assert (row.name, row.positives, row.negatives) == (NAMES[c], (y == 1).sum(), (y == 0).sum())
        assert row.masked == (~known).sum() > 0
        assert row.auc == pytest.approx(roc_auc_score(y, p))
        assert row.ap == pytest.approx(average_precision_score(y, p))
        assert row.f1 == pytest.approx(f1_score(y, p > 0.4))
        assert row.mcc == pytest.approx(matthews_corrcoef(y, p > 0.4))
    assert metrics.macro_auc == pytest.approx(np.mean([row.auc for row in metrics.per_class]))
    assert metrics.map_ap == pytest.approx(np.mean([row.ap for row in metrics.per_class]))
    assert metrics.macro_mcc == pytest.approx(np.mean([row.mcc for row in metrics.per_class]))


def test_micro_pools_the_unmasked_entries(scores: tuple[np.ndarray, np.ndarray]) -> None:
    labels, probabilities = scores
    metrics = evaluate(labels, probabilities, NAMES)
    known = labels != -1
    assert metrics.micro_auc == pytest.approx(roc_auc_score(labels[known], probabilities[known]))
    assert metrics.micro_f1 == pytest.approx(f1_score(labels[known], probabilities[known] > 0.5))


def test_masked_entries_cannot_move_any_metric(scores: tuple[np.ndarray, np.ndarray]) -> None:
    labels, probabilities = scores
    other = np.where(labels == -1, np.random.default_rng(0).random(labels.shape), probabilities)
    assert evaluate(labels, probabilities, NAMES) == evaluate(labels, other, NAMES)


def test_two_definitions_of_precision_recall_area() -> None:
    # Falling scores 1, 0, 1: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1.
    row = evaluate([[1], [0], [1]], [[0.9], [0.5], [0.1]], ["Mass"]).per_class[0]
    assert row.ap == pytest.approx(1 / 2 + 1 / 3)
    assert row.ap_trapezoid == pytest.approx(1 / 2 + (1 / 2 + 2 / 3) / 4)


def test_single_valued_classes_are_named_and_left_out(scores: tuple[np.ndarray, np.ndarray]) -> None:
    labels, probabilities = scores
    labels = labels.copy()
    labels[labels[:, 0] == 0, 0] = 1
    labels[labels[:, 1] == 1, 1] = 0
    labels[:, 2] = -1
    metrics = evaluate(labels, probabilities, NAMES)
    reasons = {skip.name: skip.reason for skip in metrics.skipped}
    assert list(reasons) == ["Edema", "Mass", "Nodule"]
    assert reasons["Edema"].startswith("no negatives among")
    assert reasons["Mass"].startswith("no positives among")
    assert reasons["Nodule"] == "all 60 labels are masked"
    assert np.isnan(metrics.per_class[0].auc)
    assert metrics.macro_auc == metrics.per_class[3].auc
    assert np.isnan(evaluate(labels[:, :3], probabilities[:, :3], NAMES[:3]).macro_auc)


def test_fast_macro_auc_is_the_same_number(scores: tuple[np.ndarray, np.ndarray]) -> None:
    labels, probabilities = scores
    labels = labels.copy()
    labels[:, 2] = 0
    assert macro_auc(labels, probabilities) == pytest.approx(evaluate(labels, probabilities, NAMES).macro_auc)
    assert np.isnan(macro_auc(labels[:, 2:3], probabilities[:, 2:3]))


def test_groups_take_their_own_columns(scores: tuple[np.ndarray, np.ndarray]) -> None:
    labels, probabilities = scores
    groups = {"seen": ["Nodule", "Edema"], "unseen": ["Mass"]}
    metrics = evaluate_groups(labels, probabilities, NAMES, groups)
    assert metrics["seen"] == evaluate(labels[:, [2, 0]], probabilities[:, [2, 0]], ["Nodule", "Edema"])
    assert [row.name for row in metrics["unseen"].per_class] == ["Mass"]
    with pytest.raises(UserError, match="group 'unseen': class 'Hernia'"):
        evaluate_groups(labels, probabilities, NAMES, {"unseen": ["Hernia"]})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_probabilities_that_are_not_finite_name_class_and_rows(
    scores: tuple[np.ndarray, np.ndarray], bad: float
) -> None:
    labels, probabilities = scores
    probabilities = probabilities.copy()
    probabilities[[5, 7], 1] = bad
    with pytest.raises(UserError, match=r"class 'Mass': 2 of 60 rows, the first is row 5, have NaN or inf"):
        evaluate(labels, probabilities, NAMES)
    with pytest.raises(UserError, match="2 of 60 rows"):
        macro_auc(labels, probabilities)


def test_other_bad_input_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"class 'Mass': 1 of 2 rows.* outside \[0, 1\]"):
        evaluate([[1], [0]], [[3.0], [0.1]], ["Mass"])
    with pytest.raises(UserError, match="labels other than 1, 0 and -1"):
        evaluate([[np.nan], [0]], [[0.5], [0.1]], ["Mass"])
    with pytest.raises(UserError, match="0 images"):
        evaluate(np.zeros((0, 1)), np.zeros((0, 1)), ["Mass"])
    with pytest.raises(UserError, match="named twice"):
        evaluate(np.zeros((2, 2)), np.zeros((2, 2)), ["Mass", "Mass"])
