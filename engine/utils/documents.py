"""JSON documents that may be damaged or hostile: read within bounds, and checked against a schema as a whole.

A schema is a dataclass. Its fields may be bool, int, float, str, None, Literal, `Annotated[int or float, Within(...)]`,
lists, dictionaries with string keys, unions and further dataclasses; a field with a default may be left out, and other
keys of the document are ignored. `Any` takes what it finds.
"""

from __future__ import annotations

import dataclasses
import json
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import UserError

T = TypeVar("T")

LARGEST = 256 * 2**20
"""bytes of a document"""
COUNT = 2**53
"""largest number that every JSON reader keeps"""


@dataclass(frozen=True)
class Within:
    """Bounds of a number, both included; NaN lies in none."""

    low: float
    high: float = COUNT

    def __str__(self) -> str:
        return f"from {self.low:g} to {self.high:g}"


def parse_json(text: str | bytes) -> Any:
    """Value of a JSON text.

    Raises:
        ValueError: not JSON, NaN or infinite, nested too deep, or a number too long; the message is one line.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}: line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError as error:
        raise ValueError("a number is too long" if "digits" in str(error) else str(error)) from None


def read_json(path: Path, key: str = "") -> Any:
    """Value of a JSON file; `key` is the setting that names it, for messages.

    Raises:
        UserError: missing, too large, or see `parse_json`.
    """
    where = f"{key}: {path}" if key else f"{path}"
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{where}: larger than {LARGEST >> 20} MiB, which no such file is")
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{where}: not readable as JSON ({error})") from None


def as_schema(schema: type[T], value: Any) -> T:
    """A document as an instance of a schema, which may also be one of the types that its fields may have.

    Raises:
        ValueError: naming the first key that does not fit and what it must be.
    """
    found: T = _convert(value, schema, "")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")


def _convert(value: Any, hint: Any, key: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return _number(value, arguments[0], arguments[1], key)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise ValueError(f"{_of(key)} must be one of {', '.join(map(str, arguments))}")
        return value
    if origin in (Union, types.UnionType):
        return _one_of(value, arguments, key)
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(f"{_of(key)} must be a list")
        return [_convert(one, arguments[0], f"{key}[{number}]") for number, one in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{_of(key)} must be an object")
        return {name: _convert(one, arguments[1], f"{key}.{name}") for name, one in value.items()}
    if dataclasses.is_dataclass(hint):
        return _instance(value, hint, key)
    if isinstance(hint, type) and issubclass(hint, int | float) and hint is not bool:
        return _restricted(value, hint, key)
    if not isinstance(value, type(None) if hint is None else hint):
        raise ValueError(f"{_of(key)} must be {_NAMES.get(hint, 'null')}")
    return value


_NAMES = {str: "a text", bool: "true or false", dict: "an object", list: "a list"}


def _number(value: Any, kind: type, within: Within, key: str) -> Any:
    kinds = int if kind is int else (int, float)
    whole = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, kinds) or not within.low <= value <= within.high:
        raise ValueError(f"{_of(key)} must be {whole} {within}")
    return kind(value)


def _restricted(value: Any, hint: type, key: str) -> Any:
    """int, float, or a class of them that refuses some numbers with ValueError."""
    kind = int if issubclass(hint, int) else float
    number = _number(value, kind, Within(-COUNT), key)
    try:
        hint(number)
    except ValueError:
        raise ValueError(f"{_of(key)} is out of its range, {value}") from None
    return number


def _one_of(value: Any, hints: tuple[Any, ...], key: str) -> Any:
    reasons = []
    for hint in hints:
        try:
            return _convert(value, hint, key)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(reasons[0])


def _instance(value: Any, schema: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{_of(key)} must be an object")
    hints = get_type_hints(schema, include_extras=True)
    values = {}
    for field in dataclasses.fields(schema):
        name = f"{key}.{field.name}" if key else field.name
        if field.name in value:
            values[field.name] = _convert(value[field.name], hints[field.name], name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{name} is missing")
    return schema(**values)


def _of(key: str) -> str:
    return key or "it"
