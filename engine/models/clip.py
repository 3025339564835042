"""The CLIP backbone, through open_clip: construction, weights, image features, text tower, tokens."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import resize_pos_embed
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import QuickGELU
from torch import Tensor

from pspg.kernels.precision import at_least_fp32, no_autocast
from pspg.kernels.text_tower import TextLayer, TextTower

from ..utils.documents import Within, as_schema, read_json
from ..utils.errors import UserError, first_line
from .cast_weights import CastWeights
from .encoders import ENCODERS, ImageEncoder
from .weights import load_strictly, read_weights, trained_with_quick_gelu

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
_STAND_IN = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 32, "image_size": 32}
"""vision_cfg that open_clip builds where an encoder of the user's takes its place"""
_FOREIGN = ("custom_text", "multimodal_cfg", "init_logit_bias", "nonscalar_logit_scale")


LARGEST_MODEL = 2e10
"""parameters, estimated; the largest CLIP has 5e9"""
_Width = Annotated[int, Within(1, 65536)]
_Depth = Annotated[int, Within(1, 1000)]


@dataclass
class _Vision:
    """Numbers of vision_cfg."""

    layers: _Depth | list[_Depth] = 12
    width: _Width = 768
    head_width: _Width = 64
    patch_size: _Width | None = 16
    image_size: _Width | list[_Width] = 224
    mlp_ratio: Annotated[float, Within(0.01, 100)] = 4.0


@dataclass
class _Text:
    """Numbers of text_cfg."""

    layers: _Depth = 12
    width: _Width = 512
    heads: _Width = 8
    context_length: _Width = 77
    vocab_size: Annotated[int, Within(1, 2_000_000)] = 49408
    mlp_ratio: Annotated[float, Within(0.01, 100)] = 4.0


@dataclass
class _Numbers:
    """Numbers of an architecture."""

    embed_dim: _Width
    vision_cfg: _Vision
    text_cfg: _Text


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
    check_config(config, source)
    return config


def build_clip(config: Mapping[str, Any]) -> open_clip.CLIP:
    """Randomly initialised CLIP of an architecture, float32, on the CPU; it remembers `config` for `clip_config`.

    Raises:
        UserError: open_clip cannot build it.
    """
    arguments = {key: deepcopy(value) for key, value in config.items() if key not in _FOREIGN}
    check_config(arguments, "the configuration")
    encoder = arguments["vision_cfg"].get("encoder")
    try:
        clip = open_clip.CLIP(**{**deepcopy(arguments), **({"vision_cfg": _STAND_IN} if encoder else {})})
        if encoder:
            clip.visual = ENCODERS[encoder](arguments["embed_dim"], deepcopy(arguments["vision_cfg"]))
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
        step = vision["patch_size"] if isinstance(vision.get("layers"), int) else 32
        if image_size % step and "encoder" not in vision:
            raise UserError(f"data.image_size: {image_size} is not a multiple of {step}, as {backbone} needs")
    file = None if pretrained is None else weights_file(backbone, pretrained, config)
    clip = build_clip(config)
    if file is not None:
        tensors, metadata = read_weights(file, scripted=True)
        check_activation(trained_with_quick_gelu(file, metadata), config, pretrained)
        check_context_length(tensors, clip, "model.backbone")
        resize_pos_embed(tensors, clip)
        _resize_pool_positions(tensors, clip)
        load_strictly(clip, tensors, file)
    return clip


def check_activation(
    trained: bool | None, config: Mapping[str, Any], weights: str | None, key: str = "model.quick_gelu"
) -> None:
    """Refuse an architecture whose activation is not that of the weights: they would fit, and every feature be off.

    Args:
        trained: whether the weights were trained with QuickGELU; None: unknown.
        config: architecture.
        weights, key: file or tag, and the setting to change, for the message.

    Raises:
        UserError: they differ.
    """
    if trained is not None and trained != bool(config.get("quick_gelu", False)):
        raise UserError(
            f"{key}: the weights {weights} were trained {'with' if trained else 'without'} QuickGELU; set {key} to "
            f"{str(trained).lower()}{' and take a backbone without it' if not trained else ''}"
        )


def check_context_length(tensors: Mapping[str, Tensor], clip: Any, key: str) -> None:
    """Refuse weights of another context length by the name of the setting.

    Raises:
        UserError: the text tower has another number of positions.
    """
    name, module = "positional_embedding", getattr(clip, "text", clip)
    theirs, ours = tensors.get(name, tensors.get(f"text.{name}")), getattr(module, name, None)
    if theirs is not None and ours is not None and theirs.shape[0] != ours.shape[0]:
        raise UserError(
            f"{key}: text_cfg.context_length is {ours.shape[0]}, the weights have {theirs.shape[0]}; set it so"
        )


