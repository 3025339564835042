"""CLIPs that are scored and not trained: whatever open_clip can build, with its own pixels and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor

from ..config import Resize
from ..utils.documents import read_json
from ..utils.errors import UserError, first_line
from .clip import check_activation, check_context_length, check_numbers, named_config, read_model_json, weights_file
from .weights import load_strictly, read_weights, trained_with_quick_gelu

OPTIONS = {"additional_special_tokens", "clean", "reduction_mask"}
"""what a configuration may tell CLIP's tokenizer"""
HF_OPTIONS = {
    *("clean", "strip_sep_token", "language", "use_fast", "do_lower_case", "add_prefix_space", "model_max_length"),
    *("padding_side", "truncation_side", "additional_special_tokens", "add_bos_token", "add_eos_token"),
    *(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")),
}
"""what it may tell one of Hugging Face"""


@dataclass(kw_only=True)
class AnyClip:
    """A model with open_clip's `encode_image`, `encode_text` and `logit_scale`, and what its inputs are made with."""

    model: Any
    tokenizer: Callable[..., Tensor]
    """texts to token ids (N, context length); longer ones are cut"""
    size: int
    """side of the input, pixels"""
    resize: Resize
    mean: tuple[float, ...]
    """mean of red, green and blue in [0, 1]"""
    std: tuple[float, ...]


def load_any_clip(source: str, weights: str) -> AnyClip:
    """A CLIP with its weights, float32, on the CPU, in eval mode. Only tags and hub names need the network.

    Unlike `load_clip` it takes custom text towers, timm image towers, CoCa and Hugging Face text towers.

    Args:
        source: open_clip model name, or path of a .json file: the architecture (or `model_cfg`) and `preprocess_cfg`.
            Folders that it names for its Hugging Face tower and tokenizer may be relative to the file.
        weights: file in open_clip's or OpenAI's layout, or open_clip tag.

    Raises:
        UserError: anything that does not exist, cannot be fetched, is not installed or does not fit; names the setting
            `clip` or `clip_weights`.
    """
    config, preprocess = _read(source)
    tag = {} if Path(weights).is_file() else open_clip.get_pretrained_cfg(source.replace("/", "-"), weights)
    if tag:
        config["quick_gelu"] = bool(tag.get("quick_gelu", False))  # as these weights were trained
    file = weights_file(source, weights, config, key="clip_weights")
    tensors, metadata = read_weights(file, scripted=True)
    trained = trained_with_quick_gelu(file, metadata)
    if trained:
        config.setdefault("quick_gelu", True)  # a name such as ViT-B-32 says nothing
    check_activation(trained, config, weights, "quick_gelu in clip")
    model = _build(config, source)
    _load(model, tensors, file, source)
    pixels = merge_preprocess_dict(merge_preprocess_dict(PreprocessCfg(), tag), preprocess)
    sides = model.visual.image_size
    sides = {sides} if isinstance(sides, int) else set(sides)
    mean, std = pixels["mean"], pixels["std"]
    if len(sides) > 1:
        raise UserError(f"clip: {source}: its images are {sides} pixels, not square")
    if not _three_numbers(mean) or not _three_numbers(std) or min(std) <= 0:
        raise UserError(f"clip: {source}: preprocess_cfg.mean and std must be three numbers, std above 0")
    clip = AnyClip(
        model=model.eval().requires_grad_(False),
        tokenizer=_tokenizer(config["text_cfg"], source),
        size=sides.pop(),
        # A centre crop (open_clip's "shortest") would cut off the borders of a radiograph.
        resize="pad" if pixels["resize_mode"] == "longest" else "stretch",
        mean=tuple(mean),
        std=tuple(std),
    )
    try:
        model.encode_image(torch.zeros(1, 3, clip.size, clip.size))
        model.encode_text(clip.tokenizer(["a"]))
    except Exception as error:  # a tower of another image size, a tokenizer of another vocabulary
        raise UserError(f"clip: {source}: its towers do not take their inputs ({first_line(error)})") from error
    return clip


def _read(source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Architecture, without weights of its towers alone, and preprocess_cfg."""
    preprocess: dict[str, Any] = {}
    if source.endswith(".json"):
        document = read_model_json(Path(source), "clip")
        preprocess = document.pop("preprocess_cfg", {})
        config = document.get("model_cfg", document)
    else:
        config = named_config(source, "clip")
    towers = [config.get(key) for key in ("vision_cfg", "text_cfg")] if isinstance(config, dict) else []
    if not towers or not all(isinstance(part, dict) for part in (*towers, preprocess)) or "embed_dim" not in config:
        raise UserError(f"clip: {source}: needs embed_dim, vision_cfg and text_cfg (open_clip's format)")
    config = deepcopy(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    check_numbers(config, f"clip: open_clip cannot build {source}")
    if "timm_model_name" in vision:
        if not isinstance(vision["timm_model_name"], str) or vision["timm_model_name"].startswith("local-dir:"):
            raise UserError(f"clip: {source}: vision_cfg.timm_model_name must be a name that timm has")
        vision["timm_model_pretrained"] = False
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if not isinstance(text.get(key), str | None):
            raise UserError(f"clip: {source}: text_cfg.{key} must be a text")
        if text.get(key):
            if find_spec("transformers") is None:
                raise UserError(f"clip: {source} needs transformers for text_cfg.{key}: pip install 'pspg-engine[hf]'")
            if source.endswith(".json") and (Path(source).parent / text[key]).is_dir():
                text[key] = str(Path(source).parent / text[key])
    if text.get("hf_model_name"):
        text["hf_model_pretrained"] = False
    return config, preprocess


def _build(config: dict[str, Any], source: str) -> Any:
    arguments = deepcopy(config)
    custom = _custom(config)
    arguments.pop("custom_text", None)
    kind = (open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP) if custom else open_clip.CLIP
    try:
        with _no_code(config["text_cfg"].get("hf_model_name")):
            return kind(**arguments)
    except UserError as error:
        raise UserError(f"clip: {source}: {error}") from None
    except Exception as error:  # whatever open_clip, timm or transformers raises
        raise UserError(f"clip: open_clip cannot build {source} ({first_line(error)})") from error


def _custom(config: dict[str, Any]) -> bool:
    """The text tower is a module of its own."""
    return bool(config.get("custom_text") or config["text_cfg"].get("hf_model_name"))


@contextmanager
def _no_code(name: str | None) -> Iterator[None]:
    """Let transformers run no Python that comes with a model: it would ask the terminal, and a yes runs it.

    Raises:
        UserError: the folder `name` asks for code of its own.
    """
    if name is None or find_spec("transformers") is None:
        yield
        return
    for file in ("config.json", "tokenizer_config.json"):
        path = Path(name, file)
        document = read_json(path) if path.is_file() else {}
        if isinstance(document, dict) and "auto_map" in document:
            raise UserError(f"{path}: asks for Python code of its own (auto_map), which is not run; remove auto_map")
    from transformers import dynamic_module_utils

    asked = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # it then raises where it would ask
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = asked


def _load(model: Any, tensors: dict[str, Tensor], file: Path, source: str) -> None:
    """Load weights that must fit exactly, OpenAI's layout and older ones of open_clip's included.

    Raises:
        UserError: mismatching; another image size or context length by its setting.
    """
    tensors = convert_state_dict(model, tensors)
    expected = model.state_dict()
    if "positional_embedding" in tensors and "positional_embedding" not in expected:
        tensors = convert_to_custom_text_state_dict(tensors)
    positions = "text.transformer.embeddings.position_ids"  # older versions of transformers saved this constant
    if positions not in expected:
        tensors.pop(positions, None)
    for scalar in ("logit_scale", "logit_bias"):  # () or (1,)
        if scalar in tensors and scalar in expected and tensors[scalar].numel() == 1:
            tensors[scalar] = tensors[scalar].reshape(expected[scalar].shape)
    check_context_length(tensors, model, f"clip: {source}")
    _check_image_size(tensors, expected, file, source)
    load_strictly(model, tensors, file)


def _check_image_size(tensors: dict[str, Tensor], expected: dict[str, Tensor], file: Path, source: str) -> None:
    for name in ("visual.positional_embedding", "visual.attnpool.positional_embedding"):
        if name in tensors and name in expected and tensors[name].shape[0] != expected[name].shape[0]:
            theirs, ours = (round((positions[name].shape[0] - 1) ** 0.5) for positions in (tensors, expected))
            raise UserError(
                f"clip: {source}: vision_cfg.image_size makes a grid of {ours} × {ours} places, the weights {file} "
                f"were trained with {theirs} × {theirs}; set it so"
            )


def _tokenizer(text: dict[str, Any], source: str) -> Callable[..., Tensor]:
    name, length = text.get("hf_tokenizer_name") or text.get("hf_model_name"), text.get("context_length", 77)
    options = _options(text.get("tokenizer_kwargs") or {}, HF_OPTIONS if name else OPTIONS, source)
    mode = text.get("tokenizer_mode")
    if mode not in (None, "", "clips"):
        raise UserError(f"clip: {source}: text_cfg.tokenizer_mode must be clips or left out")
    try:
        if not name:
            return open_clip.SimpleTokenizer(context_length=length, **options)
        with _no_code(name):
            return HFTokenizer(name, context_length=length, tokenizer_mode=mode, trust_remote_code=False, **options)
    except UserError as error:
        raise UserError(f"clip: {source}: {error}") from None
    except Exception as error:  # whatever transformers or the hub's client raises
        raise UserError(f"clip: {source}: no tokenizer {name or ''} ({first_line(error)})") from error


def _options(options: Any, known: Collection[str], source: str) -> dict[str, Any]:
    """A tokenizer's options that say how it reads text; none that names a file, a place or code.

    Raises:
        UserError: another option, or a value that is no text, number, truth value or list of texts.
    """
    where = f"clip: {source}: text_cfg.tokenizer_kwargs"
    if not isinstance(options, dict):
        raise UserError(f"{where} must be an object")
    for key, value in options.items():
        if key not in known:
            raise UserError(f"{where}.{key} is not passed on; known are {', '.join(sorted(known))}")
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str | int | float | bool | None) for one in values):
            raise UserError(
                f"clip: {source}: text_cfg.tokenizer_kwargs.{key} must be a text, a number or a list of them"
            )
    return options


def _three_numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and len(values) == 3 and all(isinstance(v, int | float) for v in values)
