"""Weights in the layout of the authors' code: import, and export of ours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from torch import Tensor

from ..config import LossConfig, ModelConfig
from ..models.clip import TextEncoder, build_clip, clip_config, count_blocks, text_tower, tower_from_state
from ..models.decoders import DECODERS
from ..models.fusions import FUSIONS
from ..models.pspg import PromptHead, PsPG
from ..models.weights import OPENAI_SETTINGS, check_fit, plain_state, read_weights, trained_with_quick_gelu
from ..utils.documents import parse_json
from ..utils.errors import UserError

_TOKENS = 49408
"""Size of CLIP's vocabulary."""
_TEXT = "text_encoder."
_IMAGE = "image_encoder."
_POSITIVE = "prompt_learner.pos_decoder."
_TEXT_PARTS = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


def import_published(
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    class_names: Sequence[str] | None = None,
    *,
    prompt_length: int = 16,
    decoder_heads: int = 8,
    prefix: bool = False,
    class_feature_weights: str | Path | Mapping[str, Tensor] | None = None,
) -> PsPG:
    """PsPG with published weights, on the CPU, in eval mode, fusing as the published code does (`gate_before_norm`).

    Architecture, the kind of decoder and widths come from the tensors (heads by OpenAI's rule, width / 64), and so does
    the dtype: the widest of them, at least float32. Metadata of a safetensors file overrides this and the keywords.
    Such a file may hold the token embedding's used rows only (`token_embedding.rows`, `.values`); other class lists
    than its own then lack embeddings and are refused.

    Args:
        path_or_state_dict: `.pth` (read with weights_only), `.safetensors`, or a state dict.
        class_names: classes in order; None: those of the metadata.
        prompt_length: n; that of an mlp decoder is in its tensors.
        decoder_heads: attention heads of the decoders.
        prefix: prompts stand before the class name.
        class_feature_weights: weights of the original CLIP, file or state dict; class features and token embeddings are
            taken from it. The published code makes them before it loads a checkpoint, so a checkpoint with a fine-tuned
            text tower reproduces its scores only with this.

    Raises:
        UserError: unreadable file, an unknown decoder, missing or unexpected keys, or unusable class names.
    """
    state, metadata, source = _read(path_or_state_dict)
    prefix = _setting(metadata, "prefix", prefix, source)
    prompt_length = _setting(metadata, "prompt_length", prompt_length, source)
    decoder_heads = _setting(metadata, "decoder_heads", decoder_heads, source)
    if class_names is None:
        class_names = _json(metadata, "names", source)
    if class_names is not None and not (
        isinstance(class_names, list | tuple) and all(isinstance(n, str) for n in class_names)
    ):
        raise UserError(f"{source}: metadata names is no list of class names")
    if class_names is None:
        raise UserError(f"{source}: give class_names, the file does not say which classes it was trained on")
    decoder = _find_decoder(state, source)
    prompts = _choice(metadata, "prompts", "dual", DECODERS[decoder].prompts, source)
    if prompts == "dual" and not any(name.startswith("prompt_learner.neg_decoder.") for name in state):
        raise UserError(f"{source}: has no prompt_learner.neg_decoder, and does not say that it needs none")
    state = _with_whole_embedding(state)
    if (length := DECODERS[decoder].published_length) is not None:
        text_width = _size(state, f"{_TEXT}ln_final.weight", 0, source)
        prompt_length = _size(state, _POSITIVE + length, 0, source) // text_width
    if prompt_length < 1:
        raise UserError(f"prompt_length: must be at least 1, got {prompt_length} for {source}")
    name, dimension = _published_decoders()[decoder]
    hidden = _size(state, f"{_POSITIVE}{name}", dimension, source)
    if decoder_heads < 1 or hidden % decoder_heads:
        raise UserError(f"decoder_heads: {decoder_heads} heads do not divide the hidden width {hidden} of {source}")
    settings = ModelConfig(
        backbone="imported",
        decoder=decoder,
        prompts=cast(Any, prompts),
        prompt_length=prompt_length,
        hidden_size=hidden,
        decoder_heads=decoder_heads,
        prefix=prefix,
        fusion=_choice(metadata, "fusion", "gate_before_norm", _published_fusions(), source),
    )
    architecture = _json(metadata, "clip", source) or _clip_config(state, source)
    if not isinstance(architecture, dict):
        raise UserError(f"{source}: metadata clip is no architecture")
    clip = build_clip(architecture)
    text_width, width = clip.text_projection.shape
    with torch.device("meta"):
        head = PromptHead(width, text_width, settings)
    check_fit({**_published_names(clip.state_dict()), **head.state_dict()}, state, source)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in state.values()) else torch.float32
    clip.to(dtype).load_state_dict(_clip_names(state))
    encoder = None if class_feature_weights is None else class_encoder(class_feature_weights, dtype, clip)
    model = PsPG(clip, settings, class_names, class_encoder=encoder)
    model.head.load_state_dict({name: state[name] for name in head.state_dict()})
    model.loss_config = LossConfig(preset="published")
    return model.eval()


