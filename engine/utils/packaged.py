"""The configurations and launch scripts that come with the engine, found from any folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
"""beside the engine's own folder, in a checkout as in an installation"""
SUFFIXES = (".yaml", ".json", ".py", ".sh")


def packaged_names() -> list[str]:
    """Names of the packaged files, relative to `CONFIGS`, such as studies/table1.yaml; sorted."""
    files = (path for path in CONFIGS.rglob("*") if path.suffix in SUFFIXES)
    return sorted(path.relative_to(CONFIGS).as_posix() for path in files)


def find_file(name: str, folders: Iterable[Path] = ()) -> str | None:
    """Path of a file or folder: as given, else in one of `folders`, else packaged; None: nowhere.

    A packaged file is found by its name below `configs/`, with or without that folder, or by its last part where only
    one has it.
    """
    if os.path.exists(name):
        return name
    beside = next((path for folder in folders if os.path.exists(path := os.path.join(folder, name))), None)
    if beside is not None:
        return beside
    names, wanted = packaged_names(), name.removeprefix("configs/")
    if wanted not in names:
        named = [other for other in names if PurePosixPath(other).name == wanted]
        if len(named) != 1:
            return None
        wanted = named[0]
    return str(CONFIGS / wanted)


def located(name: str | None, folders: Iterable[Path], suffix: str = "") -> str | None:
    """What `find_file` finds for a name that ends in `suffix`; anything else, and what is nowhere, as it is."""
    return (find_file(name, folders) or name) if name and name.endswith(suffix) else name


def near_names(name: str) -> str:
    """The packaged files nearest to a missing one, to stand after "no such file"; empty: none is near."""
    wanted = PurePosixPath(name)
    stems = {other: PurePosixPath(other).stem for other in packaged_names() if other.endswith(wanted.suffix)}
    close = get_close_matches(wanted.stem, set(stems.values()), 3, 0.6)
    near = [other for stem in close for other in stems if stems[other] == stem]
    return f"; packaged with a like name: {', '.join(near[:4])}" if near else ""
