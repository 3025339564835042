"""A run that goes on from another's checkpoint under other settings: a fork, which says so and records its parent."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..checkpoints.integrity import Count, State, read_state
from ..checkpoints.run import best_checkpoint, copy_checkpoint, good_checkpoint, last_checkpoint, read_json, write_json
from ..utils.documents import as_schema
from ..utils.errors import UserError
from ..utils.files import partial_folder, replacing, write_text
from ..utils.names import base_name
from .config import TrainConfig
from .fingerprint import FORKABLE, as_written

log = logging.getLogger(__name__)

FILE = "fork.json"
COPIED = ("model.json", "clip.safetensors", "bank.safetensors", "metrics.jsonl")
"""what a fork has of its parent beside checkpoints, where it is there"""


@dataclass(kw_only=True)
class Fork:
    """fork.json: where a run comes from."""

    parent: str
    """base name of the parent's folder"""
    step: Count
    """optimizer steps of the parent's checkpoint"""
    sha256: str | None
    """of that checkpoint's state.json, which has the digests of its tensors; None: an older version wrote it"""
    changed: dict[str, Any]
    """setting → value in the parent, value here"""


def origin(config: TrainConfig) -> Path | None:
    """The run whose files and checkpoint training begins with: this one, else its parent; None: it starts fresh."""
    if last_checkpoint(Path(config.output)) is not None:
        return Path(config.output)
    return None if config.fork is None else Path(config.fork)


def read_fork(run: Path) -> Fork | None:
    """Where a run comes from; None: it is no fork.

    Raises:
        UserError: fork.json is damaged.
    """
    file = run / FILE
    if not file.is_file():
        return None
    try:
        return as_schema(Fork, read_json(file))
    except ValueError as error:
        raise UserError(f"{file}: is damaged ({error}); fork the parent again") from None


def check_same_parent(config: TrainConfig) -> None:
    """Refuse to continue a run as a fork of another than its parent.

    Raises:
        UserError: naming both.
    """
    if config.fork is None:
        return
    found, named = read_fork(Path(config.output)), base_name(Path(config.fork))
    if found is None or found.parent != named:
        is_what = "no fork" if found is None else f"a fork of {found.parent}"
        raise UserError(f"fork: {config.output} is {is_what}, not of {named}; leave fork out, or choose another output")


def parent_checkpoint(config: TrainConfig) -> tuple[Path, State]:
    """The newest good checkpoint of the parent, as `good_checkpoint`; without a best step where the best is lost.

    Raises:
        UserError: there is none, or all are damaged.
    """
    parent = Path(config.fork or "")
    found = good_checkpoint(parent)
    if found is None:
        raise UserError(f"fork: {parent} holds no checkpoint yet")
    checkpoint, state = found
    if state.epoch is not None and state.epoch >= config.optim.epochs:
        raise UserError(
            f"optim.epochs: {parent} has trained {state.epoch} epochs already; ask for more than that in all"
        )
    best = best_checkpoint(parent)
    if best is None or state.best_step is None or best.name != f"step-{state.best_step:08d}":
        state = replace(state, best_step=None, best_score=None)
    return checkpoint, state


def changes(contract: dict[str, Any], fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Setting → value in the parent, value here, of the settings that a fork may change."""
    return {
        key: [contract.get(key), value]
        for key, value in fingerprint.items()
        if key in FORKABLE and contract.get(key) != value
    }


def write_fork(config: TrainConfig, checkpoint: Path, state: State, fingerprint: dict[str, Any]) -> Path:
    """Begin the run with copies of the parent's files, its checkpoint and its best; returns the copied checkpoint.

    The checkpoints appear together, and last: without them the folder holds no run.

    Args:
        config: of the new run.
        checkpoint, state: of `parent_checkpoint`.
        fingerprint: of the new run; it replaces the parent's in the copies.

    Raises:
        UserError: a file of the parent is damaged or gone.
    """
    run, parent = Path(config.output), Path(config.fork or "")
    run.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (parent / name).is_file():
            with (parent / name).open("rb") as source, replacing(run / name) as target:
                shutil.copyfileobj(source, target)
    settings = asdict(replace(config, resume=None))
    write_text(run / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    changed = changes(state.contract or {}, fingerprint)
    digest = read_state(checkpoint).sha256
    write_json(run / FILE, asdict(Fork(parent=base_name(parent), step=state.step, sha256=digest, changed=changed)))
    folders = {checkpoint.name: checkpoint}
    if state.best_step is not None:
        best = f"step-{state.best_step:08d}"
        folders[best] = checkpoint.with_name(best)
    with partial_folder(run.resolve() / "checkpoints") as partial:
        for name, folder in folders.items():
            best_of = {"best_step": state.best_step, "best_score": state.best_score}
            copy_checkpoint(folder, partial / name, contract=fingerprint, **best_of)
        write_text(partial / "last", checkpoint.name + "\n")
    said = (
        ", ".join(f"{key} {as_written(old)} → {as_written(new)}" for key, (old, new) in changed.items())
        or "no setting changed"
    )
    log.info(f"a fork of {checkpoint} ({state.epoch} epochs): {said}")
    return run / "checkpoints" / checkpoint.name
