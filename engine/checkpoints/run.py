"""Training checkpoints: safetensors and JSON, written atomically, independent of the number of ranks.

    <run>/config.yaml               the resolved configuration
    <run>/model.json                what using the weights needs: architecture, classes, pixels, tokenizer
    <run>/clip.safetensors          the frozen towers (phase 2), in open_clip's layout
    <run>/bank.safetensors          image features of the context bank (phase 2)
    <run>/checkpoints/step-N/       model, ema and optimizer .safetensors, and state.json
    <run>/checkpoints/last          the name of the newest step-N folder, whose state.json names the best

A folder appears under its final name only when it is complete, and `last` moves after that, in one step; nothing is
ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..utils.errors import UserError
from ..utils.files import sync, write_text


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old or the new one."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors so that the file is either the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    # Not save_file, which makes the file readable by its owner alone.
    temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))
    sync(temporary)
    os.replace(temporary, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU.

    Raises:
        UserError: missing or damaged file.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def read_json(path: Path) -> Any:
    """Value of a JSON file.

    Raises:
        UserError: missing or damaged file.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None


def save_checkpoint(run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write `step-<step>`, point `last` to it, and delete what neither `last` nor its best names.

    Args:
        tensors: file name without suffix → tensors.
        state: what state.json holds; its `best_step` says which checkpoint is the best so far (None: no score).
    """
    root = run / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    folder = _folder(run, step)
    temporary = root / f".{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, values in tensors.items():
        write_tensors(temporary / f"{name}.safetensors", values)
    write_json(temporary / "state.json", state)
    sync(temporary)
    # A folder of this name is what a killed process wrote before `last` could name it.
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)
    sync(root)
    write_text(root / "last", folder.name + "\n")
    keep = {folder, best_checkpoint(run)}
    for other in root.iterdir():
        if other.is_dir() and other not in keep:
            shutil.rmtree(other)


def last_checkpoint(run: Path) -> Path | None:
    """Newest complete checkpoint of a run; None if it has none."""
    pointer = run / "checkpoints" / "last"
    if not pointer.is_file():
        return None
    name = pointer.read_bytes().strip().decode("ascii", "replace")
    if not re.fullmatch(r"step-\d{8,}", name) or not (pointer.parent / name).is_dir():
        raise UserError(f"{pointer}: names no checkpoint folder; write the name of a complete step-… folder into it")
    return pointer.parent / name


def best_checkpoint(run: Path) -> Path | None:
    """Checkpoint with the best validation score, or the newest where nothing was scored; None if there is none."""
    last = last_checkpoint(run)
    if last is None:
        return None
    state = read_json(last / "state.json")
    best_step = state.get("best_step", "") if isinstance(state, dict) else ""
    if not isinstance(best_step, int | None):
        raise UserError(f"{last / 'state.json'}: is not the state of a training run")
    return last if best_step is None else _folder(run, best_step)


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"
