"""The text of phase 1 from a radiology report: its impression, without physicians and view positions.

Paper, appendix A.1: report texts were trimmed to the fields IMPRESSION or CONCLUSION, and physician identifiers and
sequences of view positions omitted. What follows is this engine's reading of that sentence, for English reports as in
MIMIC-CXR (redacted with `___`) and OpenI (redacted with `XXXX`). The marks of redaction are left out, too.
"""

from __future__ import annotations

import re

from .headings import sections

REDACTED = r"(?:_{2,}+|X{4,}+)"
VIEW = (
    r"(?:PA|AP|frontal|laterals?|portable|(?:apical )?lordotic|upright|semi-?upright|erect|supine|bedside"
    r"|(?:(?:left |right )?lateral )?decubitus|postero-?anterior|antero-?posterior|single|one|two|three|[123])"
)
VIEWS = rf"{VIEW}(?:(?:\s*[,/&+-]\s*(?:and\s+)?|\s+and\s+|\s+or\s+|\s+){VIEW})*"
PICTURE = r"(?:views?|projections?|images?|radiographs?|films?|x-?rays?|exam(?:ination)?s?|stud(?:y|ies)|technique)"
ALL_VIEWS = rf"{VIEWS}\s+(?:chest\s+)?{PICTURE}(?:\s+of\s+(?:the\s+)?chest|\s+chest)?"

ABBREVIATIONS = [
    (re.compile(r"\b(Drs?|vs|approx|Mrs?|Ms)\.", re.IGNORECASE), r"\1"),
    (re.compile(r"\b([ap])\.m\.?", re.IGNORECASE), r"\1m"),
    (re.compile(r"\bM\.\s?D\b\.?"), "MD"),
    (re.compile(r"\bx-X{4,}", re.IGNORECASE), "x-ray"),
    (re.compile(r"<br ?/?>", re.IGNORECASE), " "),
]
NUMBER = re.compile(r"(?:(?<=[\s.])|^)\(?(\d{1,2})[.)],?\s*(?=[A-Z(])")
# What a number belongs to that ends a sentence, "sarcoidosis stage 1." or "ribs 7 and 8."; a list goes on without.
COUNTED = re.compile(
    r"(?:\b(?:stage|grade|types?|class|categor(?:y|ies)|levels?|zones?|segments?|ribs?|vertebra[el]?|number|no|days?|POD"
    r"|leads?|phase|group|series|images?|scores?|rads|NYHA|ASA|WHO|factor|index|ratio|gauge|size|tubes?|drains?|lines?"
    r"|x|of|to|at|than|about|approximately|least|most|is|was|are|and|or|by|from|in|with|per|between|only|all"
    r"|lumbar|thoracic|cervical|[TLCS])|[#=/+<>-])\s*$",
    re.IGNORECASE,
)
ENDED = ("", ".", ":", ";", "?", "!")
SENTENCE = re.compile(r"(?<=[.!?])\s+")

