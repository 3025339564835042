"""The matrix that losses and metrics use, made of a manifest's labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..utils.errors import UserError
from .manifest import Sample, load_label_names, unknown_class

MASKED = -1.0


def select_classes(
    label_names: Sequence[str], class_names: str | Sequence[str] | None, *, key: str = "data.class_names"
) -> tuple[list[str], list[int]]:
    """The classes of a run and their columns in the label lists.

    Args:
        label_names: all names, in the order of the label lists.
        class_names: names to keep, in the order wanted: a list, or the path of a text file, one a line;
            None: all.
        key: the setting that names them.

    Returns:
        names (C) and columns (C).

    Raises:
        UserError: no names, a name twice, or one that is no label name.
    """
    if class_names is None:
        return list(label_names), list(range(len(label_names)))
    from_file = isinstance(class_names, str)
    source = f"{class_names}" if isinstance(class_names, str) else key
    names = load_label_names(class_names) if isinstance(class_names, str) else [name.strip() for name in class_names]
    if not names:
        raise UserError(f"{source}: the list is empty; leave it null for all classes")
    column = {name: number for number, name in enumerate(label_names)}
    chosen: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        place = f"{source}:{number}" if from_file else source
        if name not in column:
            raise UserError(f"{place}: {unknown_class(name, label_names)}")
        if name in chosen:
            raise UserError(f"{place}: class name {name!r} is given twice")
        chosen[name] = column[name]
    return list(chosen), list(chosen.values())


def label_matrix(
    samples: Sequence[Sample],
    columns: Sequence[int],
    *,
    uncertain: Literal["ignore", "zeros", "ones"],
    blank: Literal["zeros", "ignore"],
) -> NDArray[np.float32]:
    """Labels (N,C), float32, in {1, 0, -1}; -1 is masked.

    Args:
        samples: N samples with labels.
        columns: C positions in their label lists.
        uncertain: what a label of -1 becomes: masked, 0 or 1.
        blank: what a null label becomes: 0 or masked.

    Raises:
        UserError: a sample without labels.
    """
    for sample in samples:
        if sample.labels is None:
            raise UserError(f"sample {sample.id!r} has no labels; give the manifest's lines 'labels'")
    if not samples:
        return np.zeros((0, len(columns)), dtype=np.float32)
    # float32 turns None into NaN, which no manifest can hold
    labels = np.array([sample.labels for sample in samples], dtype=np.float32)[:, list(columns)]
    uncertain_as = {"ignore": MASKED, "zeros": 0.0, "ones": 1.0}[uncertain]
    blank_as = {"ignore": MASKED, "zeros": 0.0}[blank]
    missing = np.isnan(labels)
    labels[labels == -1] = uncertain_as
    labels[missing] = blank_as
    return labels
