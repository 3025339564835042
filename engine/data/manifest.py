"""Manifests: JSON lines, one image a line, checked as a whole before anything is read from the images."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from ..utils.errors import UserError
from ..utils.text import printable

LONGEST_LINE = 16 * 2**20
"""bytes"""
LONGEST_PATH = 1000
"""characters; a system allows few more, and each folder of it is resolved from the one above"""
EMPTY = "the manifest is empty; write one image a line"
log = logging.getLogger(__name__)

Need = Literal["labels", "text", "image"]
NOTE = "prepare.json"
"""what `prepare` writes beside its manifests; its `image_root` is the folder of the images, relative to its own"""

# What a label may be; a lookup refuses everything else, NaN included.
LEVELS: dict[Any, float | None] = {1: 1.0, 0: 0.0, -1: -1.0, None: None}
# Control characters (C0, C1), separators of lines, lone surrogates: they would break one-line messages, CSV files and
# file names. What only hides or turns text is escaped where it is shown (utils/text.py).
WINDOWS_DRIVE = re.compile("[A-Za-z]:/")
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of a manifest.

    `labels` has one entry a label name: 1 present, 0 absent, -1 uncertain, None not mentioned. `patient` is
    for grouping only: it never leaves the input unhashed.
    """

    id: str
    path: Path
    text: str | None = None
    labels: tuple[float | None, ...] | None = None
    patient: str | None = None
    line: int = field(default=0, compare=False)
    """of the manifest, from 1"""


@dataclass(frozen=True)
class Manifest:
    """The samples of one manifest, in its order, and the names of its labels (None: labels were not read)."""

    path: Path
    samples: list[Sample]
    label_names: list[str] | None


def load_label_names(path: str | Path) -> list[str]:
    """Class names of a text file, one a line, stripped; their order is the order of label lists.

    Raises:
        UserError: no such file, no names, an empty line between names, or a name twice.
    """
    path = Path(path)
    names: list[str] = []
    lines = [line.strip() for line in _read_lines(path, "label names")]
    while lines and not lines[-1]:
        lines.pop()
    for number, name in enumerate(lines, 1):
        if not name:
            raise UserError(f"{path}:{number}: empty line between class names; remove it")
        if UNPRINTABLE.search(name):
            raise UserError(f"{path}:{number}: class name {name!r} holds a control character; remove it")
        if name in names:
            raise UserError(f"{path}:{number}: class name {name!r} is already on line {names.index(name) + 1}")
        names.append(name)
    if not names:
        raise UserError(f"{path}: holds no class names; write one a line")
    return names


