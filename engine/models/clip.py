"""The CLIP backbone, through open_clip: construction, weights, image features, text tower, tokens."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import resize_pos_embed
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import QuickGELU
from torch import Tensor

from pspg.kernels.precision import at_least_fp32, no_autocast
from pspg.kernels.text_tower import Packing, TextLayer, TextTower, encode_packed, pack_texts

from ..utils.errors import UserError
from .weights import load_strictly, read_weights

# What `TextTower` and CLIP's tokenizer can follow; other keys are refused where they are set.
_TEXT_KEYS = {
    "context_length",
    "vocab_size",
    "width",
    "heads",
    "layers",
    "mlp_ratio",
    "norm_kwargs",
    "eos_id",
    "pad_id",
}
_TEXT_DEFAULTS = {"pool_type": "argmax", "proj_type": "linear", "hf_model_pretrained": True}
_FOREIGN_VISION = ("timm_model_name", "attentional_pool", "output_tokens")
_FOREIGN = ("custom_text", "multimodal_cfg", "init_logit_bias", "nonscalar_logit_scale")


class ImageFeatures(NamedTuple):
    """Output of the frozen image tower."""

    global_: Tensor
    """(B,D) raw global features u"""
    tokens: Tensor
    """(B,S,D): û = u/‖u‖, then the raw value-path token of each position"""


class TextEncoder(NamedTuple):
    """A text tower and its token embedding."""

    tower: TextTower
    token_embedding: Tensor
    """(vocabulary, W)"""


def clip_config(source: str | open_clip.CLIP) -> dict[str, Any]:
    """Architecture in open_clip's model-config format.

    Args:
        source: open_clip model name, path of a .json file, or a module made by `build_clip`.

    Raises:
        UserError: unknown name, unreadable file, or a tower that PsPG cannot drive.
    """
    if not isinstance(source, str):
        return deepcopy(source.model_config)
    config = _read_config(Path(source)) if source.endswith(".json") else named_config(source)
    _check_config(config, source)
    return config


def build_clip(config: Mapping[str, Any]) -> open_clip.CLIP:
    """Randomly initialised CLIP of an architecture, float32, on the CPU; it remembers `config` for `clip_config`.

    Raises:
        UserError: open_clip cannot build it.
    """
    arguments = {key: deepcopy(value) for key, value in config.items() if key not in _FOREIGN}
    try:
        clip = open_clip.CLIP(**deepcopy(arguments))
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise UserError(f"model.backbone: open_clip cannot build this configuration ({error})") from error
    clip.model_config = arguments
    return clip


def load_clip(
    backbone: str, pretrained: str | None, *, quick_gelu: bool, image_size: int | None = None
) -> open_clip.CLIP:
    """CLIP for a configuration, float32, on the CPU. Only a tag needs the network, and only the first time.

    Args:
        backbone: open_clip model name or the path of a .json file.
        pretrained: weights file or open_clip tag; None: random weights.
        quick_gelu: QuickGELU activations; False: what the configuration says.
        image_size: side of the input in pixels; None: what the configuration says.

    Raises:
        UserError: anything that does not exist, cannot be fetched or does not fit.
    """
    config = clip_config(backbone)
    vision = config["vision_cfg"]
    if quick_gelu:
        config["quick_gelu"] = True
    if image_size is not None:
        vision["image_size"] = image_size
        step = vision["patch_size"] if isinstance(vision["layers"], int) else 32
        if image_size % step:
            raise UserError(f"data.image_size: {image_size} is not a multiple of {step}, as {backbone} needs")
    file = None if pretrained is None else weights_file(backbone, pretrained, config)
    clip = build_clip(config)
    if file is not None:
        tensors, _ = read_weights(file, scripted=True)
        resize_pos_embed(tensors, clip)
        load_strictly(clip, tensors, file)
    return clip


def image_features(clip: open_clip.CLIP, images: Tensor) -> ImageFeatures:
    """Global features and all tokens of images (B,3,h,w); the caller has put the tower in eval mode.

    A ResNet's token of position s is the value path of its attention pool alone, c_proj(v_proj(x_s + pos_s)); a ViT's
    is the projected patch token.
    """
    visual = clip.visual
    if isinstance(visual, ModifiedResNet):
        return with_unit_token(*_attention_pool(visual.attnpool, resnet_grid(visual, images)))
    return with_unit_token(*vit_features(visual, images))


def resnet_grid(visual: Any, images: Tensor) -> Tensor:
    """Input of a ModifiedResNet's attention pool (B,channels,h/32,w/32) of images (B,3,h,w)."""
    return visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))


