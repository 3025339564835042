"""Class selection and label policies."""

from pathlib import Path

import numpy as np
import pytest

from pspg.engine.data.labels import label_matrix, select_classes
from pspg.engine.data.manifest import Sample
from pspg.engine.utils.errors import UserError

NAMES = ["Mass", "Edema", "Normal"]


def samples(*labels):
    return [Sample(id=str(i), path=Path("x"), labels=row) for i, row in enumerate(labels)]


def test_select_keeps_the_wanted_order(tmp_path):
    assert select_classes(NAMES, None) == (NAMES, [0, 1, 2])
    assert select_classes(NAMES, ["Normal ", "Mass"]) == (["Normal", "Mass"], [2, 0])
    path = tmp_path / "seen.txt"
    path.write_text("Edema\nMass\n")
    assert select_classes(NAMES, str(path)) == (["Edema", "Mass"], [1, 0])


@pytest.mark.parametrize(
    ("wanted", "reason"), [(["Oedema"], "did you mean 'Edema'"), (["Mass", "Mass"], "twice"), ([], "empty")]
)
def test_select_refuses(wanted, reason):
    with pytest.raises(UserError, match=reason):
        select_classes(NAMES, wanted)


@pytest.mark.parametrize(
    ("uncertain", "blank", "expected"),
    [
        ("ignore", "zeros", [[-1, 1], [0, 0]]),
        ("zeros", "zeros", [[0, 1], [0, 0]]),
        ("ones", "zeros", [[1, 1], [0, 0]]),
        # a masked blank is not taken for an uncertain label
        ("ones", "ignore", [[1, 1], [0, -1]]),
    ],
)
def test_policies(uncertain, blank, expected):
    rows = samples((1.0, 0.0, -1.0), (None, 1.0, 0.0))
    matrix = label_matrix(rows, [2, 0], uncertain=uncertain, blank=blank)
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix, expected)


def test_sample_without_labels():
    with pytest.raises(UserError, match="'1' has no labels"):
        label_matrix(samples((1.0,), None), [0], uncertain="ignore", blank="zeros")