def load_manifest(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    label_names: Sequence[str] | None = None,
    need: Need,
) -> Manifest:
    """Read and check a manifest; images are not opened, so a missing file shows when it is read.

    A line is `{"id", "filepath", "text", "labels", "patient_id"}`: `labels` is a list in the order of
    `label_names`, or an object name → value (names left out are None). Unknown keys are ignored.

    Args:
        path: JSONL file.
        image_root: folder that `filepath` is relative to; None: see `image_folder`.
        label_names: None: `classes.txt` beside the manifest, where labels are needed.
        need: what every line must have besides id and filepath; labels are read only where they are needed or
            `label_names` is given.

    Raises:
        UserError: naming file, line and reason: no such file, no lines, not JSON, an id missing or twice,
            labels of the wrong length or values other than 1, 0, -1, null (NaN too), empty text, a filepath
            that is absolute (on Windows, too) or leaves `image_root` by `..` or a link. Backslashes are slashes where
            no file has them in its name.
    """
    path = Path(path)
    root = image_folder(path, image_root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; data.image_root must be the folder of the images")
    if not path.exists():
        raise UserError(f"{path}: no such file (manifest)")
    names: list[str] | None = None
    if label_names is not None:
        names = [name.strip() for name in label_names]
    elif need == "labels":
        sidecar = path.parent / "classes.txt"
        if not sidecar.is_file():
            if not any(line.strip() for line in _read_lines(path, "manifest")):
                raise UserError(f"{path}: {EMPTY}")
            raise UserError(f"{sidecar}: no such file; name the file of class names with label_names")
        names = load_label_names(sidecar)

    locate = _Locator(root)
    samples: list[Sample] = []
    first_line: dict[str, int] = {}
    lines = tqdm(_read_lines(path, "manifest"), f"reading {printable(path.name)}", delay=2, disable=None, leave=False)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            sample = _parse(line, number, locate, names, need)
        except _Refused as error:
            raise UserError(f"{path}:{number}: {error}") from None
        earlier = first_line.setdefault(sample.id, number)
        if earlier != number:
            raise UserError(f"{path}:{number}: id {sample.id!r} is already on line {earlier}")
        samples.append(sample)
    _tell_doubled(path, samples)
    if not samples:
        raise UserError(f"{path}: {EMPTY}")
    return Manifest(path, samples, names)


def _tell_doubled(path: Path, samples: Sequence[Sample]) -> None:
    """Say which files stand under several ids: they count twice. Between splits, see `leaks.py`."""
    first: dict[Path, Sample] = {}
    doubled = [sample for sample in samples if first.setdefault(sample.path, sample) is not sample]
    if doubled:
        one = doubled[0]
        earlier = first[one.path]
        log.warning(
            f"{path}: {len(doubled):,} lines hold a file that an earlier line has under another id and count twice, "
            f"the first {one.path.name!r} ({earlier.id!r} of line {earlier.line} and {one.id!r} of line {one.line})"
        )


def image_folder(manifest: str | Path, image_root: str | Path | None) -> Path:
    """Folder that a manifest's file paths are relative to: the one given, else the one `prepare` noted, else its own.

    Raises:
        UserError: a note that cannot be read, or that names a folder which is not there.
    """
    if image_root is not None:
        return Path(image_root)
    folder = Path(manifest).parent
    note = folder / NOTE
    if not note.is_file():
        return folder
    try:
        noted = json.loads(note.read_text(encoding="utf-8")).get("image_root", ".")
        root = folder / noted
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{note}: cannot be read; give image_root, the folder of the images") from None
    if not root.is_dir():
        raise UserError(
            f"{note}: the images were in {os.path.normpath(root)}, and there is no such folder; give image_root"
        )
    return root


class _Refused(Exception):
    """Why a line cannot be used; the caller adds file and line."""


class _Locator:
    """Resolves file paths under a root, following links with one `lstat` a file and one a folder."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)
        self.folders: dict[str, str] = {"": self.root}

    def __call__(self, filepath: str) -> Path:
        if len(filepath) > LONGEST_PATH:
            raise _Refused(f"filepath is longer than {LONGEST_PATH} characters, which no path is")
        if "\\" in filepath and not os.path.lexists(f"{self.root}/{filepath}"):
            filepath = filepath.replace("\\", "/")
        if os.path.isabs(filepath) or WINDOWS_DRIVE.match(filepath):
            raise _Refused("filepath is absolute; it must be relative to data.image_root")
        parts = [part for part in filepath.split("/") if part not in ("", ".")]
        if not parts:
            raise _Refused("filepath is empty")
        if ".." in parts:
            raise _Refused(f"filepath {filepath!r} contains '..'; it must stay inside data.image_root")
        resolved = self._step(self._folder("/".join(parts[:-1])), parts[-1])
        if not self._inside(resolved):
            raise _Refused(f"filepath {filepath!r} leaves data.image_root through a link")
        return Path(resolved)

    def _folder(self, relative: str) -> str:
        known = self.folders.get(relative)
        if known is None:
            parent, _, name = relative.rpartition("/")
            known = self.folders[relative] = self._step(self._folder(parent), name)
        return known

    @staticmethod
    def _step(folder: str, name: str) -> str:
        joined = f"{folder}/{name}"
        return os.path.realpath(joined) if os.path.islink(joined) else joined

    def _inside(self, resolved: str) -> bool:
        return resolved.startswith(self.root.rstrip("/") + "/")


def _read_lines(path: Path, what: str) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), 1):
                if len(line) > LONGEST_LINE:
                    raise UserError(f"{path}:{number}: longer than {LONGEST_LINE >> 20} MiB, which no line is ({what})")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file ({what})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}:{number}: not UTF-8 text ({what})") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read: {reason} ({what})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that is given twice, json would drop the first value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Refused(f"{next(key for key in keys if keys.count(key) > 1)!r} is given twice; keep one of them")
    return found


def _parse(line: str, number: int, locate: _Locator, names: list[str] | None, need: Need) -> Sample:
    try:
        row = json.loads(line, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise _Refused(f"not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError):
        raise _Refused("not JSON: a number too long or nesting too deep") from None
    if not isinstance(row, dict):
        raise _Refused('must be a JSON object such as {"id": ..., "filepath": ...}')
    text = row.get("text")
    if need == "text" and (not isinstance(text, str) or not text.strip()):
        raise _Refused("needs a text that is not empty")
    labels = None
    if names is not None and (need == "labels" or row.get("labels") is not None):
        labels = _labels(row.get("labels"), names)
    return Sample(
        id=_key(row, "id"),
        path=locate(_key(row, "filepath")),
        text=text if isinstance(text, str) else None,
        labels=labels,
        patient=None if row.get("patient_id") is None else _key(row, "patient_id"),
        line=number,
    )


def _key(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and key != "filepath":
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise _Refused(f"needs {key!r}, a string that is not empty")
    if UNPRINTABLE.search(value):
        raise _Refused(f"{key!r} holds a control character")
    return value


def _labels(labels: object, names: list[str]) -> tuple[float | None, ...]:
    if isinstance(labels, dict):
        given = {str(name).strip(): value for name, value in labels.items()}
        if len(given) < len(labels):
            raise _Refused("labels name a class twice (names are compared without outer spaces)")
        for name in given.keys() - set(names):
            raise _Refused(unknown_class(name, names))
        labels = [given.get(name) for name in names]
    if not isinstance(labels, list):
        raise _Refused("needs 'labels', a list or an object name → value")
    if len(labels) != len(names):
        raise _Refused(f"labels has {len(labels)} values, the label names are {len(names)}")
    try:
        return tuple(map(LEVELS.__getitem__, labels))
    except (KeyError, TypeError):
        bad = next(_bad_labels(labels, names))
        raise _Refused(f"label of {bad!r} must be 1, 0, -1 or null") from None


def _bad_labels(labels: list[Any], names: list[str]) -> Iterator[str]:
    for label, name in zip(labels, names, strict=True):
        if not isinstance(label, int | float | None) or label not in LEVELS:
            yield name


def unknown_class(name: str, names: Sequence[str]) -> str:
    """One line that says that `name` is no label name, with the nearest one if there is a near one."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"unknown class name {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
