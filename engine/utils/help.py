"""How --help shows a setting."""

from __future__ import annotations

import re
from argparse import Action

from jsonargparse import DefaultHelpFormatter

RANGES = {
    "PositiveInt": "int > 0",
    "NonNegativeInt": "int ≥ 0",
    "PositiveFloat": "float > 0",
    "NonNegativeFloat": "float ≥ 0",
    "ClosedUnitInterval": "float from 0 to 1",
    "FractionBelowOne": "float from 0 to below 1",
    "BitDepth": "int from 8 to 16",
    "Seed": "int ≥ 0",
}
"""numbers within a range, as people write them"""


class SettingsHelp(DefaultHelpFormatter):
    """Shows no empty default, and types as people write them."""

    def _expand_help(self, action: Action) -> str:
        text = str(super()._expand_help(action)).replace(", default: )", ", no default)")
        text = re.sub(r"(?<=, default: )(?:True|False)(?=\)$)", lambda found: found[0].lower(), text)
        return re.sub(r"(?<=\(type: ).*(?=, (?:default: .*|no default)\)$)", lambda found: plain_type(found[0]), text)


def plain_type(text: str) -> str:
    """A type of Python as alternatives: Optional[Literal['a', 'b']] is {a, b} | null."""
    if found := re.fullmatch(r"Optional\[(.*)\]", text):
        return f"{plain_type(found[1])} | null"
    if found := re.fullmatch(r"Union\[(.*)\]", text):
        return " | ".join(map(plain_type, _parts(found[1])))
    if found := re.fullmatch(r"Literal\[([^\[\]]*)\]", text):
        return "{" + found[1].replace("'", "") + "}"
    if found := re.fullmatch(r"(\w+)\[(.*)\]", text):
        return f"{found[1]}[{', '.join(map(plain_type, _parts(found[2])))}]"
    return re.sub(r"\w+", lambda found: RANGES.get(found[0], found[0]), text)


def _parts(text: str) -> list[str]:
    """What commas outside of brackets separate."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
