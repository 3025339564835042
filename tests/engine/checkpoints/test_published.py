from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pspg.engine.checkpoints.published import import_published, published_metadata, published_state
from pspg.engine.config import ModelConfig
from pspg.engine.models.clip import build_clip
from pspg.engine.models.pspg import PsPG
from pspg.engine.utils.errors import UserError
from tests.engine.checkpoints.golden import read_golden, weights

SETTINGS: dict[str, Any] = {"prompt_length": 3, "decoder_heads": 2}


def openai_clip(vit: bool) -> Any:
    """Heads as OpenAI's: width / 64, so that tensors tell them."""
    vision: dict[str, Any] = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8}
    if vit:
        vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 3}
    return build_clip({"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text})


def make(names: list[str], *, vit: bool = False, **config: Any) -> PsPG:
    torch.manual_seed(0)
    clip = openai_clip(vit)
    return PsPG(clip, ModelConfig(hidden_size=8, **SETTINGS, **config), names).eval()


def score(model: PsPG, size: int) -> Tensor:
    return model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))).logits


@pytest.mark.parametrize("vit", [False, True], ids=["resnet", "vit"])
def test_round_trip(names: list[str], tmp_path: Path, vit: bool) -> None:
    """A pickled checkpoint of parallel training, with what else a trainer saves; the architecture is in the tensors."""
    model = make(names, vit=vit, fusion="gate_before_norm")
    state = {f"module.{name}": tensor for name, tensor in published_state(model).items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"state": {}, "lr": 0.1}}, tmp_path / "model.pth")
    loaded = import_published(tmp_path / "model.pth", names, **SETTINGS)
    assert loaded.config.hidden_size == 8
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert not loaded.training
    size = 32 if vit else 64
    assert torch.equal(score(loaded, size), score(model, size))
    assert torch.equal(score(import_published(published_state(model), names, **SETTINGS), size), score(model, size))


@pytest.mark.parametrize("prompts", ["dual", "shared", "positive"])
@pytest.mark.parametrize("decoder", ["gru", "lstm", "transformer", "mlp"])
def test_every_decoder_makes_the_round_trip(names: list[str], tmp_path: Path, decoder: str, prompts: str) -> None:
    """Tensors tell the decoder's kind and sizes; without negative decoder the metadata must say so."""
    model = make(names, decoder=decoder, prompts=prompts, prefix=True, fusion="gate_before_norm")
    state = published_state(model)
    save_file(state, tmp_path / "model.safetensors", published_metadata(model))
    loaded = import_published(tmp_path / "model.safetensors")
    assert (loaded.config.decoder, loaded.config.prompts, loaded.config.hidden_size) == (decoder, prompts, 8)
    assert torch.equal(score(loaded, 64), score(model, 64))
    if prompts == "dual":
        keywords = {**SETTINGS, "prompt_length": 16} if decoder == "mlp" else SETTINGS
        bare = import_published(state, names, prefix=True, **keywords)
        assert bare.config.prompt_length == 3
        assert torch.equal(score(bare, 64), score(model, 64))
    else:
        with pytest.raises(UserError, match=r"has no prompt_learner\.neg_decoder, and does not say"):
            import_published(state, names, prefix=True, **SETTINGS)


def test_metadata_overrides_the_keywords(names: list[str], tmp_path: Path) -> None:
    model = make(names, prefix=True, fusion="gate_after_norm")
    save_file(published_state(model), tmp_path / "model.safetensors", published_metadata(model))
    loaded = import_published(tmp_path / "model.safetensors", prompt_length=7, decoder_heads=1)
    assert loaded.class_set.names == names
    assert torch.equal(score(loaded, 64), score(model, 64))


def test_metadata_tells_what_the_tensors_do_not(make_clip: Any, names: list[str], tmp_path: Path) -> None:
    """Heads that are not width / 64, and plain GELU."""
    clip = make_clip(quick_gelu=False)
    model = PsPG(clip, ModelConfig(hidden_size=8, **SETTINGS), names).eval()
    save_file(published_state(model), tmp_path / "model.safetensors", published_metadata(model))
    loaded = import_published(tmp_path / "model.safetensors")
    pixels = torch.randn(2, 3, 32, 32).double()
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)


def test_half_precision_weights_are_widened(names: list[str]) -> None:
    state = {name: t.half() if t.is_floating_point() else t for name, t in published_state(make(names)).items()}
    assert {p.dtype for p in import_published(state, names, **SETTINGS).parameters()} == {torch.float32}


