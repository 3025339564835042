"""Tensors of a TorchScript archive, read as data.

`torch.jit.load` runs what an archive holds: the `__setstate__` of its classes, which can write files. The tensors are
plain bytes beside a pickle that names them, so they can be had without running anything
(torch/csrc/jit/docs/serialization.md).
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST_TENSORS = 100_000
DEEPEST = 100
"""modules within modules"""
LARGEST_PICKLE = 64 * 2**20
"""bytes"""
LARGEST_SOURCE = 64 * 2**20
"""bytes"""

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_MEMBERS = re.compile(r"^  (?:__parameters__|__buffers__) = \[(.*)\]$", re.MULTILINE)


class NotPlain(Exception):
    """The archive holds more than modules of tensors; the message says what."""


def is_torchscript(path: Path) -> bool:
    """True for a zip archive with TorchScript's table of constants."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def check_stored(path: Path) -> None:
    """Refuse a zip archive that unpacks to more than it weighs; torch compresses nothing but source code.

    Raises:
        NotPlain: tensors or pickles are compressed, or there is too much source code.
    """
    with zipfile.ZipFile(path) as archive:
        compressed = [record for record in archive.infolist() if record.compress_type != zipfile.ZIP_STORED]
        stored = sum(r.file_size for r in archive.infolist() if r.compress_type == zipfile.ZIP_STORED)
    if any("/code/" not in record.filename for record in compressed) or stored > path.stat().st_size:
        raise NotPlain("its tensors are compressed, which torch never does")
    if sum(record.file_size for record in compressed) > LARGEST_SOURCE:
        raise NotPlain("its source code is larger than any model's")


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by dotted name, as `torch.jit.load(path).state_dict()` has them, on the CPU.

    Raises:
        NotPlain: classes that build themselves (`__setstate__`), other objects, or cycles of modules.
        Exception: whatever a damaged archive makes its parsers raise.
    """
    check_stored(path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (pickled,) = (name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name))
        if archive.getinfo(pickled).file_size > LARGEST_PICKLE:
            raise NotPlain("its data.pkl is larger than any model's")
        root = pickled.removesuffix("data.pkl")
        module = _Reader(archive, root).load()
        if not isinstance(module, _Module):
            raise NotPlain("it holds no module")
        members = {_qualname(name, root): _members(archive, name) for name in names if name.endswith(".py")}
        state: dict[str, Tensor] = {}
        for name, tensor in _walk(module, "", members, 0):
            if len(state) == MOST_TENSORS:
                raise NotPlain(f"it has more than {MOST_TENSORS} tensors")
            state[name] = tensor
        return state


class _Module:
    """Stands for any class of the archive: its attributes, and nothing that runs."""

    qualname = ""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise NotPlain("it holds code that builds its modules (__setstate__)")
        self.attributes = state


class _Reader(pickle._Unpickler):
    """The pickle of an archive. In Python, not in C: that one reserves memory for any number the pickle names."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return type("_Module", (_Module,), {"qualname": f"{module}.{name}"})
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch.jit._pickle", "restore_type_tag"): _first,
            **{("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")},
        }
        if (module, name) not in known:
            raise NotPlain(f"it holds an object of {module}.{name}")
        return known[module, name]

    def persistent_load(self, saved: Any) -> Tensor:
        _, dtype, key, _, _ = saved
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._root}data/{key}"))
            self._storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)


def _first(value: Any, *_: Any) -> Any:
    return value


def _qualname(file: str, root: str) -> str:
    """Dotted name of the module that a source file holds."""
    return file.removeprefix(f"{root}code/").removesuffix(".py").replace("/", ".")


def _members(archive: zipfile.ZipFile, file: str) -> dict[str, set[str]]:
    """Class name → its parameters and buffers, as the source says them; it is not run."""
    source = archive.read(file).decode("utf-8")
    found: dict[str, set[str]] = {}
    for part in re.split(r"^class ", source, flags=re.MULTILINE)[1:]:
        name = re.split(r"\W", part, maxsplit=1)[0]
        found[name] = {member for listing in _MEMBERS.findall(part) for member in re.findall(r'"([^"]*)"', listing)}
    return found


def _walk(
    module: _Module, prefix: str, members: dict[str, dict[str, set[str]]], depth: int
) -> Iterator[tuple[str, Tensor]]:
    if depth > DEEPEST:
        raise NotPlain("its modules hold one another without end")
    package, _, name = module.qualname.rpartition(".")
    own = members.get(package, {}).get(name, set())
    for key, value in module.attributes.items():
        if isinstance(value, Tensor) and key in own:
            yield f"{prefix}{key}", value
        elif isinstance(value, _Module):
            yield from _walk(value, f"{prefix}{key}.", members, depth + 1)