ASIDES = [
    # "PA and lateral chest compared to ___, 4:30 am:"
    re.compile(rf"^(?:{ALL_VIEWS}|{VIEWS}\s+chest)[^.]{{0,80}}?:(?:\s+|$)", re.IGNORECASE),
    # "After review with the attending radiologist, …"
    re.compile(r"^after (?:further )?review with [^,.]*(?:radiologist|attending|physician)s?\b,?\s*", re.IGNORECASE),
    # "…, as discussed with Dr ___"
    re.compile(
        r",?\s*\b(?:as|(?:which|and this|and these|this) (?:was|were))\s+(?:discussed with|communicated|reported to"
        r"|conveyed|relayed|called|telephoned|paged)\b[^.]*(?=\.|$)",
        re.IGNORECASE,
    ),
]
# Sentences that name a physician or tell who was told what, or that only name views or a comparison.
PERSON = re.compile(
    r"\b(?:Drs?|MD|doctors?|physicians?|radiologists?|clinicians?|residents?|attending|house ?(?:officer|staff)"
    r"|nurses?|RN|technologists?"
    r"|(?:referring|ordering|covering|primary|surgical|ICU|clinical) (?:team|service|provider)s?)\b"
)
TOLD = re.compile(
    r"\b(?:discussed(?! (?:above|below|in))|discuss this|notif(?:y|ied|ication)|communicated|telephoned?|by phone"
    r"|paged|pager|conveyed|relayed|informed|(?:was|were|been) (?:called|reported|alerted)|being recalled|acknowledged"
    r"|read ?back|dictated|transcribed|electronically signed|dashboard|wet read|Veriphy|Primordial"
    r"|thank(?:s| you)|(?:any|are) questions|opportunity to (?:assist|participate)|time of (?:discovery|observation))\b"
    rf"|^{REDACTED}.*(?:\b[ap]m\b|\bhours\b|\bdepartment\b)",
    re.IGNORECASE,
)
ONLY_VIEWS = re.compile(
    r"^(?:(?:chest|technique|exam|the|an?|there (?:is|are)|limited)\s+)*"
    rf"(?:{ALL_VIEWS}|{VIEWS}\s+chest|{VIEWS}|{PICTURE}[,\s]\s*{VIEWS}|chest\s+{PICTURE})"
    r"(?:\s+(?:is|are|was|were))?(?:\s+(?:obtained|submitted|provided|performed|reviewed|available|presented)"
    r"|\s+compared\b(?!.*\b(?:show|demonstrate|reveal)).*)?\W*$",
    re.IGNORECASE,
)
ONLY_COMPARISON = re.compile(rf"^(?:comparison|compared)\b[\s\w:]{{0,40}}?{REDACTED}[\W_X]*$", re.IGNORECASE)

GAP = rf"{REDACTED}(?:[\s,/]+{REDACTED})*+"
OMITTED = [
    # "PA and lateral views of the chest show …"
    re.compile(rf"^{ALL_VIEWS}\s+(?:again\s+)?(?:shows?|demonstrates?|reveals?)\s+", re.IGNORECASE),
    # "Comparison XXXX, XXXX"
    re.compile(rf"^comparison:?\s+{GAP}[.,]?\s+(?=[A-Z])", re.IGNORECASE),
    # "…, seen on the lateral view", "… for supine AP technique", "… on lateral XXXX"
    re.compile(
        rf"(?:,\s*(?:(?:best|well|only)\s+)?(?:seen|visualized|noted)(?:\s+{REDACTED})?)?"
        r",?\s*\b(?:only\s+)?(?:on|in|from|for)\s+(?:the\s+|this\s+|an?\s+|today's\s+)?(?:recent\s+)?"
        rf"{ALL_VIEWS}(?:\s+only)?\b",
        re.IGNORECASE,
    ),
    re.compile(rf",?\s*\bon\s+(?:the\s+)?(?:PA|lateral|frontal)(?:\s+{GAP}|(?=[.,;]|$))", re.IGNORECASE),
    # "PA and lateral" of "recommend PA and lateral chest radiographs"
    re.compile(rf"\b(?:PA|AP|frontal)(?:\s*(?:/|&|\band\b)\s*lateral)?\s+(?=(?:chest\s+)?{PICTURE}\b)", re.IGNORECASE),
    # "… compared to the prior study from XXXX", "… since XXXX", "… on XXXX at XXXX"
    re.compile(
        r",?\s*\b(?:as\s+|when\s+|in\s+)?(?:compared|comparison)\s+(?:to|with)\s+(?:the\s+|a\s+)?"
        rf"(?:prior\s+|previous\s+)?(?:{PICTURE}\s+)?(?:(?:from|of|dated|on|performed)\s+)*{GAP}",
        re.IGNORECASE,
    ),
    re.compile(rf",?\s*\b(?:since|dated|from|on|at|of|by|in)\s+(?:the\s+)?{GAP}(?=\s*(?:[.,;)]|$))", re.IGNORECASE),
    # "No XXXX of …"
    re.compile(rf"(?:^|(?<=\b[Nn]o )|(?<=\bfor )){GAP}\s+of\b"),
    # dates and times
    re.compile(r",?\s*\b(?:(?:on|from|dated|since|at)\s+)?\d{1,2}[/-]\d{1,2}[/-](?:\d{4}|\d\d)\b", re.IGNORECASE),
    re.compile(r",?\s*\b(?:at\s+)?\d{1,2}:\d\d(?:\s*[ap]m)?\b", re.IGNORECASE),
    re.compile(rf"(?:\s?-?{REDACTED}(?:[/-]{REDACTED})*+)+"),
    re.compile(r"\[<|>\]"),
]
# What a gap leaves behind at the end of a clause.
LOOSE_END = re.compile(
    r"(?:\s+(?:an?|and|as|at|between|by|dated|for|from|in|of|on|or|since|the|through|to|until|with))+(?=\s*(?:[.,;]|$))"
)
TIDY = [
    (re.compile(r"\(\s*\)"), ""),
    (re.compile(r"\s+"), " "),
    (re.compile(r"\b(of|the|in|to|with) \1\b"), r"\1"),  # "loss of XXXX of a vertebra"
    (re.compile(r"\s+([.,;:!?)])"), r"\1"),
    (re.compile(r"([,;:])(?:\s*[,;:])+"), r"\1"),
    (re.compile(r"[,;:]+\s*\.|\.(?:\s*\.)+"), "."),
]


