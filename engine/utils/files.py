"""Files that are either the old or the new one, whenever the process is killed.

Temporary names are random and made anew, so that no link that somebody has planted is written through and no two
writers meet. An error names the file, also where the system does not (a full disk).
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import UserError
from .names import HUB


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put the file's name into an OSError that has none, such as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write and read, which replaces `path` in one step at the end; after an error nothing is left.

    Raises:
        OSError: names `path`.
        UserError: `path` is a device or pipe: root would replace it for every program of the machine.
    """
    if _is_special(path):
        raise UserError(f"{path}: is a device or a pipe, not a file; choose another name")
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".tmp")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        with naming(path), os.fdopen(descriptor, "w+b") as file:
            os.fchmod(descriptor, 0o666 & ~_umask())  # as any new file; mkstemp's are private
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a UTF-8 file in one step; line ends stay as they are."""
    content = text.encode("utf-8")
    with replacing(path) as file:
        file.write(content)


def sync(path: Path) -> None:
    """Make sure that the disk holds a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_input(**paths: str | Path | None) -> None:
    """Refuse files and folders that are not there; key → path, None or empty: not given. Names on the Hub are let pass.

    Raises:
        UserError: naming key and path.
    """
    for key, path in paths.items():
        if path and not Path(path).exists() and not str(path).startswith(HUB):
            raise UserError(f"{key}: {path}: no such file or folder")


def check_names(**names: str | list[str] | None) -> None:
    """Refuse a text file of names that is not there, most often a name itself; key → file, or a list of names.

    Raises:
        UserError: naming key and file, and how a list is given.
    """
    for key, value in names.items():
        if isinstance(value, str) and value and not Path(value).is_file():
            raise UserError(
                f"{key}: {value}: no such file of names, one a line; names themselves go in a list, --{key} '[{value}]'"
            )


def check_output(path: str | Path, *, folder: bool = True, key: str = "output") -> None:
    """Refuse, before any work is done, an output that could not be written; `key` is the setting that names it.

    Raises:
        UserError: it is a file where a folder is needed (or the reverse), a device or pipe, lies below a
            file, or is not writable.
    """
    path = Path(path)
    if path.exists() and path.is_dir() != folder:
        raise UserError(f"{key}: {path} is a {'file' if folder else 'folder'}; choose another name")
    if _is_special(path):
        raise UserError(f"{key}: {path} is a device or a pipe, not a file; choose another name")
    place = path if path.exists() else path.parent
    while not place.exists():
        place = place.parent
    if not path.exists() and not place.is_dir():
        raise UserError(f"{key}: {path} lies below {place}, which is a file; choose another name")
    if not os.access(place, os.W_OK):
        raise UserError(f"{key}: {place} is not writable; choose another place")


def check_unused(*files: str | Path, overwrite: bool, key: str = "output") -> None:
    """Refuse, before any work is done, to replace results unless `overwrite`; `key` as in `check_output`.

    Raises:
        UserError: naming the first file that would be replaced.
    """
    held = next((file for file in files if Path(file).exists()), None)
    if held is not None and not overwrite:
        raise UserError(f"{key}: {held} is there already; choose another name, or give --overwrite true to replace it")


def check_new_folder(path: str | Path, *, key: str = "output") -> None:
    """Refuse, before any work is done, an output that is not a new or empty folder; `key` as in `check_output`.

    Raises:
        UserError: it holds something, or could not be written.
    """
    check_output(path, key=key)
    if Path(path).exists() and any(Path(path).iterdir()):
        raise UserError(f"{key}: {path} is not empty; name a new folder")


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A folder with a random name beside `target`, which it becomes at the end; nothing is left of it after an error.

    Raises:
        UserError: another process has filled `target` meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".partial"))
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        for file in (*partial.iterdir(), partial):
            sync(file)
        try:
            partial.rename(target)  # replaces an empty folder
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise UserError(f"{target}: was filled by another process meanwhile; name a new folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_folder(path: str | Path, *, key: str = "output") -> Iterator[Path]:
    """A folder to fill beside `path`, renamed to it at the end; nothing is left of it after an error.

    Raises:
        UserError: see `check_new_folder`.
    """
    check_new_folder(path, key=key)
    with partial_folder(Path(path).resolve()) as partial:
        yield partial


def _is_special(path: Path) -> bool:
    """Whether something other than a file or folder is there, or a link of /proc, as /dev/stdout is one."""
    if path.is_symlink() and os.readlink(path).startswith("/proc/"):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
