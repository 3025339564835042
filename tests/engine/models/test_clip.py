from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pspg.engine.models.clip import (
    build_clip,
    clip_config,
    image_features,
    load_clip,
    text_encoder,
    text_tower,
    tokenize,
)
from pspg.engine.models.texts import encode_tokens, pack_tokens
from pspg.engine.models.weights import read_weights
from pspg.engine.utils.errors import UserError
from pspg.kernels.text_tower import encode

MakeClip = Callable[..., Any]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.fixture
def config_file(make_clip: MakeClip, tmp_path: Path) -> str:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(clip_config(make_clip())))
    return str(path)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_resnet_tokens_are_the_value_path(make_clip: MakeClip) -> None:
    clip, images = make_clip(), torch.randn(2, 3, 32, 32).double()
    u, tokens = image_features(clip, images)
    close(u, clip.encode_image(images))
    close(tokens[:, 0], u / u.norm(dim=-1, keepdim=True))
    pool, grid = clip.visual.attnpool, clip.visual.forward_intermediates(images)["image_intermediates"][-1]
    assert grid.shape[2:] == (1, 1)
    x = grid[:, :, 0, 0] + pool.positional_embedding[1]
    close(tokens[:, 1], pool.c_proj(pool.v_proj(x)))


def test_vit_tokens_are_the_projected_patches(make_clip: MakeClip) -> None:
    clip, images = make_clip(vit=True), torch.randn(2, 3, 32, 32).double()
    u, tokens = image_features(clip, images)
    close(u, clip.encode_image(images))
    close(tokens[:, 0], u / u.norm(dim=-1, keepdim=True))
    visual = clip.visual
    hidden = visual.transformer(visual._embeds(images))
    close(tokens[:, 1:], visual.ln_post(hidden[:, 1:]) @ visual.proj)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_text_tower_equals_open_clip(make_clip: MakeClip, quick_gelu: bool) -> None:
    clip = make_clip(quick_gelu=quick_gelu)
    tokens = tokenize(["edema", "Pleural Effusion, small", ""], clip.context_length)
    assert tokens.shape == (3, 77)
    tower, table = text_encoder(clip)
    close(encode(tower, table[tokens], tokens.argmax(dim=-1)), clip.encode_text(tokens))


def test_text_tower_follows_the_module(make_clip: MakeClip) -> None:
    clip = make_clip()
    tower = text_tower(clip)
    clip.float()
    assert tower.projection.dtype == tower.layers[1].fc_weight.dtype == torch.float32


def test_config_rebuilds_the_same_architecture(make_clip: MakeClip) -> None:
    clip = make_clip(vit=True)
    again = build_clip(clip_config(clip)).double().eval()
    again.load_state_dict(clip.state_dict())
    images = torch.randn(1, 3, 32, 32).double()
    close(again.encode_image(images), clip.encode_image(images))


def test_named_backbone_has_openai_activations_and_the_asked_size() -> None:
    config = clip_config("RN50")
    assert config["embed_dim"] == 1024
    assert not config.get("quick_gelu")
    clip = load_clip("ViT-B/32", None, quick_gelu=True, image_size=64)
    assert clip.visual.image_size == (64, 64)
    assert text_tower(clip).activation == "quick_gelu"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_from_a_file(make_clip: MakeClip, config_file: str, tmp_path: Path, suffix: str) -> None:
    clip, path = make_clip().float(), tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, path)
    else:
        save_file(clip.state_dict(), path)
    loaded = load_clip(config_file, str(path), quick_gelu=True)
    for name, tensor in clip.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_vit_positions_follow_the_image_size(make_clip: MakeClip, tmp_path: Path) -> None:
    clip = make_clip(vit=True).float()
    (tmp_path / "vit.json").write_text(json.dumps(clip_config(clip)))
    save_file(clip.state_dict(), tmp_path / "vit.safetensors")
    weights = str(tmp_path / "vit.safetensors")
    loaded = load_clip(str(tmp_path / "vit.json"), weights, quick_gelu=True, image_size=64)
    assert image_features(loaded, torch.randn(1, 3, 64, 64)).tokens.shape == (1, 17, 24)