def published_state(model: PsPG) -> dict[str, Tensor]:
    """The model's weights under the published names: image and text tower, prompt learner, fusion, temperature.

    CLIP's own temperature, which phase 2 does not use, has no place there.

    Raises:
        UserError: a decoder, fusion or residual that has no place there.
    """
    for key, value, known in (
        ("decoder", model.config.decoder, tuple(_published_decoders())),
        ("residual", model.config.residual, ("none",)),
        ("fusion", model.config.fusion, _published_fusions()),
    ):
        if value not in known:
            raise UserError(f"layout: the published layout has no model.{key} {value}; use layout pspg-engine")
    return {**_published_names(model.clip.state_dict()), **model.head.state_dict()}


def published_metadata(model: PsPG) -> dict[str, str]:
    """Metadata for a safetensors file: what its tensors do not tell; `import_published` reads it back."""
    config = model.config
    return {
        "names": json.dumps(model.class_set.names),
        "decoder": config.decoder,
        "prompts": config.prompts,
        "prefix": str(config.prefix),
        "prompt_length": str(config.prompt_length),
        "decoder_heads": str(config.decoder_heads),
        "fusion": config.fusion,
        "clip": json.dumps(clip_config(model.clip)),
    }


def _read(
    source: str | Path | Mapping[str, Tensor], *, scripted: bool = False
) -> tuple[dict[str, Tensor], dict[str, str], str]:
    metadata: dict[str, str] = {}
    if isinstance(source, Mapping):
        state, name = plain_state(source, "state dict"), "state dict"
        state = {key: tensor for key, tensor in state.items() if key not in OPENAI_SETTINGS}
    else:
        (state, metadata), name = read_weights(source, scripted=scripted), str(source)
    # A file of reference results keeps its weights apart from them.
    weights = {key.removeprefix("state."): tensor for key, tensor in state.items() if key.startswith("state.")}
    return weights or state, metadata, name


def _setting(metadata: Mapping[str, str], key: str, default: Any, source: str) -> Any:
    """Metadata's value of a bool or an int, else the default."""
    if key not in metadata:
        return default
    try:
        value = parse_json(metadata[key].lower())
    except ValueError:
        value = None
    if type(value) is not type(default):
        raise UserError(f"{source}: metadata {key} is {metadata[key]!r}, not of type {type(default).__name__}")
    return value


def _json(metadata: Mapping[str, str], key: str, source: str) -> Any:
    """Metadata's JSON value; None where there is none."""
    try:
        return parse_json(metadata.get(key, "null"))
    except ValueError as error:
        raise UserError(f"{source}: metadata {key} is not JSON ({error})") from None


def _choice(metadata: Mapping[str, str], key: str, default: str, choices: Sequence[str], source: str) -> str:
    """Metadata's value, one of `choices`, else the default."""
    value = metadata.get(key, default)
    if value not in choices:
        raise UserError(f"{source}: metadata {key} is {value!r}, not one of {', '.join(choices)}")
    return value


def _published_decoders() -> dict[str, tuple[str, int]]:
    """Decoder → a parameter that only it has, and its dimension that is H."""
    return {name: found for name in DECODERS.names() if (found := DECODERS[name].published) is not None}


def _published_fusions() -> tuple[str, ...]:
    return tuple(name for name in FUSIONS.names() if FUSIONS[name].published)


def _find_decoder(state: Mapping[str, Tensor], source: str) -> str:
    """Name of the decoders, by their parameters."""
    names = [name.removeprefix(_POSITIVE) for name in state if name.startswith(_POSITIVE)]
    if not names:
        raise UserError(f"{source}: has no {_POSITIVE.rstrip('.')}; it is not a checkpoint of the authors' code")
    for decoder, (known, _) in _published_decoders().items():
        if any(name.startswith(f"{known.split('.')[0]}.") for name in names):
            return decoder
    parts = ", ".join(sorted({name.split(".")[0] for name in names}))
    raise UserError(f"{source}: its decoder ({parts}) is not one of {', '.join(_published_decoders())}")


