"""The seed decides the bootstrap's resamples."""

from __future__ import annotations

import numpy as np

from pspg.engine.evaluation.bootstrap import draws, resample


def test_equal_seeds_draw_equal_images_and_others_others() -> None:
    first, same, other = (np.stack(list(draws(20, 5, seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any(axis=1).all()
    assert (first[0] != first[1]).any()


def test_samples_follow_the_seed() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, (20, 1)), rng.random((20, 1))
    first, same, other = (
        resample(labels, scores, ["edema"], resamples=8, seed=seed, progress=False).macro_auc for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()
