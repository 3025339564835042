"""Figures and pictures of the report as data URIs, so that a page holds them."""

from __future__ import annotations

import base64
from pathlib import Path

from tqdm import tqdm

from ...utils.errors import UserError
from . import plots
from .evaluation import Evaluation


def draw_figures(evaluation: Evaluation, *, progress: bool = True) -> dict[str, str | None]:
    """Name → figure; None where there is nothing to draw.

    Args:
        evaluation: what to draw.
        progress: show a progress bar if drawing takes more than a second.
    """
    labels, names, group_of = evaluation.labels, evaluation.class_names, evaluation.group_of
    main, group = evaluation.main, evaluation.main_group
    others = ((method.name, method.metrics[group]) for method in evaluation.methods[1:] if group in method.metrics)
    baseline = next(others, None)
    drawings = {
        "curves": lambda: plots.curves(labels, evaluation.probabilities, names, group_of=group_of),
        "bars": lambda: plots.class_bars(main, evaluation.main_intervals, group_of=group_of, baseline=baseline),
        "cooccurrence": lambda: plots.cooccurrence(labels, names),
        "training": lambda: plots.training_curves(evaluation.training),
    }
    bar = tqdm(drawings.items(), desc="figures", unit="figure", leave=False, delay=1, disable=not progress)
    return {name: None if (png := draw()) is None else data_uri(png) for name, draw in bar}


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
