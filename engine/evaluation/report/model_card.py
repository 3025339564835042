"""MODEL_CARD.md: a model card of the Hugging Face format; nothing is sent or looked up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ...utils.templates import markdown_templates
from .evaluation import SUMMARY, Evaluation

TAGS = ["chest-x-ray", "medical", "multi-label-classification"]
METRICS = ["macro_auc", "micro_auc", "map_ap"]
"""those of SUMMARY that do not depend on a threshold"""


def model_card(evaluation: Evaluation, shown: Mapping[str, Any]) -> str:
    """The card: front matter of what is known, and the text.

    No licence is stated: weights have the one that their data allow, which is not known here.

    Args:
        evaluation: whose card it is.
        shown: see `page.content`.
    """
    text = markdown_templates(Path(__file__).parent).get_template("model_card.md.j2").render(shown)
    data = ModelCardData(
        model_name=evaluation.method.name,
        library_name=evaluation.library,
        tags=[*TAGS, "pspg"] if evaluation.about is None else TAGS,
        metrics=["roc_auc", "average_precision"],
        eval_results=_results(evaluation),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _results(evaluation: Evaluation) -> list[EvalResult]:
    """Finite metrics of the method under evaluation, by group of classes."""
    data_set = Path(str(evaluation.settings.get("manifest", "images"))).stem
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type="manifest",
            dataset_name=data_set,
            dataset_config=f"classes: {group}",  # results of one configuration form one entry
            metric_type=key,
            metric_name=SUMMARY[key],
            metric_value=round(value, 4),
        )
        for group, metrics in evaluation.method.metrics.items()
        for key in METRICS
        if math.isfinite(value := float(getattr(metrics, key)))
    ]
