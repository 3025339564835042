"""From a radiology report to the text of phase 1: its impression, without physicians and view positions.

Paper, appendix A.1: report texts were trimmed to the fields IMPRESSION or CONCLUSION, and physician identifiers and
sequences of view positions omitted. The words that follow are this engine's reading of that sentence, for English reports
as in MIMIC-CXR (redacted with `___`) and OpenI (redacted with `XXXX`). What is redacted is left out, too.
"""

from __future__ import annotations

import re

# A heading is a line's beginning in capitals up to a colon; the wanted two also count in lower case or on a line of their own.
HEADING = re.compile(
    r"^[ \t]*(?:([A-Z][A-Z0-9 /&,()'-]*?)[ \t]*:|((?:FINAL )?(?:IMPRESSION|CONCLUSION)S?)[ \t]*$"
    r"|([Ii]mpression|[Cc]onclusion)s?[ \t]*:)",
    re.MULTILINE,
)
WANTED = re.compile("IMPRESSION|CONCLUSION", re.IGNORECASE)
# Other headings, such as "CHEST:", stand inside a section.
SECTIONS = re.compile(
    "ADDENDUM|CLINICAL|COMMENT|COMMUNICATION|COMPARISON|CONCLUSION|DATE|EXAM|FINDING|HISTORY|IMPRESSION|INDICATION"
    "|NOTIFICATION|PROCEDURE|READ|REASON|RECOMMENDATION|REPORT|STUDY|TECHNIQUE|VIEWS",
    re.IGNORECASE,
)

REDACTED = r"(?:_{2,}|X{4,})"
VIEW = (
    r"(?:PA|AP|frontal|laterals?|portable|(?:apical )?lordotic|upright|semi-?upright|erect|supine|(?:left |right )?lateral"
    r" decubitus|decubitus|postero-?anterior|antero-?posterior|single|one|two|three|[123]|bedside)"
)
VIEWS = rf"{VIEW}(?:(?:\s*[,/&+-]\s*|\s+and\s+|\s+or\s+|\s+){VIEW})*"
PICTURE = r"(?:views?|projections?|images?|radiographs?|films?|x-?rays?|exam(?:ination)?s?|stud(?:y|ies)|technique)"
OF_CHEST = r"(?:\s+of\s+(?:the\s+)?chest|\s+chest)?"
ALL_VIEWS = rf"{VIEWS}\s+(?:chest\s+)?{PICTURE}{OF_CHEST}"

ABBREVIATIONS = [
    (re.compile(r"\b(Drs?|vs|approx|Mrs?|Ms)\.", re.IGNORECASE), r"\1"),
    (re.compile(r"\b([ap])\.m\.?", re.IGNORECASE), r"\1m"),
    (re.compile(r"\bM\.\s?D\b\.?"), "MD"),
    (re.compile(r"\bx-X{4,}", re.IGNORECASE), "x-ray"),
]
UNPOINTED = re.compile(r"(?<![.!?:;,\s])\s*\n\s*(?=\(?\d{1,2}[.)]\s)")
NUMBER = re.compile(r"(^|[.!?:;]|\n)\s*\(?\d{1,2}[.)]\s*(?=[A-Z(])")
SENTENCE = re.compile(r"(?<=[.!?])\s+")

# Sentences that name a physician or tell who was told what, or that only name the views.
PERSON = re.compile(
    r"\b(?:Drs?|MD|physicians?|radiologists?|clinicians?|residents?|attending|house ?(?:officer|staff)|nurses?|RN"
    r"|technologists?|(?:referring|ordering|covering|primary|surgical|ICU|clinical) (?:team|service|provider)s?)\b"
)
TOLD = re.compile(
    r"\b(?:discussed(?! (?:above|below|in))|discuss this|notif(?:y|ied|ication)|communicated|telephoned?|by phone|paged"
    r"|pager|conveyed|relayed|informed|(?:was|were|been) (?:called|recalled|reported|alerted)|being recalled|acknowledged"
    r"|read ?back|dictated|transcribed|electronically signed|dashboard|wet read|Veriphy|Primordial"
    r"|thank(?:s| you)|any questions|opportunity to (?:assist|participate)|time of (?:discovery|observation))\b",
    re.IGNORECASE,
)
ONLY_VIEWS = re.compile(
    rf"^(?:(?:chest|technique|exam|the|an?|there (?:is|are)|limited)\s+)*(?:{ALL_VIEWS}|{VIEWS}\s+chest|{VIEWS})"
    r"(?:\s+(?:is|are|was|were))?(?:\s+(?:obtained|submitted|provided|performed|reviewed|available|presented))?\W*$",
    re.IGNORECASE,
)
ONLY_COMPARISON = re.compile(rf"^(?:comparison|compared)\b[\s\w:]{{0,40}}?{REDACTED}[\W_X]*$", re.IGNORECASE)

