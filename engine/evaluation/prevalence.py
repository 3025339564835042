"""Classes grouped by how often they occur in training: head, medium and tail, as long-tailed results are reported."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

GROUPS = ("head", "medium", "tail")


def prevalence_groups(
    labels: ArrayLike, class_names: Sequence[str], *, head: float, tail: float
) -> dict[str, list[str]]:
    """head, medium and tail → class names, each in the order given; groups without a class are left out.

    Args:
        labels: (N,C) in {1, 0, −1} of the training images; −1 counts as neither.
        class_names: C names.
        head: classes of which more than this share is positive.
        tail: classes of which less than this share is positive; those without a label are there, too.
    """
    truth = np.asarray(labels)
    known = (truth >= 0).sum(axis=0)
    share = (truth == 1).sum(axis=0) / np.maximum(known, 1)  # (C,)
    place = np.where(share > head, 0, np.where(share < tail, 2, 1))
    found = {
        group: [name for name, p in zip(class_names, place, strict=True) if p == g] for g, group in enumerate(GROUPS)
    }
    return {group: names for group, names in found.items() if names}
