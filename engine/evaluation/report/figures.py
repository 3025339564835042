"""Figures of the report as SVG and pictures as data URIs, so that a page holds them."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from pathlib import Path

from markupsafe import Markup
from tqdm import tqdm

from ...utils.errors import UserError
from . import plots
from .evaluation import Evaluation
from .operating import Operating


def draw_figures(evaluation: Evaluation, found: Operating, *, progress: bool = True) -> dict[str, list[Markup]]:
    """Name → figures, as SVG; none where there is nothing to draw.

    Args:
        evaluation: what to draw.
        found: of the same evaluation.
        progress: show a progress bar if drawing takes more than a second.
    """
    labels, names = evaluation.labels, evaluation.class_names
    trust = {"as scored" if found.after else evaluation.method.name: found.before}
    trust |= {"calibrated": found.after} if found.after else {}
    drawings: dict[str, Callable[[], Iterable[Markup | None]]] = {
        "curves": lambda: plots.curves(labels, evaluation.probabilities, names, group_of=evaluation.group_of).values(),
        "reliability": lambda: [plots.reliability_diagram(trust)],
        "prevalence": lambda: [_prevalence(evaluation)],
        "cooccurrence": lambda: [plots.cooccurrence(labels, names)],
        "training": lambda: plots.training_curves(evaluation.training),
    }
    bar = tqdm(drawings.items(), desc="figures", unit="figure", leave=False, delay=1, disable=not progress)
    return {name: [figure for figure in draw() or () if figure] for name, draw in bar}


def _prevalence(evaluation: Evaluation) -> Markup | None:
    def share(positives: int, known: int) -> float:
        return positives / known if known else 0.0

    rows = [row for row in evaluation.main.per_class if row.name in evaluation.train]
    train = [share(*evaluation.train[row.name]) for row in rows]
    test = [share(row.positives, row.positives + row.negatives) for row in rows]
    return plots.prevalence(train, test, [row.name for row in rows])


def data_uri(picture: Path | bytes) -> str:
    """A PNG or JPEG as text for a page.

    Raises:
        UserError: it is missing or neither PNG nor JPEG.
    """
    if isinstance(picture, bytes):
        data, name = picture, "a picture of the report"
    else:
        try:
            data, name = picture.read_bytes(), str(picture)
        except OSError as error:
            raise UserError(f"{picture}: cannot be read for the report ({error.strerror})") from error
    for kind, magic in (("png", b"\x89PNG\r\n\x1a\n"), ("jpeg", b"\xff\xd8\xff")):
        if data.startswith(magic):
            return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    raise UserError(f"{name}: neither PNG nor JPEG; convert it")