def _resize_pool_positions(tensors: dict[str, Tensor], clip: open_clip.CLIP) -> None:
    """Fit the positions of a ResNet's attention pool to the image size, as open_clip does those of a ViT."""
    name = "visual.attnpool.positional_embedding"
    if not isinstance(clip.visual, ModifiedResNet) or name not in tensors:
        return
    positions = {"visual.positional_embedding": tensors[name]}
    side = clip.visual.image_size // 32
    resize_pos_embed(positions, SimpleNamespace(visual=SimpleNamespace(grid_size=(side, side))))
    tensors[name] = positions["visual.positional_embedding"]


def image_features(clip: open_clip.CLIP, images: Tensor) -> ImageFeatures:
    """Global features and all tokens of images (B,3,h,w); the caller has put the tower in eval mode.

    A ResNet's token of position s is the value path of its attention pool alone, c_proj(v_proj(x_s + pos_s)); a ViT's
    is the projected patch token.
    """
    visual = clip.visual
    if isinstance(visual, ImageEncoder):
        return with_unit_token(*visual.tokens(images))
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


def text_tower(clip: open_clip.CLIP, cast: CastWeights | None = None) -> TextTower:
    """Text tower of a CLIP, for the kernels. It shares the parameters, so it follows `clip.to(...)`.

    Args:
        cast: stand in for some of them.
    """
    block = clip.transformer.resblocks[0]
    state = dict(clip.named_parameters())
    return tower_from_state(
        state if cast is None else {name: cast.of(parameter) for name, parameter in state.items()},
        heads=block.attn.num_heads,
        eps=block.ln_1.eps,
        quick_gelu=isinstance(block.mlp.gelu, QuickGELU),
    )


def text_encoder(clip: open_clip.CLIP, cast: CastWeights | None = None) -> TextEncoder:
    """Text tower of a CLIP with its token embedding; `cast` as of `text_tower`."""
    return TextEncoder(text_tower(clip, cast), clip.token_embedding.weight)


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
    value = read_json(path, key)
    return value if isinstance(value, dict) else {}


def _read_config(path: Path) -> dict[str, Any]:
    config = read_model_json(path)
    config = config.get("model_cfg", config)
    return config if isinstance(config, dict) else {}


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


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse an architecture, in open_clip's format, that PsPG cannot drive or that no machine can hold.

    Raises:
        UserError: names the setting `model.backbone`, `source` and the key.
    """
    where = f"model.backbone: {source}"
    needs = f"{where}: needs embed_dim, vision_cfg and text_cfg with their layers (open_clip's format)"
    vision, text = (config.get(key) for key in ("vision_cfg", "text_cfg"))
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise UserError(needs)
    set_keys = {key for key, value in text.items() if value and value != _TEXT_DEFAULTS.get(key)}
    foreign = [f"text_cfg.{key}" for key in sorted(set_keys - _TEXT_KEYS)]
    foreign += [f"vision_cfg.{key}" for key in _FOREIGN_VISION if vision.get(key)]
    foreign += [key for key in _FOREIGN if config.get(key)]
    if foreign:
        raise UserError(
            f"{where} sets {', '.join(foreign)}, which PsPG cannot drive; use a plain CLIP "
            "(ModifiedResNet or ViT, causal text tower, CLIP tokenizer)"
        )
    own = vision.get("encoder")
    if "embed_dim" not in config or ("layers" not in vision and not own) or "layers" not in text:
        raise UserError(needs)
    if own and (own not in ENCODERS.names() or "image_size" not in vision):
        known = ", ".join(ENCODERS.names()) or "none, no module has registered one"
        unknown = f"vision_cfg.encoder: {own!r} is not one of {known}"
        raise UserError(f"{where}: {unknown if own not in ENCODERS.names() else 'vision_cfg needs image_size'}")
    check_numbers(config, where)
    if text.get("vocab_size", 49408) < tokenizer().vocab_size:
        raise UserError(f"{where}: text_cfg.vocab_size is below the tokenizer's 49408")


def check_numbers(config: Mapping[str, Any], where: str) -> None:
    """Refuse an architecture whose numbers are no numbers of a model, before anything is built of them.

    Raises:
        UserError: `where`, and the key.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    try:
        as_schema(_Numbers, {**config, "vision_cfg": vision, "text_cfg": text})
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    layers = vision.get("layers", 12)
    depth = sum(layers) * 4 if isinstance(layers, list) else layers
    widths = ((depth, vision.get("width", 768)), (text.get("layers", 12), text.get("width", 512)))
    parameters = sum(12 * count * width**2 for count, width in widths)
    parameters += text.get("vocab_size", 49408) * text.get("width", 512)
    if parameters > LARGEST_MODEL:
        raise UserError(f"{where}: is an architecture of over {LARGEST_MODEL:.0e} parameters")


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
    check_activation(bool(weights.get("quick_gelu", False)), config, f"{pretrained} of {backbone}")
    try:
        return Path(open_clip.download_pretrained(weights))
    except Exception as error:  # whatever the network or the hub's client raises
        reason = first_line(error)
        raise UserError(f"{key}: cannot fetch {pretrained} of {backbone} ({reason})") from error