def vit_features(visual: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Global feature (B,D) and projected patch tokens (B,S-1,D) of images (B,3,h,w)."""
    output = visual.forward_intermediates(images, indices=1, normalize_intermediates=True, output_fmt="NLC")
    return output["image_features"], output["image_intermediates"][-1] @ visual.proj


def with_unit_token(u: Tensor, local: Tensor) -> ImageFeatures:
    """Image features of u (B,D) and local tokens (B,S-1,D): û = u/‖u‖, taken in float32 or better, goes first."""
    with no_autocast(u):
        unit = F.normalize(at_least_fp32(u), dim=-1).to(local.dtype)
    return ImageFeatures(u, torch.cat([unit[:, None], local], dim=1))


def _attention_pool(pool: Any, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled feature (B,D), the mean token as its one query, and the value path of the local tokens (B,S-1,D)."""
    x = grid.flatten(2).transpose(1, 2)  # (B, positions, channels)
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + pool.positional_embedding.to(x.dtype)
    values = pool.v_proj(x)

    def split(rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)

    pooled = F.scaled_dot_product_attention(split(pool.q_proj(x[:, :1])), split(pool.k_proj(x)), split(values))
    return pool.c_proj(pooled.transpose(1, 2).flatten(1)), pool.c_proj(values[:, 1:])


def text_tower(clip: open_clip.CLIP) -> TextTower:
    """Text tower of a CLIP, for the kernels. It shares the parameters, so it follows `clip.to(...)`."""
    block = clip.transformer.resblocks[0]
    return tower_from_state(
        dict(clip.named_parameters()),
        heads=block.attn.num_heads,
        eps=block.ln_1.eps,
        quick_gelu=isinstance(block.mlp.gelu, QuickGELU),
    )


def text_encoder(clip: open_clip.CLIP) -> TextEncoder:
    """Text tower of a CLIP with its token embedding."""
    return TextEncoder(text_tower(clip), clip.token_embedding.weight)


class PackedTexts(NamedTuple):
    """Token ids of N texts up to their EOS, one text after the other."""

    ids: Tensor
    """(R,) int64; 0 in rows that belong to no text"""
    positions: Tensor
    slots: Tensor
    ends: Tensor
    seen: Tensor
    """as in `Packing`"""


def pack_tokens(tokens: Tensor, rows: int | None = None) -> PackedTexts:
    """Pack token ids (N, context length) on the CPU; EOS is the largest id, and what follows it does not matter.

    Args:
        rows: R, and the grid has the context's length then; None: as many as there are tokens, the longest text's.

    Raises:
        ValueError: more tokens than rows.
    """
    ends = tokens.argmax(dim=-1)
    tokens = tokens if rows else tokens[:, : int(ends.max()) + 1]
    packing = pack_texts(ends, tokens.shape[1], rows)
    known = packing.slots < tokens.numel()
    ids = torch.where(known, tokens.flatten()[packing.slots.clamp(max=tokens.numel() - 1)], 0)
    return PackedTexts(ids, *packing)


def encode_tokens(clip: open_clip.CLIP, texts: PackedTexts) -> Tensor:
    """Text features (N,D), not normalised, of packed texts; as `clip.encode_text` of the tokens.

    Gradients flow to all text weights.
    """
    encoder = text_encoder(clip)
    embeddings = F.embedding(texts.ids, encoder.token_embedding)
    return encode_packed(encoder.tower, embeddings, Packing(*texts[1:]))


def tower_from_state(
    state: Mapping[str, Tensor], *, heads: int, eps: float = 1e-5, quick_gelu: bool = True
) -> TextTower:
    """Text tower from weights under open_clip's names.

    Raises:
        KeyError: a weight is missing.
    """
    names = (
        "ln_1.weight",
        "ln_1.bias",
        "attn.in_proj_weight",
        "attn.in_proj_bias",
        "attn.out_proj.weight",
        "attn.out_proj.bias",
        "ln_2.weight",
        "ln_2.bias",
        "mlp.c_fc.weight",
        "mlp.c_fc.bias",
        "mlp.c_proj.weight",
        "mlp.c_proj.bias",
    )
    blocks = range(count_blocks(state, "transformer.resblocks."))
    return TextTower(
        layers=tuple(TextLayer(*(state[f"transformer.resblocks.{i}.{name}"] for name in names)) for i in blocks),
        positional_embedding=state["positional_embedding"],
        ln_final_weight=state["ln_final.weight"],
        ln_final_bias=state["ln_final.bias"],
        projection=state["text_projection"],
        heads=heads,
        eps=eps,
        activation="quick_gelu" if quick_gelu else "gelu",
    )


def count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of different blocks `<prefix><block>.…` among the names."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


@cache
def tokenizer() -> open_clip.SimpleTokenizer:
    """CLIP's byte-pair tokenizer."""
    return open_clip.SimpleTokenizer()


def tokenize(texts: Sequence[str], context_length: int = 77) -> Tensor:
    """Token ids (N, context_length) int64 of texts: SOS, the text, EOS, zeros; longer texts are cut."""
    return tokenizer()(list(texts), context_length=context_length)


def read_model_json(path: Path, key: str = "model.backbone") -> dict[str, Any]:
    """A JSON file in open_clip's format: {} if it holds something else.

    Raises:
        UserError: missing or not JSON; names the setting `key`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{key}: {path}: no such file") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{key}: {path}: not readable as JSON ({error})") from None
    return value if isinstance(value, dict) else {}


def _read_config(path: Path) -> dict[str, Any]:
    config = read_model_json(path)
    config = config.get("model_cfg", config)
    config = config if isinstance(config, dict) else {}
    towers = [config.get(key) for key in ("vision_cfg", "text_cfg")]
    if "embed_dim" not in config or not all(isinstance(tower, dict) and "layers" in tower for tower in towers):
        raise UserError(
            f"model.backbone: {path}: needs embed_dim, vision_cfg and text_cfg with their layers (open_clip's format)"
        )
    return config


def named_config(name: str, key: str = "model.backbone") -> dict[str, Any]:
    """Architecture of an open_clip model name.

    Raises:
        UserError: unknown name; names the setting `key`.
    """
    name = name.replace("/", "-")
    if name not in open_clip.list_models():
        close = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise UserError(f"{key}: open_clip has no model {name!r}{hint}")
    return open_clip.get_model_config(name)


def _check_config(config: Mapping[str, Any], source: str) -> None:
    vision, text = config["vision_cfg"], config["text_cfg"]
    set_keys = {key for key, value in text.items() if value and value != _TEXT_DEFAULTS.get(key)}
    foreign = [f"text_cfg.{key}" for key in sorted(set_keys - _TEXT_KEYS)]
    foreign += [f"vision_cfg.{key}" for key in _FOREIGN_VISION if vision.get(key)]
    foreign += [key for key in _FOREIGN if config.get(key)]
    if foreign:
        raise UserError(
            f"model.backbone: {source} sets {', '.join(foreign)}, which PsPG cannot drive; use a plain CLIP "
            "(ModifiedResNet or ViT, causal text tower, CLIP tokenizer)"
        )
    if text.get("vocab_size", 49408) < tokenizer().vocab_size:
        raise UserError(f"model.backbone: {source}: text_cfg.vocab_size is below the tokenizer's 49408")


def weights_file(backbone: str, pretrained: str, config: Mapping[str, Any], key: str = "model.pretrained") -> Path:
    """Local weights file, fetched if a tag was given.

    Raises:
        UserError: neither a file nor a tag, a tag whose activation differs, or no network; names the setting `key`.
    """
    if Path(pretrained).is_file():
        return Path(pretrained)
    name = backbone.replace("/", "-")
    if not open_clip.is_pretrained_cfg(name, pretrained):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"{key}: {pretrained} is neither a file nor a tag of {backbone} (its tags: {tags})")
    weights = open_clip.get_pretrained_cfg(name, pretrained)
    trained = bool(weights.get("quick_gelu", False))
    if trained != bool(config.get("quick_gelu", False)):
        raise UserError(
            f"model.quick_gelu: the weights {pretrained} of {backbone} were trained {'with' if trained else 'without'} "
            f"QuickGELU; set model.quick_gelu to {str(trained).lower()}"
        )
    try:
        return Path(open_clip.download_pretrained(weights))
    except Exception as error:  # whatever the network or the hub's client raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{key}: cannot fetch {pretrained} of {backbone} ({reason})") from error
