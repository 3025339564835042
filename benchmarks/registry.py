"""All that can be measured, by name: operators, whole steps, loaders."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch

from .harness import Case, Sizes
from .machine import DTYPES
from .operator_case import OperatorCase
from .operators import OPERATORS

DIRECTIONS = ("forward", "backward", "both")


@dataclass(frozen=True)
class Entry:
    """Something that can be measured.

    Attributes:
        group: part of the results that it belongs to.
        letters: letter → default size.
        impls: implementations, the literal one first.
        make: (sizes, dtype, device) → case.
        slow_to_compile: on a CPU.
    """

    group: str
    letters: Mapping[str, int]
    impls: tuple[str, ...]
    make: Callable[[Sizes, str, torch.device], Case]
    directions: tuple[str, ...] = ("both",)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    slow_to_compile: bool = False

    def mistake(self, sizes: Sizes) -> str | None:
        """What is wrong with sizes, in a few words."""
        least = {"C": 2, "layers": 2, "batches": 2, "workers": 0}
        for letter, size in sizes.items():
            if size < least.get(letter, 1):
                return f"{letter}={size} is below {least.get(letter, 1)}"
        for width in ("W", "H"):
            if "heads" in sizes and sizes.get(width, 0) % sizes.heads:
                return f"{sizes.heads} heads do not divide {width}={sizes[width]}"
        if self.group != "loaders" and sizes.get("n", 0) > 37:
            return f"n={sizes.n}: two prompts do not fit into 77 tokens; 37 is the most"
        return None


def _operator(name: str, sizes: Sizes, dtype: str, device: torch.device) -> Case:
    return OperatorCase(OPERATORS[name], sizes, DTYPES[dtype], device)


@cache
def registry() -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries by name; and modules that are left out, with the name of the package that they miss.

    Operators need torch, triton and numpy, the others what the engine needs.
    """
    impls = ("reference", "repaired", "eager", "compiled", "triton")
    entries = {
        name: Entry(
            "operators",
            operator.letters,
            impls,
            partial(_operator, name),
            DIRECTIONS,
            slow_to_compile=operator.slow_to_compile,
        )
        for name, operator in OPERATORS.items()
    }
    missing = {}
    for module in ("steps", "loaders"):
        try:
            entries |= importlib.import_module(f".{module}", __package__).ENTRIES
        except ModuleNotFoundError as error:
            missing[module] = error.name or str(error)
    return entries, missing