OMITTED = [
    # "PA and lateral views of the chest show …"
    re.compile(rf"^{ALL_VIEWS}\s+(?:again\s+)?(?:shows?|demonstrates?|reveals?)\s+", re.IGNORECASE),
    # "… on the lateral view"
    re.compile(
        rf",?\s*\b(?:only\s+)?(?:on|in|from)\s+(?:the\s+|this\s+|an?\s+|today's\s+)?(?:recent\s+)?{ALL_VIEWS}(?:\s+only)?\b",
        re.IGNORECASE,
    ),
    # "… compared to the prior study from XXXX", "… since XXXX", "… on XXXX at XXXX"
    re.compile(
        r",?\s*\b(?:(?:as\s+|when\s+)?(?:compared|comparison)\s+(?:to|with)|(?:as\s+)?compared\s+to)\s+(?:the\s+|a\s+)?"
        rf"(?:prior\s+|previous\s+)?(?:{PICTURE}\s+)?(?:(?:from|of|dated|on|performed)\s+)*{REDACTED}(?:[\s,/]+{REDACTED})*",
        re.IGNORECASE,
    ),
    re.compile(
        rf",?\s*\b(?:since|dated|from|on|at|of|by|in)\s+(?:the\s+)?{REDACTED}(?:[\s,/]+{REDACTED})*(?=\s*(?:[.,;)]|$))",
        re.IGNORECASE,
    ),
    # dates and times
    re.compile(r",?\s*\b(?:(?:on|from|dated|since|at)\s+)?\d{1,2}[/-]\d{1,2}[/-](?:\d{4}|\d\d)\b", re.IGNORECASE),
    re.compile(r",?\s*\b(?:at\s+)?\d{1,2}:\d\d(?:\s*[ap]m)?\b", re.IGNORECASE),
    re.compile(rf"(?:\b\w-)?{REDACTED}(?:/{REDACTED})*"),
    re.compile(r"\[?<|>\]?"),
]
TIDY = [
    (re.compile(r"\(\s*\)"), ""),
    (re.compile(r"\s+"), " "),
    (re.compile(r"\s+([.,;:!?)])"), r"\1"),
    (re.compile(r"([,;:])(?:\s*[,;:])+"), r"\1"),
    (re.compile(r"[,;:]+\s*\.|\.(?:\s*\.)+"), "."),
]


def impression(report: str) -> str | None:
    """The last impression (or conclusion) of a report, cleaned; None: it has none, or nothing is left of it.

    Args:
        report: the whole report, with headings such as `IMPRESSION:` at the beginning of lines.
    """
    headings = [match for match in HEADING.finditer(report) if SECTIONS.search(match[0])]
    ends = [match.start() for match in headings[1:]] + [len(report)]
    for heading, end in reversed(list(zip(headings, ends, strict=True))):
        if WANTED.search(heading[0]) and (text := clean(report[heading.end() : end])):
            return text
    return None


def clean(text: str) -> str:
    """A section of a report on one line, less list numbers, physicians, who was told, view positions, dates and gaps."""
    for pattern, plain in ABBREVIATIONS:
        text = pattern.sub(plain, text)
    text = NUMBER.sub(r"\1 ", UNPOINTED.sub(". ", text.strip()))
    sentences = (_clean_sentence(" ".join(sentence.split())) for sentence in SENTENCE.split(text))
    return " ".join(sentence for sentence in sentences if re.search("[A-Za-z]{2}", sentence))


def _clean_sentence(sentence: str) -> str:
    if any(pattern.search(sentence) for pattern in (PERSON, TOLD, ONLY_VIEWS, ONLY_COMPARISON)):
        return ""
    for pattern in OMITTED:
        sentence = pattern.sub(" ", sentence)
    for pattern, tidy in TIDY:
        sentence = pattern.sub(tidy, sentence)
    sentence = sentence.strip(" ,;:-")
    return sentence[:1].upper() + sentence[1:]
