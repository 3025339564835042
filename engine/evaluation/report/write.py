"""Results as files: metrics.json, per_class.csv, predictions.csv, report.html and MODEL_CARD.md."""

from __future__ import annotations

from pathlib import Path

from ...utils.files import write_text
from .evaluation import Evaluation
from .figures import data_uri, draw_figures
from .model_card import model_card
from .operating import operating
from .page import content, html_page
from .tables import metrics_json, write_per_class, write_predictions


def write_report(folder: Path, evaluation: Evaluation, *, progress: bool = True) -> Path:
    """Write every result of an evaluation; each file is complete or absent.

    Only what the evaluation holds is written: ids as given, pictures only if it has some.

    Args:
        folder: made if missing; files of an earlier report are replaced.
        evaluation: what to write.
        progress: show a progress bar if drawing takes more than a second.

    Returns:
        Path of report.html.

    Raises:
        UserError: a picture is missing or neither PNG nor JPEG.
    """
    pictures = [(caption, data_uri(picture)) for caption, picture in evaluation.pictures]
    gallery = [(one.kind, one.caption, data_uri(one.image)) for one in evaluation.gallery]
    found = operating(evaluation)
    figures = draw_figures(evaluation, found, progress=progress)
    shown = content(evaluation, found)
    results, card, page = (
        metrics_json(evaluation),
        model_card(evaluation, shown),
        html_page(shown, figures, pictures, gallery),
    )

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "metrics.json", results)
    write_per_class(folder / "per_class.csv", evaluation)
    write_predictions(folder / "predictions.csv", evaluation)
    write_text(folder / "MODEL_CARD.md", card)
    write_text(folder / "report.html", page)
    return folder / "report.html"