def test_keys_that_do_not_fit_are_listed(make_clip: MakeClip, config_file: str, tmp_path: Path) -> None:
    state = make_clip().float().state_dict()
    del state["ln_final.bias"]
    state["extra"] = torch.zeros(1)
    state["text_projection"] = torch.zeros(2, 2)
    path = tmp_path / "odd.safetensors"
    save_file(state, path)
    with pytest.raises(UserError) as error:
        load_clip(config_file, str(path), quick_gelu=True)
    message = one_line(error)
    for part in (str(path), "missing: ln_final.bias", "unexpected: extra", "other shape: text_projection"):
        assert part in message


@pytest.mark.parametrize(
    ("backbone", "pretrained", "size", "said"),
    [
        ("RN55", None, None, "did you mean RN50"),
        ("hf-hub:someone/something", None, None, "no model"),
        ("missing.json", None, None, "no such file"),
        ("ViT-B-16-SigLIP", None, None, "cannot drive"),
        ("roberta-ViT-B-32", None, None, "text_cfg.hf_model_name"),
        ("RN50", "no-such-tag", None, "neither a file nor a tag"),
        ("RN50", None, 100, "not a multiple of 32"),
        ("ViT-B-32", "laion2b_s34b_b79k", None, "set model.quick_gelu to false"),
    ],
)
def test_mistakes(backbone: str, pretrained: str | None, size: int | None, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_clip(backbone, pretrained, quick_gelu=True, image_size=size)
    assert said in one_line(error)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"embed_dim": 8}', '{"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"a": 1}}']
)
def test_broken_configurations(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_clip(str(path), None, quick_gelu=True)
    assert str(path) in one_line(error)


def test_failing_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(open_clip, "download_pretrained", refuse)
    with pytest.raises(UserError) as error:
        load_clip("RN50", "openai", quick_gelu=True)
    assert "cannot fetch openai of RN50 (no route)" in one_line(error)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_weight_files_run_no_code(tmp_path: Path) -> None:
    torch.save({"weight": Payload(tmp_path / "written")}, tmp_path / "evil.pt")
    with pytest.raises(UserError) as error:
        read_weights(tmp_path / "evil.pt")
    one_line(error)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.pt", None, "no such file"),
        ("empty.pt", b"", "not readable"),
        ("text.safetensors", b"not weights", "not readable"),
        ("text.pth", b"not weights", "not readable"),
    ],
)
def test_unreadable_weight_files(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_weights(tmp_path / name)
    assert said in one_line(error)


def test_a_file_without_a_state_dict(tmp_path: Path) -> None:
    for value in ([torch.zeros(1)], {"state_dict": {"a": 3}}, {}):
        torch.save(value, tmp_path / "odd.pt")
        with pytest.raises(UserError, match=r"state dict|not a tensor"):
            read_weights(tmp_path / "odd.pt")


@pytest.mark.filterwarnings("ignore")
def test_torchscript_archives_as_openai_ships_them(tmp_path: Path) -> None:
    module = nn.Linear(2, 3)
    torch.jit.trace(module, torch.zeros(1, 2)).save(str(tmp_path / "archive.pt"))
    state, _ = read_weights(tmp_path / "archive.pt", scripted=True)
    assert torch.equal(state["weight"], module.weight)


@pytest.mark.parametrize("rows", [None, 64])
def test_tokens_without_their_padding_encode_the_same(make_clip: MakeClip, rows: int | None) -> None:
    """Features, and gradients of every text weight, those of the token embedding among them."""
    clip = make_clip().requires_grad_()
    tokens = tokenize(
        ["edema", "no pleural effusion", "", "word " * 40 + "and much more behind the end of the context"]
    )
    tokens = tokens[:, : clip.context_length]
    tokens[3, -1] = tokens.max()
    weights = [w for name, w in clip.named_parameters() if not name.startswith("visual.") and name != "logit_scale"]
    rows = None if rows is None else 4 * clip.context_length - rows

    def outcome(features: Tensor) -> list[Tensor]:
        return [features, *torch.autograd.grad(features.square().sum(), weights)]

    packed = outcome(encode_tokens(clip, pack_tokens(tokens, rows)))
    for one, other in zip(packed, outcome(clip.encode_text(tokens)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
