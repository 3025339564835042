"""`evaluate` of model folders, and settings that do not go with a source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pspg.engine.checkpoints.run import load_tensors
from pspg.engine.data.manifest import load_label_names
from pspg.engine.models.clip import load_clip
from tests.engine.evaluation.sources.reports import by_hand, document, images_of, one_line, probabilities


def test_a_phase_1_folder_is_scored_with_the_papers_templates(
    models: Path, phantoms: Path, tmp_path: Path, evaluate
) -> None:
    assert evaluate("--checkpoint", models / "clip", "--probe", phantoms / "train.jsonl") == 0
    found = document(tmp_path / "report")
    others = ["template, positive only", "template, plain name", "ridge probe (ceiling)"]
    assert list(found["results"]) == ["CLIP fine-tuned", *others]
    assert found["title"] == "CLIP fine-tuned evaluation"
    assert found["settings"]["context"] == "none"
    card = (tmp_path / "report" / "MODEL_CARD.md").read_text()
    assert "phantoms" in card
    assert "Findings suggesting" in card
    assert "decoder" not in card
    clip = load_clip(str(phantoms / "clip.json"), str(models / "clip" / "model.safetensors"), quick_gelu=True)
    count = sum(parameter.numel() for parameter in clip.parameters())
    assert list(found["trainable_parameters"].values()) == [count, count, count, 20 * (32 + 1)]
    names = load_label_names(phantoms / "classes.txt")
    expected = by_hand(clip, images_of(phantoms, 64, (0.4,) * 3, (0.2,) * 3), names, 40)
    np.testing.assert_allclose(probabilities(tmp_path / "report"), expected, atol=1e-5)


def test_it_is_the_template_baseline_of_a_phase_2_run_on_it(models: Path, tmp_path: Path, evaluate) -> None:
    assert evaluate("--checkpoint", models / "clip") == 0
    assert evaluate("--checkpoint", models / "pspg", name="pspg") == 0
    found = document(tmp_path / "report")
    of_pspg = document(tmp_path / "pspg")
    variants = [f"template, {name}" for name in ("positive–negative", "positive only", "plain name")]
    assert list(of_pspg["results"]) == ["PsPG", *variants]
    assert list(found["results"]) == ["CLIP fine-tuned", *variants[1:]]
    for ours, theirs in zip(found["results"], variants, strict=True):
        expected = of_pspg["results"][theirs]["all"]["macro_auc"]
        assert found["results"][ours]["all"]["macro_auc"] == pytest.approx(expected, abs=5e-3)  # folded batch norms
    counts = of_pspg["trainable_parameters"]
    assert len({*map(counts.get, variants), *found["trainable_parameters"].values()}) == 1


def test_trainable_parameters_of_pspg_are_its_head(models: Path, evaluate, tmp_path: Path) -> None:
    assert evaluate("--checkpoint", models / "pspg", "--baselines", "false", "--method", "Mine") == 0
    found = document(tmp_path / "report")
    head = load_tensors(models / "pspg" / "model.safetensors")
    assert found["trainable_parameters"] == {"Mine": sum(tensor.numel() for tensor in head.values())}
    assert list(found["results"]) == ["Mine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give exactly one of --checkpoint, --clip, --predictions, --adapter; got none"),
        (["--clip", "RN50", "--adapter", "x.py"], "got --clip and --adapter"),
        (["--predictions", "x.csv", "--clip_weights", "x.pt"], "clip_weights: goes with clip, not with predictions"),
        (["--predictions", "x.csv", "--probe", "x.jsonl"], "probe: goes with checkpoint or clip, not with predictions"),
        (["--adapter", "x.py", "--probe", "x.jsonl"], "probe: goes with checkpoint or clip, not with adapter"),
        (["--adapter", "x.py", "--cache", "x"], "cache: goes with checkpoint or clip, not with adapter"),
        (["--adapter", "x.py", "--loader", "dali"], "loader: dali goes with checkpoint or clip, not with adapter"),
        (
            ["--adapter", "x.py", "--evaluation.context", "bank"],
            "evaluation.context: only PsPG's scores have a context",
        ),
        (["--adapter", "x.py"], "adapter: x.py: no such Python file"),
        (["--predictions", "x.csv", "--method", "template, plain name"], "method: 'template, plain name' is empty or"),
    ],
)
def test_sources_and_settings_that_do_not_go_together(
    evaluate, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert evaluate(*arguments) == 2
    assert message in one_line(capsys)