def _with_whole_embedding(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Spread stored rows of the token embedding over the whole table; rows that are not stored become NaN."""
    state = dict(state)
    if "token_embedding.rows" in state and "token_embedding.values" in state:
        rows, values = state.pop("token_embedding.rows"), state.pop("token_embedding.values")
        table = values.new_full((_TOKENS, values.shape[1]), torch.nan)
        table[rows] = values
        state[f"{_TEXT}token_embedding.weight"] = table
    return state


def _published_names(clip_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names to published ones."""
    return {
        _IMAGE + name.removeprefix("visual.") if name.startswith("visual.") else _TEXT + name: tensor
        for name, tensor in clip_state.items()
        if name != "logit_scale"
    }


def _clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names to open_clip's, towers and temperature only."""
    image = {"visual." + name.removeprefix(_IMAGE): t for name, t in state.items() if name.startswith(_IMAGE)}
    text = {name.removeprefix(_TEXT): t for name, t in state.items() if name.startswith(_TEXT)}
    return {**image, **text, "logit_scale": state["logit_scale"]}


def _size(state: Mapping[str, Tensor], name: str, dimension: int, source: str) -> int:
    if name not in state or state[name].ndim <= dimension:
        raise UserError(f"{source}: the weights do not fit the model; missing: {name}")
    return state[name].shape[dimension]


def _clip_config(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Architecture in open_clip's format; heads and activation are OpenAI's: width/64 heads, QuickGELU."""
    text_width = _size(state, f"{_TEXT}ln_final.weight", 0, source)
    if f"{_IMAGE}class_embedding" in state:
        width, patch = (_size(state, f"{_IMAGE}conv1.weight", dimension, source) for dimension in (0, 3))
        positions = _size(state, f"{_IMAGE}positional_embedding", 0, source)
        layers: int | list[int] = count_blocks(state, f"{_IMAGE}transformer.resblocks.")
        step = patch
    else:
        width, patch = _size(state, f"{_IMAGE}layer1.0.conv1.weight", 0, source), None
        positions = _size(state, f"{_IMAGE}attnpool.positional_embedding", 0, source)
        layers = [count_blocks(state, f"{_IMAGE}layer{stage}.") for stage in (1, 2, 3, 4)]
        step = 32
    return {
        "embed_dim": _size(state, f"{_TEXT}text_projection", 1, source),
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": step * round((positions - 1) ** 0.5),
            "layers": layers,
            "width": width,
            "patch_size": patch,
        },
        "text_cfg": {
            "context_length": _size(state, f"{_TEXT}positional_embedding", 0, source),
            "vocab_size": _size(state, f"{_TEXT}token_embedding.weight", 0, source),
            "width": text_width,
            "heads": max(text_width // 64, 1),
            "layers": count_blocks(state, f"{_TEXT}transformer.resblocks."),
        },
    }


def read_text_weights(source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Text tower of CLIP weights or of a published checkpoint, under OpenAI's names; the rest is left out.

    Raises:
        UserError: unreadable file, or weights known to be trained without QuickGELU, which the published code has.
    """
    state, metadata, name = _read(source, scripted=True)
    if not isinstance(source, Mapping) and trained_with_quick_gelu(Path(source), metadata) is False:
        raise UserError(f"{name}: trained without QuickGELU; give the weights of the checkpoint's own CLIP")
    state = _with_whole_embedding(state)
    bare = {re.sub(f"^{re.escape(_TEXT)}", "", key): tensor for key, tensor in state.items()}
    return {key: tensor for key, tensor in bare.items() if key.startswith(_TEXT_PARTS)}


def class_encoder(source: str | Path | Mapping[str, Tensor], dtype: torch.dtype, clip: open_clip.CLIP) -> TextEncoder:
    """Text encoder of CLIP weights under OpenAI's names, or of a published checkpoint, as wide as `clip`'s.

    Raises:
        UserError: unreadable file, or not the text tower of such a CLIP.
    """
    name = "state dict" if isinstance(source, Mapping) else str(source)
    state = {key: tensor.to(dtype) for key, tensor in read_text_weights(source).items()}
    width = _size(state, "ln_final.weight", 0, name)
    try:
        encoder = TextEncoder(tower_from_state(state, heads=max(width // 64, 1)), state["token_embedding.weight"])
    except KeyError as error:
        raise UserError(f"{name}: the weights do not fit a CLIP text tower; missing: {error.args[0]}") from None
    theirs, ours = tuple(encoder.tower.projection.shape), tuple(text_tower(clip).projection.shape)
    if theirs != ours:
        raise UserError(f"{name}: its text projection is {theirs}, the checkpoint's {ours}; another CLIP's weights")
    return encoder
