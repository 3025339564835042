"""Values that no setting can have, and that the parser's types let pass: numbers without end, texts with a NUL."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from .errors import UserError

LARGEST = 2**63
"""above every whole number that torch and NumPy take"""


def refuse_impossible(value: Any, key: str = "") -> None:
    """Refuse a setting that is, or holds at any depth, such a value; `key` is its dotted name.

    Raises:
        UserError: infinite or NaN; a whole number of more than 64 bits; a text with a NUL, which no path or name holds.
    """
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for name, one in value.items():
            refuse_impossible(one, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for one in value:
            refuse_impossible(one, key)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}: must be a finite number, got {float(value)}")
    elif isinstance(value, int) and not -LARGEST <= value < LARGEST:
        raise UserError(f"{key}: must be a number below 2^63, got one of {value.bit_length()} bits")
    elif isinstance(value, str) and "\0" in value:
        raise UserError(f"{key}: holds a NUL character; take it out")
