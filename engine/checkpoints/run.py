"""Training checkpoints: safetensors and JSON, written atomically, independent of the number of ranks.

    <run>/config.yaml               the resolved configuration
    <run>/model.json                what using the weights needs: architecture, classes, pixels, tokenizer
    <run>/clip.safetensors          the frozen towers (phase 2), in open_clip's layout
    <run>/bank.safetensors          image features of the context bank (phase 2)
    <run>/checkpoints/step-N/       model, ema and optimizer .safetensors, and state.json with their checksums
    <run>/checkpoints/last          the name of the newest step-N folder, whose state.json names the best

A folder appears under its final name only when it is complete, and `last` moves after that, in one step; nothing is
ever unpickled. Without `last` the complete folders are found by their names.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..utils.documents import read_json
from ..utils.errors import UserError
from ..utils.files import replacing, sync, write_text
from .integrity import State, check_files, digest_of, read_state, sha256_of, verify

log = logging.getLogger(__name__)

__all__ = [
    "best_checkpoint",
    "copy_checkpoint",
    "good_checkpoint",
    "is_step",
    "last_checkpoint",
    "load_tensors",
    "read_json",
    "run_of",
    "save_checkpoint",
    "write_json",
    "write_tensors",
]

NAME = re.compile(r"step-\d{8,}")


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old or the new one."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors so that the file is either the old or the new one."""
    # Not save_file, which makes the file readable by its owner alone.
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    with replacing(path) as file:
        file.write(content)


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


def save_checkpoint(run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write `step-<step>` with its checksums and point `last` to it.

    The best and at least one more are kept: of older ones, the newest where the best is the new one. Folders of later
    steps, which another `last` has named, stay.

    Args:
        tensors: file name without suffix → tensors.
        state: what state.json holds; its `best_step` says which checkpoint is the best so far (None: no score).
    """
    root = run / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    folder = _folder(run, step)
    for leftover in root.glob(".step-*"):  # of a killed process
        shutil.rmtree(leftover)
    temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".{folder.name}."))
    temporary.chmod(run.stat().st_mode & 0o777)
    for name, values in tensors.items():
        write_tensors(temporary / f"{name}.safetensors", values)
    _seal(temporary, state)
    if folder.exists():  # what a killed process wrote before `last` could name it, or a damaged one
        if last_checkpoint(run) == folder:
            (root / "last").unlink(missing_ok=True)  # it never names what is not there
        os.rename(folder, root / f".{folder.name}.old")
    os.rename(temporary, folder)
    sync(root)
    write_text(root / "last", folder.name + "\n")
    best_step = state["best_step"]
    best = folder if best_step is None else _folder(run, best_step)
    older = sorted(other for other in _folders(run) if other < folder)
    keep = {best, *([] if best != folder else older[-1:])}
    for other in (*older, *root.glob(".step-*")):
        if other not in keep:
            shutil.rmtree(other)


def copy_checkpoint(source: Path, target: Path, **changes: Any) -> None:
    """Copy a checkpoint into a new folder, with other values of some keys of its state.

    Raises:
        UserError: it is damaged or gone, also meanwhile.
    """
    verify(source)
    state = {key: value for key, value in read_json(source / "state.json").items() if key not in ("files", "sha256")}
    target.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        with file.open("rb") as content, replacing(target / file.name) as copy:
            shutil.copyfileobj(content, copy)
    check_files(target, read_state(source).files or {})
    _seal(target, {**state, **changes})


def last_checkpoint(run: Path) -> Path | None:
    """The checkpoint that `last` names, else the newest with a state; None if there is none. Nothing is verified.

    Raises:
        UserError: `last` names no checkpoint folder.
    """
    pointer = run / "checkpoints" / "last"
    if not pointer.is_file():
        return max((folder for folder in _folders(run) if (folder / "state.json").is_file()), default=None)
    with pointer.open("rb") as file:
        name = file.read(100).strip().decode("ascii", "replace")
    if not NAME.fullmatch(name) or not (pointer.parent / name).is_dir():
        raise UserError(f"{pointer}: names no checkpoint folder; write the name of a complete step-… folder into it")
    return pointer.parent / name


def good_checkpoint(run: Path) -> tuple[Path, State] | None:
    """The checkpoint to continue from: what `last` names, or, where that is damaged, the newest that is whole.

    All checkpoints of the run are verified, and there is a line for each that is damaged.

    Returns:
        folder and state; None if the run has no checkpoint.

    Raises:
        UserError: there are checkpoints, and all are damaged; or see `last_checkpoint`.
    """
    named = last_checkpoint(run)
    if named is None:
        if found := _folders(run):
            raise UserError(f"{found[-1] / 'state.json'}: no such file; {run} holds no complete checkpoint")
        return None
    whole: dict[Path, State] = {}
    damaged: dict[Path, str] = {}
    for folder in _folders(run):
        try:
            whole[folder] = verify(folder)
        except UserError as error:
            damaged[folder] = str(error)
    if not whole:
        raise UserError(f"{damaged[named]}; {run} holds no other checkpoint that is whole")
    chosen = named if named in whole else max(whole, key=lambda folder: (whole[folder].step, folder))
    for reason in damaged.values():
        log.warning(f"{reason}; the newest good checkpoint is {chosen}, it is used")
    if not (run / "checkpoints" / "last").is_file():
        log.info(f"{run / 'checkpoints' / 'last'}: is missing; {chosen} is the newest checkpoint")
    return chosen, whole[chosen]


def best_checkpoint(run: Path) -> Path | None:
    """Checkpoint with the best validation score, or the newest where nothing was scored; None if there is none.

    Where the best is damaged or gone, the newest that is whole, with a line; raises and speaks as `good_checkpoint`.
    """
    found = good_checkpoint(run)
    if found is None:
        return None
    chosen, state = found
    if state.best_step is None:
        return chosen
    best = _folder(run, state.best_step)
    try:
        verify(best)
    except UserError as error:
        if not best.is_dir():
            log.warning(f"{error}; the newest good checkpoint is {chosen}, it is used")
        return chosen
    return best


def run_of(folder: Path) -> Path:
    """The run of one of its checkpoint folders, `<run>/checkpoints/step-N`; any other folder as it is."""
    return folder.parents[1] if is_step(folder) else folder


def is_step(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run, by its name and place."""
    return folder.parent.name == "checkpoints" and NAME.fullmatch(folder.name) is not None


def _seal(folder: Path, state: dict[str, Any]) -> None:
    """Write state.json with the checksums of the files beside it."""
    document = {**state, "files": {file.name: sha256_of(file) for file in sorted(folder.iterdir())}}
    write_json(folder / "state.json", {**document, "sha256": digest_of(document)})
    sync(folder)


def _folders(run: Path) -> list[Path]:
    """Checkpoint folders, the oldest first."""
    found = (run / "checkpoints").glob("step-*")
    return sorted((path for path in found if NAME.fullmatch(path.name) and path.is_dir()), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name[5:25])


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"
