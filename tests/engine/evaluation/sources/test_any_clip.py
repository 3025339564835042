"""`evaluate --clip`: any CLIP has its own pixels and layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from pspg.engine.data.manifest import load_label_names
from pspg.engine.models import any_clip
from tests.engine.evaluation.sources.reports import (
    MEAN,
    ROOT,
    STD,
    VIT,
    by_hand,
    document,
    images_of,
    one_line,
    probabilities,
    write_clip,
)


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
