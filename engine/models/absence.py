"""Classes that are themselves an absence, such as No Finding: what they say is absent."""

from __future__ import annotations

import re

ABNORMALITY = "abnormality"
WHOLE = {
    **dict.fromkeys(("no finding", "no findings", "no abnormality", "no abnormalities", "normal"), ABNORMALITY),
    **dict.fromkeys(("healthy", "negative", "unremarkable", "within normal limits"), ABNORMALITY),
    **dict.fromkeys(("unchanged", "stable", "no change", "no interval change"), "change"),
}
"""names, compared without case, underscores and doubled spaces"""
BEGINNINGS = re.compile(
    r"(?:no (?:evidence|sign|signs) of|no|without|absence of|absent|free of|negative for) (.+)", re.I
)
NORMAL = re.compile(r"(?:normal|unremarkable) (.+)", re.I)


def absent(name: str) -> str | None:
    """What a class says is absent: abnormality of No Finding and normal, edema of no edema; None: it is a finding."""
    plain = " ".join(name.replace("_", " ").split())
    if (found := WHOLE.get(plain.casefold())) is not None:
        return found
    if match := BEGINNINGS.fullmatch(plain):
        return match[1]
    if match := NORMAL.fullmatch(plain):
        return f"abnormal {match[1]}"
    return None
