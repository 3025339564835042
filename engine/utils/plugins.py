"""Modules of the user's own, imported because the user names them; a checkpoint's are never imported by themselves."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from .errors import UserError


def load_plugins(names: str | Sequence[str]) -> None:
    """Import modules, each once, so that what they register can be chosen.

    Args:
        names: modules, such as `my_module`, found where Python finds modules and in the current folder, or files, such
            as `code/my_module.py`; one or a list.

    Raises:
        UserError: there is no such module, or an error in it; one line with the file's line.
    """
    for name in [names] if isinstance(names, str) else names:
        _load_file(name) if name.endswith(".py") else _load_module(name)


def missing_plugins(names: Iterable[str] | None) -> list[str]:
    """Those of the names that no module of this process has."""
    return [name for name in names or () if name not in sys.modules]


def _load_module(name: str) -> None:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last: nothing in this folder takes the place of another module
    importlib.invalidate_caches()
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _located(name, error) from error
        near = get_close_matches(name, [file.stem for file in Path().glob("*.py")], 1, 0.6)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"plugins: there is no module {name}, also not in {here}{meant}") from None
    except (Exception, SystemExit) as error:
        raise _located(name, error) from error


def _load_file(name: str) -> None:
    path = Path(name)
    if not path.is_file():
        raise UserError(f"plugins: {name}: no such file")
    module = path.stem
    held = sys.modules.get(module)
    if held is not None:
        if Path(getattr(held, "__file__", None) or "").resolve() == path.resolve():
            return
        raise UserError(f"plugins: {name}: there is another module {module}; give the file another name")
    spec = importlib.util.spec_from_file_location(module, path.resolve())
    if spec is None or spec.loader is None:
        raise UserError(f"plugins: {name}: is no Python file")
    sys.modules[module] = loaded = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(loaded)
    except (Exception, SystemExit) as error:
        del sys.modules[module]
        raise _located(name, error) from error


def _located(name: str, error: BaseException) -> UserError:
    """One line: the innermost line outside Python's own import that the error passed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    frames = [frame for frame in frames if frame.filename != __file__]
    place = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}:{error.lineno}: "
    return UserError(f"plugins: {name}: {place}{' '.join(f'{type(error).__name__}: {error}'.split())}")
