"""Weight files, read without running any code they hold, and loaded without leaving anything out."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import open_clip
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..utils.documents import read_json
from ..utils.errors import UserError, first_line
from .torchscript import NotPlain, check_stored, is_torchscript, read_torchscript

OPENAI_SETTINGS = {"input_resolution", "context_length", "vocab_size"}
"""Settings that OpenAI's files hold among the weights."""
_NESTED = ("state_dict", "model_state_dict", "model")
"""entries of a checkpoint that hold its weights"""
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod)\.")
"""parts of a name that parallel training and torch.compile add"""


def read_weights(path: str | Path, *, scripted: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata (of safetensors) of a weight file, on the CPU.

    Reads .safetensors, `torch.save` files (tensors only) and, where `scripted` allows it, the TorchScript archives that
    OpenAI publishes; their tensors are read as data, nothing in them runs. See `plain_state`; the settings in OpenAI's
    files go to the metadata.

    Raises:
        UserError: missing or unreadable file, or one that holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                return _split({name: file.get_tensor(name) for name in names}, path, file.metadata() or {})
        if is_torchscript(path):
            if not scripted:
                raise UserError(f"{path}: is a TorchScript archive, which can hold code; give plain weights")
            return _split(read_torchscript(path), path, {})
        if zipfile.is_zipfile(path):
            check_stored(path)
        return _split(torch.load(path, map_location="cpu", weights_only=True), path, {})
    except UserError:
        raise
    except NotPlain as error:
        raise UserError(f"{path}: not read: {error}; give plain weights, such as .safetensors") from None
    except Exception as error:  # a damaged file can fail anywhere in its parser
        # torch's own message advises to load the file unsafely.
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors" if unsafe else first_line(error)
        raise UserError(f"{path}: not readable as weights ({reason})") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """Metadata of a safetensors file that `read_weights` can read; empty for other files."""
    if Path(path).suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def plain_state(value: object, source: str | Path) -> dict[str, Tensor]:
    """State dict in `value`: the mapping itself, or its entry `state_dict`, `model_state_dict` or `model`.

    What parallel training and torch.compile add to names (`module.`, `_orig_mod.`) is dropped, and so is `model.` where
    all names begin with it.

    Raises:
        UserError: it is no mapping of names to tensors, or several, or holds a name twice.
    """
    while isinstance(value, Mapping) and (inner := [key for key in _NESTED if isinstance(value.get(key), Mapping)]):
        if len(inner) > 1:
            raise UserError(f"{source}: holds several state dicts ({', '.join(inner)}); save one of them")
        value = value[inner[0]]
    if not isinstance(value, Mapping) or not value:
        raise UserError(f"{source}: holds no state dict (a mapping of names to tensors)")
    names = {key: _WRAPPERS.sub("", str(key)) for key in value}
    while all(name.startswith("model.") for name in names.values()):
        names = {key: name.removeprefix("model.") for key, name in names.items()}
    state: dict[str, Tensor] = {}
    for key, tensor in value.items():
        name = names[key]
        if name in state:
            raise UserError(f"{source}: holds {name} twice")
        if not isinstance(tensor, Tensor):
            if name in OPENAI_SETTINGS and isinstance(tensor, int):
                tensor = torch.tensor(tensor)
            else:
                raise UserError(f"{source}: entry {name} is of type {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.device.type == "meta" or _repeats(tensor):
            raise UserError(f"{source}: entry {name} is not a plain tensor with all its values")
        state[name] = tensor
    return state


def _split(value: object, source: Path, metadata: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights, and the metadata with OpenAI's settings."""
    state = plain_state(value, source)
    settings = {name: str(int(state.pop(name))) for name in OPENAI_SETTINGS & state.keys()}
    return state, metadata | settings


def trained_with_quick_gelu(file: Path, metadata: Mapping[str, str]) -> bool | None:
    """Whether weights were trained with QuickGELU activations, which their tensors do not show; None: unknown.

    Known of OpenAI's files by their settings, of folders of the Hugging Face hub by `open_clip_config.json`, and of
    files that open_clip names, by their name with its hash.

    Args:
        file: the weights.
        metadata: of `read_weights`.
    """
    if metadata.keys() >= OPENAI_SETTINGS:
        return True
    try:
        beside = read_json(file.parent / "open_clip_config.json")
        if isinstance(beside["model_cfg"], dict):
            return bool(beside["model_cfg"].get("quick_gelu", False))
    except (UserError, KeyError, TypeError):  # no such file, or of another form: the name may tell
        pass
    return _published_files().get(file.name)


@cache
def _published_files() -> dict[str, bool]:
    """File name with a hash → QuickGELU, of the weights that open_clip lists."""
    known: dict[str, bool] = {}
    for name, tag in open_clip.list_pretrained():
        weights = open_clip.get_pretrained_cfg(name, tag)
        file = str(weights.get("url", "")).rsplit("/", 1)[-1]
        if re.search(r"-[0-9a-f]{8}\.pt$", file):
            known[file] = bool(weights.get("quick_gelu", False))
    return known


def _repeats(tensor: Tensor) -> bool:
    """It has more elements than the file gave values: a few bytes would become any amount of memory."""
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        UserError: listing missing and unexpected keys and keys of another shape.
    """
    check_fit(module.state_dict(), tensors, source)
    module.load_state_dict(dict(tensors))


def check_fit(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Check that two state dicts agree in keys and shapes.

    Raises:
        UserError: listing missing and unexpected keys and keys of another shape.
    """
    common = expected.keys() & tensors.keys()
    faults = {
        "missing": expected.keys() - common,
        "unexpected": tensors.keys() - common,
        "other shape": {name for name in common if expected[name].shape != tensors[name].shape},
    }
    if any(faults.values()):
        listing = "; ".join(f"{what}: {_first(names)}" for what, names in faults.items() if names)
        raise UserError(f"{source}: the weights do not fit the model; {listing}")


def _first(names: set[str], limit: int = 5) -> str:
    shown = sorted(names)[:limit]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
