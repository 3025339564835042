"""Images to score: those of a manifest, of a folder, or one file."""

from __future__ import annotations

import os
from pathlib import Path

from ..utils.errors import UserError
from .file_names import is_shadow
from .manifest import Sample, load_manifest

SUFFIXES = {".png", ".jpg", ".jpeg", ".dcm", ".dicom"}


def find_images(source: Path, *, image_root: str | None = None) -> list[Sample]:
    """Samples of a manifest (.jsonl), of a folder (recursively, names as ids), or of one file.

    Args:
        source: manifest, folder or image.
        image_root: for a manifest: folder that `filepath` is relative to; None: see `manifest.image_folder`.

    Raises:
        UserError: nothing there.
    """
    if source.suffix == ".jsonl":
        return load_manifest(source, image_root=image_root, need="image").samples
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.is_file() and _looks_like_image(path, source))
        if not files:
            raise UserError(f"input: {source} holds no images (png, jpg, jpeg, dcm or files without a suffix)")
        return [Sample(id=_printable(path.relative_to(source)), path=path) for path in files]
    if not source.exists():
        raise UserError(f"input: {source}: no such file or folder")
    return [Sample(id=_printable(Path(source.name)), path=source)]


def _looks_like_image(path: Path, source: Path) -> bool:
    """Tell images by suffix; files without one are DICOM if they say so."""
    if is_shadow(path.relative_to(source)):
        return False
    if path.suffix.lower() in SUFFIXES:
        return True
    if path.suffix:
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _printable(path: Path) -> str:
    """A file name as an id: bytes that are not UTF-8 and control characters escaped."""
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
