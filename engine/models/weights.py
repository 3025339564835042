"""Weight files, read without running any code they hold, and loaded without leaving anything out."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..utils.errors import UserError
from .torchscript import NotPlain, check_stored, is_torchscript, read_torchscript

_NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size"}
"""Settings that OpenAI's files hold among the weights."""


def read_weights(path: str | Path, *, scripted: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata (of safetensors) of a weight file, on the CPU.

    Reads .safetensors, `torch.save` files (tensors only) and, where `scripted` allows it, the TorchScript archives that
    OpenAI publishes; their tensors are read as data, nothing in them runs. An entry `state_dict` is opened, and the
    prefix `module.` of parallel training dropped.

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
                return plain_state({name: file.get_tensor(name) for name in names}, path), file.metadata() or {}
        if is_torchscript(path):
            if not scripted:
                raise UserError(f"{path}: is a TorchScript archive, which can hold code; give plain weights")
            return plain_state(read_torchscript(path), path), {}
        if zipfile.is_zipfile(path):
            check_stored(path)
        return plain_state(torch.load(path, map_location="cpu", weights_only=True), path), {}
    except UserError:
        raise
    except NotPlain as error:
        raise UserError(f"{path}: not read: {error}; give plain weights, such as .safetensors") from None
    except Exception as error:  # a damaged file can fail anywhere in its parser
        # torch's own message advises to load the file unsafely.
        unsafe = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors" if unsafe else (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not readable as weights ({reason})") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """Metadata of a safetensors file that `read_weights` can read; empty for other files."""
    if Path(path).suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def plain_state(value: object, source: str | Path) -> dict[str, Tensor]:
    """State dict in `value`: the mapping itself or its `state_dict`, without the prefix `module.`.

    Raises:
        UserError: it is no mapping of names to tensors.
    """
    if isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping):
        value = value["state_dict"]
    if not isinstance(value, Mapping) or not value:
        raise UserError(f"{source}: holds no state dict (a mapping of names to tensors)")
    state: dict[str, Tensor] = {}
    for name, tensor in value.items():
        name = str(name).removeprefix("module.")
        if name in _NOT_WEIGHTS:
            continue
        if not isinstance(tensor, Tensor):
            raise UserError(f"{source}: entry {name} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.device.type == "meta" or _repeats(tensor):
            raise UserError(f"{source}: entry {name} is not a plain tensor with all its values")
        state[name] = tensor
    return state


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
