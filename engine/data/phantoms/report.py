"""Reports of phantom radiographs, worded as a radiologist might."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .vocabulary import Finding, Kind

DROP = 0.22  # probability that a report leaves an attribute out
TERSE = 0.25  # probability that a report is a bare list of findings, worded as class names are
SENTENCES = (
    "{}.",
    "{}.",
    "There is {}.",
    "{} is seen.",
    "{} is present.",
    "{} noted.",
    "Evidence of {}.",
    "Film shows {}.",
    "Appearance of {}.",
)
NEGATIONS = (
    "No {}.",
    "No {}.",
    "No evidence of {}.",
    "No sign of {}.",
    "{} is absent.",
    "No {} or {}.",
    "No {} or {}.",
    "Neither {} nor {}.",
    "No {}, {} or {}.",
)
CLEAR = ("The lungs are clear.", "Clear lungs.", "Lungs clear.", "Lung fields are clear.", "Normal lungs.")
NORMAL = ("Normal chest film.", "No abnormality.", "Unremarkable film.", "No acute finding.", "Normal study.")
HEART = ("Heart size is normal.", "Normal heart.", "The heart is not enlarged.", "Cardiac silhouette is normal.")
AIRY = {"pacemaker", "cardiomegaly", "endotracheal tube", "central line", "feeding tube", "sternal wires"}
AIRY |= {"prosthetic valve", "scoliosis", "rib fracture", "hiatal hernia"}  # these leave the lungs clear


def write_report(findings: Sequence[Finding], kinds: Sequence[Kind], rng: np.random.Generator) -> str:
    """A report of one radiograph: every finding in random order and wording, attributes dropped at random, then some
    kinds of `kinds` that it does not show, negated."""
    if findings and rng.random() < TERSE:
        return ", ".join(_phrase(findings[i], rng) for i in rng.permutation(len(findings)))
    sentences = [str(rng.choice(SENTENCES)).format(_phrase(findings[i], rng)) for i in rng.permutation(len(findings))]
    present = {finding.kind for finding in findings}
    if not findings:
        sentences.append(str(rng.choice(NORMAL)))
    if present <= AIRY and rng.random() < 0.6:
        sentences.append(str(rng.choice(CLEAR)))
    if "cardiomegaly" not in present and len(findings) < 4 and rng.random() < 0.25:
        sentences.append(str(rng.choice(HEART)))
    absent = [kind.noun for kind in kinds if kind.noun not in present]
    for _ in range(rng.integers(1, 3) if len(findings) < 3 else rng.integers(0, 2) * (len(findings) == 3)):
        template = str(rng.choice(NEGATIONS))
        slots = template.count("{}")
        if len(absent) >= slots:
            chosen = [absent.pop(rng.integers(len(absent))) for _ in range(slots)]
            sentences.append(template.format(*chosen))
    if rng.random() < 0.3:
        sentences = sentences[::-1]
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def _phrase(finding: Finding, rng: np.random.Generator) -> str:
    side, zone, size = (None if rng.random() < DROP else value for value in (finding.side, finding.zone, finding.size))
    wording = rng.random()
    if zone is not None and wording < 0.25:
        return " ".join(filter(None, (size, side, zone, "zone", finding.kind)))
    if zone is None and side is not None and wording < 0.25:
        return " ".join(filter(None, (size, finding.kind, "on the", side)))
    return Finding(finding.kind, side, zone, size).name
