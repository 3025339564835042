"""Checksums of checkpoints and model folders: a flipped bit or a file cut short is told where it lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from safetensors import SafetensorError, safe_open

from ..utils.documents import Within, as_schema, read_json
from ..utils.errors import UserError
from ..utils.files import naming

Count = Annotated[int, Within(0, 10**12)]


@dataclass(frozen=True)
class State:
    """state.json of a checkpoint."""

    step: Count
    """optimizer steps"""
    best_step: Count | None
    """of the checkpoint with the best score; None: nothing was scored"""
    best_score: float | None = None
    epoch: Count | None = None
    """epochs that are complete"""
    scaler: dict[str, Any] | None = None
    """fp16's loss scale"""
    contract: dict[str, Any] | None = None
    """what the run must have been made with to be continued"""
    files: dict[str, str] | None = None
    """file name → SHA-256; None: an older version wrote the checkpoint"""
    sha256: str | None = None
    """of this document without this key"""


def read_state(folder: Path) -> State:
    """state.json of a checkpoint, its own checksum verified.

    Raises:
        UserError: missing, not of the schema, or a wrong checksum.
    """
    file = folder / "state.json"
    document = read_json(file)
    try:
        state = as_schema(State, document)
    except ValueError as error:
        raise UserError(f"{file}: is not the state of a training run ({error})") from None
    if state.sha256 is not None and state.sha256 != digest_of(document):
        raise UserError(f"{file}: wrong checksum")
    return state


def verify(folder: Path) -> State:
    """The state of a checkpoint whose files are as they were written.

    Raises:
        UserError: naming the file.
    """
    state = read_state(folder)
    check_files(folder, state.files or {})
    if not state.files and not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder / 'model.safetensors'}: no such file")
    return state


def check_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Verify the checksums of a folder's files.

    Raises:
        UserError: naming the first that is missing or not as it was written.
    """
    for name, digest in digests.items():
        file = folder / name
        if Path(name).name != name:
            raise UserError(f"{folder}: names {name!r} as one of its files")
        if sha256_of(file) != digest:
            check_readable(file)
            raise UserError(f"{file}: wrong checksum; the file is damaged")


def check_readable(file: Path) -> None:
    """Refuse a safetensors file that is cut short or none at all; its tensors are not read.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from None


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's content; a file that has not changed is read once.

    Raises:
        UserError: it cannot be read.
    """
    try:
        status = file.stat()
        return _sha256(file, status.st_size, status.st_mtime_ns, status.st_ino)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def digest_of(document: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON document without its key `sha256`, however it is laid out."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=1024)
def _sha256(file: Path, *_: int) -> str:
    with naming(file), file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
