"""Weights and reductions that a preset fills in, for every pair loss."""

from __future__ import annotations

from typing import Any

import pytest

from pspg.engine.config import LossConfig
from pspg.engine.training.losses import PromptLoss


@pytest.mark.parametrize(
    ("preset", "pair", "expected"),
    [
        ("paper", "spcl", (1.0, "sum", 1.0, "sum")),
        ("paper", "pcl", (1.0, "sum", 1.0, "sum")),
        ("paper", "ranking", (1.0, "sum", 1.0, "mean")),
        ("published", "spcl", (0.1, "sum", 1.0, "mean")),
        ("published", "pcl", (0.1, "sum", 1.0, "mean")),
        ("published", "ranking", (0.1, "sum", 0.07, "mean")),
    ],
)
def test_a_preset_fills_what_is_null(preset: Any, pair: Any, expected: tuple[Any, ...]) -> None:
    found = PromptLoss(LossConfig(preset=preset, pair=pair)).config
    weights = found.classification_weight, found.classification_reduction, found.pair_weight, found.pair_reduction
    assert weights == expected


def test_a_preset_leaves_what_is_given() -> None:
    config = LossConfig(
        preset="published", pair="ranking", classification_weight=2.0, pair_weight=0.0, pair_reduction="sum"
    )
    found = PromptLoss(config).config
    assert (found.classification_weight, found.pair_weight, found.pair_reduction) == (2.0, 0.0, "sum")