def impression(report: str) -> str | None:
    """The last impression (or conclusion) of a report, cleaned; None: it has none, or nothing is left of it.

    Args:
        report: the whole report, with headings such as `IMPRESSION:` at the beginning of lines.
    """
    for section in reversed(sections(report)):
        if section.is_impression and (text := clean(section.text)):
            return text
    return None


def why_none(report: str) -> str:
    """Why a report has no `impression`, in a few words that are the same for all reports of a kind."""
    if not re.search("[A-Za-z]{2}", report):
        return "report without text"
    found = sections(report)
    if not found:
        return "report without headings"
    if any(section.is_impression for section in found):
        return "report whose impression is empty, or only redacted, views or names"
    if any(section.names_impression for section in found):
        return "report whose only impression is a clinical, preliminary or other one"
    return "report without impression or conclusion"


def clean(text: str) -> str:
    """A section of a report on one line, less list numbers, physicians, who was told, view positions and dates."""
    for pattern, plain in ABBREVIATIONS:
        text = pattern.sub(plain, text)
    sentences = (_clean_sentence(" ".join(part.split())) for part in SENTENCE.split(_without_numbers(text.strip())))
    return " ".join(sentence for sentence in sentences if re.search("[A-Za-z]{2}", sentence))


def _without_numbers(text: str) -> str:
    """A list 1., 2., 3. as sentences. A number that does not continue the list belongs to the text."""
    parts, last, expected = [], 0, 1
    for match in NUMBER.finditer(text):
        before = text[last : match.start()].rstrip()
        if COUNTED.search(before):
            continue
        # A list begins a text or a sentence, or follows a short title such as "Chest".
        begins = match[1] == "1" and len(re.split("[.:;?!]", before)[-1].split()) <= 3
        if not begins and int(match[1]) != expected:
            continue
        parts += [before, " " if before[-1:] in ENDED else ". "]
        last, expected = match.end(), int(match[1]) + 1
    return "".join([*parts, text[last:]]).strip()


def _clean_sentence(sentence: str) -> str:
    for pattern in ASIDES:
        sentence = pattern.sub("", sentence)
    if any(pattern.search(sentence) for pattern in (PERSON, TOLD, ONLY_VIEWS, ONLY_COMPARISON)):
        return ""
    redacted = re.search(REDACTED, sentence)
    for pattern in OMITTED:
        sentence = pattern.sub(" ", sentence)
    if redacted:
        sentence = LOOSE_END.sub("", sentence)
        if len(sentence.split()) < 2:  # "XXXX change" may have been "No change"
            return ""
    for pattern, tidy in TIDY:
        sentence = pattern.sub(tidy, sentence)
    sentence = sentence.strip(" ,;:-")
    return sentence[:1].upper() + sentence[1:]
