"""Sections of an English radiology report, by their headings as people write and misspell them.

Headings that the MIMIC-CXR project's own parser lists (its section names and misspellings, in any number of reports)
are known here, with one difference: an impression that is not the radiologist's last word (a clinical, referring or
preliminary one) is none.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from typing import NamedTuple

HEADINGS = (
    # Capitals at the beginning of a line, up to a colon.
    re.compile(r"^[^\S\n]*([A-Z][A-Z0-9 /&,()'#-]*?)[^\S\n]*:", re.MULTILINE),
    # Few words in any case at the beginning of a line, up to a colon; only of impressions.
    re.compile(r"^[^\S\n]*((?:[A-Za-z]+(?: |/ ?)){0,2}[A-Za-z]{8,13})[^\S\n]*:", re.MULTILINE),
    # Capitals at the beginning of a line, without a colon; only of impressions.
    re.compile(r"^[^\S\n]*((?:FINAL )?[A-Z]{8,13})(?=[^\S\n]*(?:[.;-]|–|$)|[^\S\n]+\S)[.;–-]?", re.MULTILINE),
    # Capitals up to a colon within a line; only of sections that no sentence names in capitals.
    re.compile(r"\b((?:[A-Z][A-Z'/-]* ){0,3}[A-Z]{7,14}):"),
)
# Other headings, such as "CHEST:", stand inside a section.
SECTIONS = re.compile(
    "ADDENDUM|CLINICAL|COMMENT|COMMUNICATION|COMPARISON|CONCLUSION|DATE|EXAM|FINDING|HISTORY|IMPRESSION|INDICATION"
    "|NOTIFICATION|PROCEDURE|READ|REASON|RECOMMENDATION|REPORT|STUDY|TECHNIQUE|VIEWS"
)
INLINE = {"IMPRESSION", "IMPRESSIONS", "CONCLUSION", "CONCLUSIONS", "FINDINGS", "NOTIFICATION"}
NAMES = sorted({*INLINE, "COMPARISON", "EXAMINATION", "INDICATION", "RECOMMENDATION", "TECHNIQUE"})
WANTED = {"IMPRESSION", "IMPRESSIONS", "CONCLUSION", "CONCLUSIONS"}
BESIDE = set(NAMES) | {"AND", "OR", "CHEST", "CXR", "DIAGNOSIS", "FINAL", "FINDING", "OVERALL", "REVISED", "SUMMARY"}
BESIDE |= {"RADIOGRAPHIC", "RADIOLOGIC", "RADIOLOGICAL", "RADIOLOGIST", "RECOMMENDATIONS"}
"""words that a heading may hold beside one of WANTED; with others, such as CLINICAL, it is someone else's"""
ALIKE = 0.87
"""share of common letters from which a word is a misspelt heading: IMPRESION and IMPERSSION, but not COMPRESSION"""


class Section(NamedTuple):
    """A section of a report."""

    words: tuple[str, ...]
    """words of its heading, in capitals, misspelt ones as they should be"""
    text: str

    @property
    def names_impression(self) -> bool:
        """Its heading calls it an impression or a conclusion, whosever."""
        return not WANTED.isdisjoint(self.words)

    @property
    def is_impression(self) -> bool:
        """It is the radiologist's impression or conclusion."""
        return self.names_impression and set(self.words) <= WANTED | BESIDE


def sections(report: str) -> list[Section]:
    """Sections of a report in their order, less what stands before the first heading."""
    found: dict[int, tuple[int, tuple[str, ...]]] = {}  # where the heading ends → where it begins, its words
    for number, pattern in enumerate(HEADINGS):
        for match in pattern.finditer(report):
            words = _words(match[1].upper())
            section = Section(words, "")
            if number == 0:
                counts = bool(SECTIONS.search(" ".join(words))) or section.is_impression
            elif number == 3:
                counts = not INLINE.isdisjoint(words[-1:])
            else:
                counts = section.is_impression
            if counts and match.end() not in found:
                found[match.end()] = (match.start(), words)
    ends = sorted(found)
    starts = [found[end][0] for end in ends[1:]] + [len(report)]
    return [
        Section(found[end][1], report[end:start]) for end, start in zip(ends, starts, strict=False)
    ]  # no heading: one start more


@cache
def _words(heading: str) -> tuple[str, ...]:
    """Words of a heading, less marks of redaction and single letters."""
    words = (word for word in re.findall("[A-Z]{2,}", heading) if word.strip("X"))
    return tuple("IMPRESSION" if word == "IMP" else _spelled(word) for word in words)


def _spelled(word: str) -> str:
    """The name of a section that a word misspells; other words as they are."""
    return next(iter(difflib.get_close_matches(word, NAMES, n=1, cutoff=ALIKE)), word)
