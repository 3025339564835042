"""Files that are either the old or the new one, whenever the process is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


def write_text(path: Path, text: str) -> None:
    """Replace a UTF-8 file in one step; line ends stay as they are."""
    content = text.encode("utf-8")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    sync(temporary)
    os.replace(temporary, path)


def sync(path: Path) -> None:
    """Make sure that the disk holds a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_input(**paths: str | Path | None) -> None:
    """Refuse files and folders that are not there; key → path, None or empty: not given.

    Raises:
        UserError: naming key and path.
    """
    for key, path in paths.items():
        if path and not Path(path).exists():
            raise UserError(f"{key}: {path}: no such file or folder")


def check_output(path: str | Path, *, folder: bool = True, key: str = "output") -> None:
    """Refuse, before any work is done, an output that could not be written; `key` is the setting that names it.

    Raises:
        UserError: it is a file where a folder is needed (or the reverse), lies below a file, or is not writable.
    """
    path = Path(path)
    if path.exists() and path.is_dir() != folder:
        raise UserError(f"{key}: {path} is a {'file' if folder else 'folder'}; choose another name")
    place = path if path.exists() else path.parent
    while not place.exists():
        place = place.parent
    if not path.exists() and not place.is_dir():
        raise UserError(f"{key}: {path} lies below {place}, which is a file; choose another name")
    if not os.access(place, os.W_OK):
        raise UserError(f"{key}: {place} is not writable; choose another place")


def check_new_folder(path: str | Path, *, key: str = "output") -> None:
    """Refuse, before any work is done, an output that is not a new or empty folder; `key` as in `check_output`.

    Raises:
        UserError: it holds something, or could not be written.
    """
    check_output(path, key=key)
    if Path(path).exists() and any(Path(path).iterdir()):
        raise UserError(f"{key}: {path} is not empty; name a new folder")


@contextmanager
def new_folder(path: str | Path, *, key: str = "output") -> Iterator[Path]:
    """A folder to fill beside `path`, renamed to it at the end; nothing is left of it after an error.

    Raises:
        UserError: see `check_new_folder`.
    """
    check_new_folder(path, key=key)
    target = Path(path).resolve()
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had this number
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in (*partial.iterdir(), partial):
            sync(file)
        partial.rename(target)  # replaces an empty folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)
