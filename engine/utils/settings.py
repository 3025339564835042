"""Settings as Python has them: an instance, names and values, or a YAML file, checked as on the command line."""

from __future__ import annotations

import dataclasses
import os
from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from .errors import UserError
from .impossible import refuse_impossible
from .packaged import find_file, near_names
from .parser_messages import meant, parser_message
from .yaml_text import bounded, read_yaml
from .yaml_words import as_written

T = TypeVar("T")

YAML = as_written(get_loader("yaml"))
set_loader("yaml", bounded(YAML), exceptions=(yaml.YAMLError,))
set_parsing_settings(docstring_parse_attribute_docstrings=True, add_print_completion_argument=True)


def as_settings(kind: type[T], given: T | Mapping[str, Any] | str | Path | None = None, **more: Any) -> T:
    """Settings of a command as its typed dataclass.

    Args:
        kind: the dataclass.
        given: an instance; names and values, nested or with dotted names; the path of a YAML file, found as on the
            command line; None: defaults.
        more: settings that come on top. A group is a mapping or an instance.

    Raises:
        UserError: unknown name, wrong type, unreadable file; one line.
    """
    if isinstance(given, kind) and not more:
        return given
    parser, file, values = _parser(kind), None, nested(more)
    try:
        base = parser.get_defaults()
        if isinstance(given, str | os.PathLike):
            file = find_file(str(given))
            if file is None:
                raise UserError(f"config: {given}: no such file{near_names(str(given))}")
            read_yaml(Path(file), YAML, "config")  # its errors name the file
            base = parser.parse_args(["--config", file])
        elif given is not None:
            values = _merged(nested(_mapping(given)), values)
        _check_names(kind, values, [action.dest for action in parser._actions])
        found = parser.parse_object(values, cfg_base=base)
        found.pop("config", None)
        refuse_null(kind, found)
        settings = plain_numbers(kind(**vars(parser.instantiate(found))))
    except ArgumentError as error:
        keys = [action.dest for action in parser._actions]
        raise UserError(parser_message(error, (), keys, file)) from None
    if hasattr(settings, "find_files"):
        settings.find_files([] if file is None else [Path(file).parent])
    return settings


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with groups for dotted names, mappings for instances and texts for paths."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if (dataclasses.is_dataclass(value) and not isinstance(value, type)) or isinstance(value, Mapping):
            value = nested(_mapping(value))
        elif isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif isinstance(value, list | tuple):
            value = [os.fspath(one) if isinstance(one, os.PathLike) else one for one in value]
        for part in reversed(str(name).split(".")[1:]):
            value = {part: value}
        found = _merged(found, {str(name).split(".")[0]: value})
    return found


def refuse_null(settings: type, values: Any, prefix: str = "") -> None:
    """Refuse null where the type of a setting excludes it: the parser lets it pass for every type.

    Raises:
        UserError: naming the setting.
    """
    for field in dataclasses.fields(settings):
        value = values[field.name]
        if dataclasses.is_dataclass(field.default_factory):
            refuse_null(field.default_factory, value, f"{prefix}{field.name}.")
        elif value is None and "None" not in str(field.type):
            raise UserError(f"{prefix}{field.name}: must not be null")


def plain_numbers(settings: Any) -> Any:
    """The settings with int and float in place of the parser's numbers of a limited range, which YAML cannot write.

    Raises:
        UserError: a value that no setting can have, see `impossible.py`.
    """
    refuse_impossible(settings)
    return _plain(settings)


def _plain(settings: Any) -> Any:
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            _plain(value)
        for kind in (int, float):
            if isinstance(value, kind) and type(value) not in (int, float, bool):
                setattr(settings, field.name, kind(value))
    return settings


def _parser(kind: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(kind)
    return parser


def _check_names(kind: type, values: Mapping[str, Any], known: list[str], prefix: str = "") -> None:
    """Refuse unknown names, and values in place of groups.

    Raises:
        UserError: naming the setting.
    """
    groups = {field.name: field.default_factory for field in dataclasses.fields(kind)}
    for name, value in values.items():
        if name not in groups:
            raise UserError(f"there is no setting {prefix}{name}{meant(prefix + name, known)}")
        group = groups[name]
        if dataclasses.is_dataclass(group) and isinstance(group, type):
            if not isinstance(value, Mapping):
                raise UserError(f"{prefix}{name}: is a group of settings, got {value!r}")
            _check_names(group, value, known, f"{prefix}{name}.")


def _mapping(value: Any) -> Mapping[str, Any]:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if not isinstance(value, Mapping):
        raise UserError(
            f"config: must be settings, a dictionary or the path of a YAML file, got {type(value).__name__}"
        )
    return value


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested dictionaries as one; the second wins."""
    found = dict(one)
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _merged(found[key], value) if both else value
    return found
