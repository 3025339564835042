"""`evaluate` from every source of scores: what it computes, and what it says to wrong input."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pspg.engine.checkpoints.model_folder import describe, write_model
from pspg.engine.checkpoints.run import load_tensors
from pspg.engine.cli import main
from pspg.engine.config import ModelConfig
from pspg.engine.data.manifest import load_label_names
from pspg.engine.data.pixels import Pixels
from pspg.engine.evaluation.report import plots
from pspg.engine.evaluation.sources.adapter import Adapter
from pspg.engine.models import any_clip
from pspg.engine.models.clip import load_clip, tokenize
from pspg.engine.models.pspg import PsPG

ROOT = Path(__file__).parents[4]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
VIT = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def models(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders with random weights: `clip`, and `pspg` on the same CLIP."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    clip = load_clip(str(phantoms / "clip.json"), None, quick_gelu=True)
    pixels = Pixels(size=64, resize="stretch", mean=0.4, std=0.2)
    names = load_label_names(phantoms / "classes.txt")
    head = ModelConfig(prompt_length=3, hidden_size=16, decoder_heads=2)
    model = PsPG(clip, head, names)
    description = describe("pspg", clip, pixels, head=head, class_names=names, training="phantoms")
    towers = dict(clip.state_dict())
    write_model(folder / "pspg", description, {"clip": towers, "model": dict(model.head.state_dict())})
    write_model(folder / "clip", describe("clip", clip, pixels, training="phantoms"), {"model": towers})
    return folder


@pytest.fixture
def evaluate(phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Function (arguments, …) → exit status, of an evaluation of the test split to tmp_path / name, without figures."""
    for figure in ("curves", "reliability_diagram", "cooccurrence"):
        monkeypatch.setattr(plots, figure, lambda *arguments, **options: {})

    def run(*arguments: object, name: str = "report") -> int:
        paths = ["--manifest", phantoms / "test.jsonl", "--output", tmp_path / name]
        more = [
            "--overwrite",
            "true",
            "--workers",
            0,
            "--device",
            "cpu",
            "--evaluation.bootstrap",
            0,
            "--evaluation.batch_size",
            16,
        ]
        return main(["evaluate", *map(str, [*paths, *more, *arguments])])

    return run


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def table(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def probabilities(folder: Path) -> np.ndarray:
    return np.array([row[1:] for row in table(folder / "predictions.csv")[1:]], dtype=float)


def images_of(phantoms: Path, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """The test images (40,3,size,size), which are square, resized and normalised by hand."""
    lines = [json.loads(line) for line in (phantoms / "test.jsonl").read_text().splitlines()]
    images = [Image.open(phantoms / line["filepath"]).convert("L").convert("RGB") for line in lines]
    assert all(image.width == image.height for image in images)
    values = np.stack([np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in images])
    pixels = torch.from_numpy(values).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@torch.no_grad()
def by_hand(clip: Any, images: torch.Tensor, names: list[str], context: int) -> np.ndarray:
    """Softmax over the paper's two templates (footnote 3)."""
    image = clip.eval().encode_image(images, normalize=True)
    sides = [
        clip.encode_text(tokenize([template.format(name) for name in names], context), normalize=True)
        for template in ("Findings suggesting {}.", "No evidence of {}.")
    ]
    logits = clip.logit_scale.exp() * torch.stack([image @ side.T for side in sides])
    return logits.double().softmax(0)[0].numpy()


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


def write_clip(folder: Path, config: dict[str, Any], preprocess: dict[str, Any], layout: str) -> tuple[Any, Path]:
    """A random CLIP, its JSON file beside its weights."""
    torch.manual_seed(1)
    custom = layout == "custom text"
    clip = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    if layout == "openai":  # half precision, with settings among the weights
        clip = clip.half().float()
        sizes = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
        torch.save({**{name: value.half() for name, value in clip.state_dict().items()}, **sizes}, folder / "clip.pt")
    elif layout == "parallel":
        torch.save({"state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, folder / "clip.pt")
    else:
        save_file(clip.state_dict(), folder / "clip.safetensors")
    architecture = {**config, "custom_text": True} if custom or layout == "parallel" else config
    (folder / "net.json").write_text(json.dumps({"model_cfg": architecture, "preprocess_cfg": preprocess}))
    return clip, folder / ("clip.safetensors" if (folder / "clip.safetensors").exists() else "clip.pt")


@pytest.mark.parametrize("layout", ["openai", "open_clip", "custom text", "parallel"])
def test_any_clip_has_its_own_pixels_and_layout(phantoms: Path, tmp_path: Path, evaluate, layout: str) -> None:
    preprocess = {"mean": MEAN, "std": STD, "resize_mode": "longest"}
    clip, weights = write_clip(tmp_path, VIT, preprocess, layout)
    assert evaluate("--clip", tmp_path / "net.json", "--clip_weights", weights) == 0
    found = document(tmp_path / "report")
    assert list(found["results"]) == ["net", "template, positive only", "template, plain name"]
    assert found["settings"]["pixels"] == {"size": 32, "resize": "pad", "mean": list(MEAN), "std": list(STD)}
    expected = by_hand(clip, images_of(phantoms, 32, MEAN, STD), load_label_names(phantoms / "classes.txt"), 40)
    assert np.ptp(expected) > 0.05
    np.testing.assert_allclose(probabilities(tmp_path / "report"), expected, atol=1e-5)


TEXT = {"context_length": 40, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
COCA = {
    "embed_dim": 24,
    "vision_cfg": {**VIT["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
}
SIGLIP = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
    "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
}


@pytest.mark.parametrize(("config", "kind"), [(COCA, open_clip.CoCa), (SIGLIP, open_clip.CustomTextCLIP)])
def test_towers_that_pspg_cannot_drive_are_scored(
    phantoms: Path, tmp_path: Path, evaluate, config: dict[str, Any], kind: Any
) -> None:
    torch.manual_seed(0)
    clip = kind(**json.loads(json.dumps(config)))
    save_file({name: tensor.clone() for name, tensor in clip.state_dict().items()}, tmp_path / "clip.safetensors")
    (tmp_path / "net.json").write_text(json.dumps({**config, "custom_text": True, "preprocess_cfg": {"mean": MEAN}}))
    assert evaluate("--clip", tmp_path / "net.json", "--clip_weights", tmp_path / "clip.safetensors") == 0
    images = images_of(phantoms, config["vision_cfg"]["image_size"], MEAN, open_clip.OPENAI_DATASET_STD)
    expected = by_hand(clip, images, load_label_names(phantoms / "classes.txt"), 40)
    np.testing.assert_allclose(probabilities(tmp_path / "report"), expected, atol=1e-5)


def test_a_tower_of_another_image_size_is_one_line(
    tmp_path: Path, evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    vision = {**SIGLIP["vision_cfg"], "image_size": 64, "timm_model_name": "vit_tiny_patch16_224"}
    config = {**SIGLIP, "vision_cfg": vision}
    clip = open_clip.CustomTextCLIP(**json.loads(json.dumps(config)))
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    (tmp_path / "net.json").write_text(json.dumps({**config, "custom_text": True}))
    capsys.readouterr()
    assert evaluate("--clip", tmp_path / "net.json", "--clip_weights", tmp_path / "clip.safetensors") == 2
    assert "its towers do not take their inputs (Input height (64)" in one_line(capsys)


def test_the_shipped_chexzero_file_is_the_model_of_its_paper() -> None:
    architecture = json.loads((ROOT / "configs" / "chexzero.json").read_text())["model_cfg"]
    assert architecture == open_clip.get_model_config("ViT-B-32-quickgelu")


@pytest.mark.parametrize(
    ("change", "weights", "message"),
    [
        ({}, None, "clip_weights: is required with clip"),
        ({}, "missing.pt", "clip_weights: missing.pt is neither a file nor a tag"),
        ({}, "net.json", "not readable as weights"),
        ({"embed_dim": 32}, "clip.pt", "clip.pt: the weights do not fit the model; other shape: "),
        ({"vision_cfg": 3}, "clip.pt", "needs embed_dim, vision_cfg and text_cfg"),
        ({"vision_cfg": {"layers": "x"}}, "clip.pt", "vision_cfg.layers must be a whole number from 1 to 1000"),
        ({"text_cfg": {"hf_model_name": "bert"}}, "clip.pt", "pip install 'pspg-engine[hf]'"),
    ],
)
def test_unusable_clips_are_one_line(
    tmp_path: Path,
    evaluate,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    weights: str | None,
    message: str,
) -> None:
    monkeypatch.setattr(any_clip, "find_spec", lambda name: None)
    write_clip(tmp_path, VIT, {}, "openai")
    (tmp_path / "net.json").write_text(json.dumps({**VIT, **change}))
    monkeypatch.chdir(tmp_path)
    assert evaluate("--clip", "net.json", *([] if weights is None else ["--clip_weights", weights])) == 2
    assert message in one_line(capsys)


def test_unknown_clip_names_and_bad_pixels_are_one_line(
    tmp_path: Path, evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    _, weights = write_clip(tmp_path, VIT, {"std": [0.1, 0.2, 0]}, "openai")
    assert evaluate("--clip", "ViT-B-33", "--clip_weights", weights) == 2
    assert "clip: open_clip has no model 'ViT-B-33'; did you mean" in one_line(capsys)
    assert evaluate("--clip", tmp_path / "net.json", "--clip_weights", weights) == 2
    assert "preprocess_cfg.mean and std must be three numbers" in one_line(capsys)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("pspg-engine evaluate: error: ")
    assert error.count("\n") == 1
    return error


def test_a_hugging_face_text_tower(phantoms: Path, tmp_path: Path, evaluate) -> None:
    """A tiny random BERT in a folder beside the JSON file."""
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "evidence", "of", "findings", "suggesting", "."]
    names = load_label_names(phantoms / "classes.txt")
    words += sorted({word for name in names for word in name.lower().split()})
    bert = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    (tmp_path / "bert").mkdir()
    bert.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(tmp_path / "bert" / "vocab.txt")).save_pretrained(tmp_path / "bert")
    text = {"hf_model_name": "bert", "hf_tokenizer_name": "bert", "hf_proj_type": "linear", "context_length": 20}
    config = {**VIT, "text_cfg": {**text, "hf_pooler_type": "mean_pooler"}}
    (tmp_path / "net.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    built = {**config["text_cfg"], "hf_model_name": str(tmp_path / "bert"), "hf_model_pretrained": False}
    clip = open_clip.CustomTextCLIP(**{**config, "text_cfg": built}).eval()
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    assert evaluate("--clip", tmp_path / "net.json", "--clip_weights", tmp_path / "clip.safetensors") == 0
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")(
        [f"{text} {name}." for text in ("Findings suggesting", "No evidence of") for name in names],
        padding=True,
        return_tensors="pt",
    ).input_ids
    with torch.no_grad():
        positive, negative = clip.encode_text(tokens, normalize=True).chunk(2)
        images = images_of(phantoms, 32, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        image = clip.encode_image(images, normalize=True)
        expected = torch.sigmoid(clip.logit_scale.exp() * image @ (positive - negative).T).numpy()
    np.testing.assert_allclose(probabilities(tmp_path / "report"), expected, atol=1e-5)


@pytest.fixture
def predictions(models: Path, phantoms: Path, evaluate, tmp_path: Path) -> Path:
    """predictions.csv of a PsPG report in the folder `first`."""
    assert evaluate("--checkpoint", models / "pspg", "--baselines", "false", name="first") == 0
    return tmp_path / "first" / "predictions.csv"


def write(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_predictions_fed_back_give_the_same_numbers(
    models: Path, phantoms: Path, tmp_path: Path, evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = json.dumps({"seen": str(phantoms / "seen.txt"), "unseen": str(phantoms / "unseen.txt")})
    lists = ["--class_lists", lists, "--evaluation.bootstrap", 20]
    assert evaluate("--checkpoint", models / "pspg", "--baselines", "false", *lists, name="first") == 0
    header, *rows = table(tmp_path / "first" / "predictions.csv")
    rows = [[*row, "7"] for row in reversed(rows)] + [["another film", *row[1:], "7"] for row in rows[:2]]
    shuffled = write(tmp_path / "kad.csv", [[*header, "no class"], *rows])
    lines = [json.loads(line) for line in (phantoms / "test.jsonl").read_text().splitlines()]
    away = tmp_path / "away"
    away.mkdir()
    (away / "test.jsonl").write_text("".join(json.dumps({**line, "filepath": "no/film.png"}) + "\n" for line in lines))
    names = ["--label_names", phantoms / "classes.txt", "--manifest", away / "test.jsonl"]
    capsys.readouterr()
    assert evaluate("--predictions", shuffled, *lists, *names, name="second") == 0
    assert "kad.csv: 2 rows and 1 columns that were not asked for were left out" in capsys.readouterr().err
    first, second = document(tmp_path / "first"), document(tmp_path / "second")
    assert second["results"]["kad"] == first["results"]["PsPG"]
    assert second["results"].keys() == second["trainable_parameters"].keys() == {"kad"}
    assert second["trainable_parameters"]["kad"] is None
    assert second["settings"]["batch_size"] is None
    assert (tmp_path / "second" / "predictions.csv").read_text() == (tmp_path / "first" / "predictions.csv").read_text()
    assert "batch size" not in (tmp_path / "second" / "report.html").read_text()


def test_scores_that_differ_in_the_last_digit_keep_their_order(phantoms: Path, tmp_path: Path, evaluate) -> None:
    """Saturated models give such scores; a table that rounded them would have ties."""
    lines = [json.loads(line) for line in (phantoms / "test.jsonl").read_text().splitlines()]
    names = load_label_names(phantoms / "classes.txt")
    rows = [[line["id"], *[repr(1 - (number + 1) * 2**-50)] * len(names)] for number, line in enumerate(lines)]
    given = write(tmp_path / "sure.csv", [["id", *names], *rows])
    assert evaluate("--predictions", given) == 0
    again = tmp_path / "report" / "predictions.csv"
    assert [row[1:] for row in table(again)[1:]] == [row[1:] for row in rows]


def test_images_without_predictions_are_left_out_on_request(
    predictions: Path, tmp_path: Path, evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = table(predictions)
    few = write(tmp_path / "few.csv", rows[:-3])
    capsys.readouterr()
    assert evaluate("--predictions", few) == 2
    assert f"few.csv: has no row for id '{rows[-3][0]}' and 2 others of the manifest's 40 images" in one_line(capsys)
    assert evaluate("--predictions", few, "--on_bad_image", "skip") == 0
    assert f"few.csv: 3 images have no row and were left out, the first '{rows[-3][0]}'" in capsys.readouterr().err
    assert document(tmp_path / "report")["results"]["few"]["all"]["images"] == 37
    none = write(tmp_path / "none.csv", rows[:1])
    assert evaluate("--predictions", none, "--on_bad_image", "skip") == 2
    assert "none.csv: has no row for id" in one_line(capsys)


@pytest.mark.parametrize("value", ["", "nan", "inf", "1.5", "-0.1", "high"])
def test_predictions_that_are_no_probabilities_name_row_and_column(
    predictions: Path, tmp_path: Path, evaluate, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    rows = table(predictions)
    rows[3][2] = value
    bad = write(tmp_path / "bad.csv", rows)
    capsys.readouterr()
    assert evaluate("--predictions", bad) == 2
    assert f"bad.csv:4: column {rows[0][2]!r} holds {value!r}, no number in [0, 1]" in one_line(capsys)
    assert not (tmp_path / "report").exists()


def test_tables_that_do_not_fit_name_the_row_or_column(
    predictions: Path, tmp_path: Path, evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    header, *rows = table(predictions)
    faults = {
        "has no column 'id'": [["name", *header[1:]], *rows],
        f"has no column {header[1]!r}; did you mean '{header[1]}s'?": [["id", header[1] + "s", *header[2:]], *rows],
        f"has two columns {header[1]!r}; remove one": [[*header, header[1]], *([*row, "0"] for row in rows)],
        f"bad.csv:42: id {rows[0][0]!r} is already on line 2": [header, *rows, rows[0]],
        "bad.csv:2: 3 cells, the header has": [header, rows[0][:3]],
    }
    capsys.readouterr()
    for message, content in faults.items():
        assert evaluate("--predictions", write(tmp_path / "bad.csv", content)) == 2
        assert message in one_line(capsys)
    (tmp_path / "bad.csv").write_bytes(b"id,\xff\n")
    assert evaluate("--predictions", tmp_path / "bad.csv") == 2
    assert "not UTF-8" in one_line(capsys)
    assert evaluate("--predictions", tmp_path / "missing.csv") == 2
    assert "missing.csv: cannot be read" in one_line(capsys)


def test_ids_and_names_that_spreadsheets_would_run_come_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"id": name, "filepath": "x.png", "labels": [n % 2, 1 - n % 2]} for n, name in enumerate(["=1", "'=", "@a"])
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "classes.txt").write_text("+edema\nplain\n")
    rows = [["id", "plain", "'+edema"], ["'=1", "0.1", "0.2"], ["'=", "0.3", "0.4"], ["@a", "0.5", "0.6"]]
    given = write(tmp_path / "given.csv", rows)
    arguments = ["--manifest", tmp_path / "test.jsonl", "--output", tmp_path / "report", "--evaluation.bootstrap", 0]
    assert main(["evaluate", "--predictions", str(given), *map(str, arguments)]) == 0
    assert probabilities(tmp_path / "report").tolist() == [[0.2, 0.1], [0.4, 0.3], [0.6, 0.5]]


def test_the_shipped_adapter_scores_like_the_same_clip(
    phantoms: Path, tmp_path: Path, evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, weights = write_clip(tmp_path, VIT, {}, "open_clip")
    assert evaluate("--clip", tmp_path / "net.json", "--clip_weights", weights, name="clip") == 0
    (tmp_path / "net.json").rename(tmp_path / "open_clip_config.json")
    monkeypatch.setenv("MODEL", f"local-dir:{tmp_path}")
    example = ROOT / "configs" / "adapters" / "open_clip_templates.py"
    lists = json.dumps({"seen": str(phantoms / "seen.txt"), "unseen": str(phantoms / "unseen.txt")})
    assert evaluate("--adapter", example, "--workers", 2, "--class_lists", lists) == 0
    assert list(document(tmp_path / "report")["results"]) == ["open_clip_templates"]
    order = table(tmp_path / "report" / "predictions.csv")[0][1:]
    columns = [table(tmp_path / "clip" / "predictions.csv")[0][1:].index(name) for name in order]
    expected = probabilities(tmp_path / "clip")[:, columns]
    np.testing.assert_allclose(probabilities(tmp_path / "report"), expected, atol=1e-5)


ADAPTER = """
import torch
def load(device):
    return 1.0
def preprocess(image):
    return torch.tensor([image.width, image.height], dtype=torch.float32)
def score(model, images, class_names):
    return torch.full((len(images), len(class_names)), 0.5)
"""


@pytest.mark.parametrize(
    ("line", "other", "message"),
    [
        ("import torch", "import torch, no_such_library", "x.py:2: ModuleNotFoundError: No module named 'no_such_"),
        ("import torch", "import torch(", "x.py:2: SyntaxError: "),
        ("return 1.0", "raise ValueError('no\\nweights')", "x.py:4: ValueError: no weights in load"),
        ("return 1.0", "raise SystemExit(3)", "x.py:4: SystemExit: 3 in load"),
        ("def score(", "def scores(", "x.py: has no function score(model, images, class_names)"),
        ("def score(model,", "def score(", "x.py:7: TypeError: score() takes"),
        ("return torch.tensor(", "return torch.tensr(", "x.py:6: AttributeError: module 'torch' has no attribute"),
        ("return torch.tensor(", "return list(", "x.py:6: TypeError: list() takes no keyword arguments in preprocess"),
        ("torch.tensor([image.width, image.height], dtype=torch.float32)", "3", "preprocess gave a int, not a torch.T"),
        ("[image.width, image.height]", "[1] * (1 + hash(image.tobytes()) % 99)", "preprocess gave inputs of shapes ("),
        ("return torch.full(", "return torch.fill(", "x.py:8: "),
        ("(len(images), len(class_names))", "(2, 3)", "score gave shape (2, 3) for 16 images and 20 classes"),
        ("0.5)", "1.5)", "score gave values from 1.5 to 1.5; probabilities lie in [0, 1]"),
        ("0.5)", "torch.nan)", "score gave values that are not finite"),
        ("return torch.full((len(images), len(class_names)), 0.5)", "return 'yes'", "score gave a str, not a tensor"),
    ],
)
def test_faults_of_adapters_are_one_line_with_their_place(
    tmp_path: Path, evaluate, capsys: pytest.CaptureFixture[str], line: str, other: str, message: str
) -> None:
    assert ADAPTER.count(line) == 1
    (tmp_path / "x.py").write_text(ADAPTER.replace(line, other))
    for workers in (0, 1) if "preprocess" in message else (0,):
        assert evaluate("--adapter", tmp_path / "x.py", "--workers", workers) == 2
        error = one_line(capsys)
        assert error.startswith("pspg-engine evaluate: error: adapter: ")
        assert message in error
    assert not (tmp_path / "report").exists()


def test_an_adapter_goes_to_other_processes_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(ADAPTER)
    copy = pickle.loads(pickle.dumps(Adapter(str(tmp_path / "x.py"))))
    assert copy.call("preprocess", Image.new("RGB", (3, 2))).tolist() == [3, 2]


def test_an_adapter_survives_bad_images_and_knows_what_lies_beside_it(
    phantoms: Path, tmp_path: Path, evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "beside_the_adapter.py").write_text("HALF = 0.5\n")
    (tmp_path / "x.py").write_text(ADAPTER.replace("0.5", "HALF") + "\nfrom beside_the_adapter import HALF\n")
    lines = [json.loads(line) for line in (phantoms / "test.jsonl").read_text().splitlines()]
    lines[3]["filepath"] = "images/missing.png"
    gap = tmp_path / "gap.jsonl"
    gap.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = ["--manifest", gap, "--image_root", phantoms, "--label_names", phantoms / "classes.txt"]
    assert evaluate("--adapter", tmp_path / "x.py", *more) == 2
    assert "missing.png: no such file" in one_line(capsys)
    assert evaluate("--adapter", tmp_path / "x.py", *more, "--on_bad_image", "skip", "--method", "Half") == 0
    assert "1 unreadable images were left out" in capsys.readouterr().err
    found = document(tmp_path / "report")["results"]
    assert found["Half"]["all"]["images"] == 39
    assert found["Half"]["all"]["macro_auc"] == 0.5


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