@pytest.mark.parametrize("layout", ["clip", "published"])
def test_class_features_of_the_original_clip(names: list[str], tmp_path: Path, layout: str) -> None:
    """The published code takes them, and all token embeddings, from the CLIP that training started from."""
    original = make(names)
    tuned = make(names)
    with torch.no_grad():
        for name, parameter in tuned.clip.named_parameters():
            if not name.startswith("visual."):
                parameter.mul_(1.5)
    source: Any = published_state(original)
    if layout == "clip":
        source = tmp_path / "clip.pt"
        torch.save(original.clip.state_dict(), source)
    loaded = import_published(published_state(tuned), names, **SETTINGS, class_feature_weights=source)
    buffers = dict(loaded.class_set.named_buffers())
    for name, tensor in original.class_set.named_buffers():
        torch.testing.assert_close(buffers[name], tensor.to(buffers[name].dtype), rtol=1e-6, atol=1e-7)
    assert torch.equal(loaded.tower.projection, tuned.tower.projection)
    plain = import_published(published_state(tuned), names, **SETTINGS)
    assert not torch.allclose(plain.class_set.class_features, loaded.class_set.class_features)
    loaded.set_classes(names[:2])
    torch.testing.assert_close(loaded.class_set.class_features, original.class_set.class_features[:2])


def damaged(change: Callable[[dict[str, Tensor]], Any], names: list[str]) -> dict[str, Tensor]:
    state = published_state(make(names))
    change(state)
    return state


def rename(state: dict[str, Tensor], old: str, new: str) -> None:
    for name in list(state):
        if old in name:
            state[name.replace(old, new)] = state.pop(name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("prompt_learner.pos_decoder.fc.bias"), "missing: prompt_learner.pos_decoder.fc.bias"),
        (lambda s: s.pop("text_encoder.ln_final.bias"), "missing: text_encoder.ln_final.bias"),
        (lambda s: s.pop("text_encoder.text_projection"), "missing: text_encoder.text_projection"),
        (lambda s: s.pop("logit_scale"), "missing: logit_scale"),
        (lambda s: s.pop("image_encoder.bn2.weight"), "missing: image_encoder.bn2.weight"),
        (lambda s: s.update({"odd.key": torch.zeros(1)}), "unexpected: odd.key"),
        (lambda s: s.update({"prompt_learner.odd": torch.zeros(1)}), "unexpected: prompt_learner.odd"),
        (lambda s: s.update({"channel_attention.conv.weight": torch.zeros(1, 1, 5)}), "other shape: channel_attention"),
        (lambda s: rename(s, ".gru.", ".rnn."), "rnn, self_attention) is not one of gru, lstm, mlp, transformer"),
        (lambda s: rename(s, "pos_decoder", "decoder"), "has no prompt_learner.pos_decoder"),
        (lambda s: rename(s, "neg_decoder", "other"), "has no prompt_learner.neg_decoder"),
    ],
)
def test_state_dicts_that_do_not_fit(names: list[str], change: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        import_published(damaged(change, names), names, **SETTINGS)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_mistakes(names: list[str], tmp_path: Path) -> None:
    state = published_state(make(names))
    with pytest.raises(UserError, match="give class_names"):
        import_published(state, **SETTINGS)
    with pytest.raises(UserError, match="3 heads do not divide the hidden width 8"):
        import_published(state, names, prompt_length=3, decoder_heads=3)
    with pytest.raises(UserError, match="duplicates"):
        import_published(state, [*names, names[0]], **SETTINGS)
    with pytest.raises(UserError, match="no such file"):
        import_published(tmp_path / "none.pth", names)
    with pytest.raises(UserError, match=r"missing: ln_final\.weight"):
        import_published(state, names, **SETTINGS, class_feature_weights={"visual.x": torch.zeros(1)})
    other = published_state(make(names, vit=True))
    other["text_encoder.text_projection"] = torch.zeros(64, 32)
    with pytest.raises(UserError, match="another CLIP"):
        import_published(state, names, **SETTINGS, class_feature_weights=other)
    save_file(state, tmp_path / "odd.safetensors", {"prompt_length": "many"})
    with pytest.raises(UserError, match="metadata prompt_length is 'many'"):
        import_published(tmp_path / "odd.safetensors", names)
    save_file(state, tmp_path / "odd.safetensors", {"names": "edema"})
    with pytest.raises(UserError, match="metadata names is not JSON"):
        import_published(tmp_path / "odd.safetensors", **SETTINGS)
    save_file(state, tmp_path / "odd.safetensors", {"prompts": "triple"})
    with pytest.raises(UserError, match="metadata prompts is 'triple'"):
        import_published(tmp_path / "odd.safetensors", names, **SETTINGS)
    save_file(state, tmp_path / "odd.safetensors", {"fusion": "sideways"})
    with pytest.raises(UserError, match="metadata fusion is 'sideways'"):
        import_published(tmp_path / "odd.safetensors", names, **SETTINGS)


def test_embeddings_that_the_file_does_not_hold() -> None:
    with pytest.raises(UserError, match=r"no .* token embedding for 'pneumothorax'"):
        import_published(weights(read_golden("gru")[0]), ["Edema", "pneumothorax"], prompt_length=4, decoder_heads=4)
