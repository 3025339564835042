"""What the settings' parser refuses, as one line that names the key or the file and, where it can, the right name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches


def parser_message(
    error: Exception,
    commands: Iterable[str],
    keys: Iterable[str],
    file: str | None = None,
    renamed: Mapping[str, str] | None = None,
) -> str:
    """Message of a parser error in one line.

    Args:
        commands: names that could have been meant for a command.
        keys: dotted names of the settings that the command has.
        file: the YAML file that was given.
        renamed: earlier names of settings → their names.
    """
    text = str(error)
    key = found[1] if (found := re.search(r'[Pp]arser key "([^"]+)"', text)) else None
    for message in (
        _about_a_command(text, commands),
        _about_a_file(text, key, file),
        _unknown_key(text, keys, file, renamed or {}),
    ):
        if message:
            return message
    return _about_a_value(text, key) if key else " ".join(text.split())


def plain_range(message: str, value: object) -> str:
    """The parser's message about a number that its type excludes, in plain words."""
    found = re.search(r"does not conform to restriction (.*)", message)
    if not found:
        return f"must be a number, got {value}"
    limits = re.sub(r"v([<>]=?)", r"\1 ", found[1])
    return f"must be {limits}, got {value}"


def meant(name: str, names: Iterable[str]) -> str:
    """A question after the known names nearest to an unknown one, also by their last part; empty: none is near."""
    known = list(dict.fromkeys(names))
    ends = {other: re.split(r"[. ]", other)[-1] for other in known}
    last = re.split(r"[. ]", name)[-1]
    near = [other for other in known if ends[other] == last]
    near = near or get_close_matches(name, known, 2, 0.75)
    near = near or [
        other for end in get_close_matches(last, ends.values(), 1, 0.75) for other in known if ends[other] == end
    ]
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def _about_a_command(text: str, commands: Iterable[str]) -> str | None:
    if "but it was not provided" in text:
        group = re.match(r'expected "(.*)\.command"', text)
        words = [name.split(" ")[1] for name in commands if group and name.startswith(f"{group[1]} ")]
        return f"give a command{', one of ' + ', '.join(words) if words else ''}; --help lists them"
    found = re.search(r"argument command: invalid choice: '(.*)' \(choose from (.*)\)", text, re.DOTALL)
    if not found:
        return None
    here = found[2].replace("'", "")
    near = meant(found[1], [*here.split(", "), *commands])
    return f"there is no command {found[1]!r}{near or f'; choose from {here}'}"


def _about_a_file(text: str, key: str | None, file: str | None) -> str | None:
    if key == "config" and "is not a file" in text:
        return f"config: {file}: is a folder; give a YAML file"
    if twice := re.search(r"line (\d+): (\S+ is given twice; .*)", text):
        return f"config: {file}:{twice[1]}: {twice[2]}" if "parsing config" in text else f"{key}: {twice[2]}"
    if "Problems parsing config" in text:
        place = found[1] if (found := re.search(r"line (\d+), column \d+[^,]*$", text.strip())) else None
        what = next((line.strip() for line in text.splitlines() if re.match(r"\s*(did not|expected|found)", line)), "")
        return f"config: {file}{':' + place if place else ''}: is not YAML{': ' + what if what else ''}"
    if "Unexpected config" in text:
        return f"config: {file}: must hold settings, `key: value` a line"
    return None


def _unknown_key(text: str, keys: Iterable[str], file: str | None, renamed: Mapping[str, str]) -> str | None:
    found = re.search(r"does not accept option '([^']+)'", text)
    if found:
        name = found[1]
        hint = f"; its name is {renamed[name]} now" if name in renamed else meant(name, keys)
        return f"config: {file}: there is no setting {name}{hint}"
    found = re.search(r"unrecognized arguments: (.*)", text, re.DOTALL)
    if not found:
        return None
    name = found[1].split()[0]
    if name.endswith((".yaml", ".yml")):
        return f"{name}: a file of settings stands first, or behind --config"
    if not name.startswith("-"):
        key = "input" if "input" in keys else "KEY"
        return f"{name}: belongs to no setting; give it as --{key} {name}"
    name = name.lstrip("-").split("=")[0]
    if name in renamed:
        return f"there is no setting --{name}; its name is --{renamed[name]} now"
    return f"there is no setting --{name}{meant(name, keys)}"


def _about_a_value(text: str, key: str) -> str:
    """Of the types that a setting may have, what excludes the value."""
    given = found[1] if (found := re.search(r"(?:Given|Got) value: *(.*)", text)) else None
    choice = re.findall(r"Expected a typing\.Literal\[(.*?)\]", text)
    if choice:
        null = ", null" if "NoneType" in text else ""
        return f"{key}: {given!r} is not one of {choice[0].replace(chr(39), '')}{null}"
    refused = re.search(r"Not of type \w+: (.*)", text)
    if refused:
        shown = given or (found[1] or found[2] if (found := re.search(r"^(\S+) does not|'(.*)'$", refused[1])) else "")
        shown = "null" if shown == "NoneType" else shown
        whole = "Int:" in refused[0] and "restriction" not in refused[1]
        return f"{key}: must be a whole number, got {shown}" if whole else f"{key}: {plain_range(refused[1], shown)}"
    if "Unable to load config" in text:
        return f"{key}: is a group of settings; give --{key}.KEY VALUE"
    for pattern, what in MUST_BE.items():
        if re.search(pattern, text):
            return f"{key}: must be {what}, got {'null' if given == 'None' else given or 'nothing'}"
    if found := re.search(r"Expected a dot import path string: (.*)", text):
        return f"{key}: must hold groups of settings, {{KEY: VALUE}}, got {found[1]}"
    if found := re.search(r"Option '(.*)' is not accepted", text):
        return f"{key}: there is no setting {found[1]} in it; see --help"
    return f"{key}: cannot be {given}; --help says what it can" if given else " ".join(text.split())


MUST_BE = {
    r"Expected a <class 'bool'>": "true or false",
    r"Expected a <class 'int'>": "a whole number",
    r"Expected a <class 'float'>": "a number",
    r"Expected a .*dict": "names and values, {NAME: VALUE}",
    r"Expected a <class 'list'>": "a list, [A, B]",
    r"Expected a <class 'str'>": "text",
}
"""what a parser's complaint of a type means, the first that fits"""
