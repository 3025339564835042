"""Findings of phantom radiographs and the names of their classes: kind × side × zone × size.

Sides are the patient's: the patient's right is on the image's left, as on any chest radiograph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ...utils.errors import UserError

SIDES = ("left", "right")
ZONES = ("upper", "middle", "lower")
EXTENTS = ("small", "large")
GRADES = ("mild", "severe")


@dataclass(frozen=True)
class Kind:
    """A type of finding and how often each of its attributes occurs. An empty tuple: it has no such attribute."""

    noun: str
    weight: float
    """how often it occurs, relative to the other kinds"""
    sides: tuple[float, ...] = ()
    """probabilities of left and right"""
    zones: tuple[float, ...] = ()
    """probabilities of the upper, middle and lower zone"""
    sizes: tuple[float, ...] = ()
    """probabilities of small and large, or of mild and severe"""
    graded: bool = False
    """sizes are called mild and severe"""
    held_out: bool = False
    """no name of this kind is ever in the seen list"""
    layer: str | None = None
    """findings of one layer exclude each other at one place; None: a layer of its own"""

    def options(self, attribute: str) -> dict[str, float]:
        """The attribute's values and their probabilities; empty where the kind has no such attribute."""
        words = {"side": SIDES, "zone": ZONES, "size": GRADES if self.graded else EXTENTS}[attribute]
        shares = {"side": self.sides, "zone": self.zones, "size": self.sizes}[attribute]
        return dict(zip(words, shares, strict=False)) if shares else {}


# Ten common kinds, then a tail of rarer ones. Uneven probabilities are realistic (nodules favour the upper
# zones, consolidation the lower) and let two-attribute names reach the prevalence that learning needs.
KINDS: tuple[Kind, ...] = (
    Kind("effusion", 1.15, sides=(0.5, 0.5), sizes=(0.45, 0.55)),
    Kind("nodule", 1.1, (0.4, 0.6), (0.5, 0.25, 0.25), (0.45, 0.55), layer="lung"),
    Kind("cardiomegaly", 0.9, sizes=(0.5, 0.5), graded=True),
    Kind("consolidation", 1.1, (0.45, 0.55), (0.2, 0.25, 0.55), (0.4, 0.6), layer="lung"),
    Kind("pneumothorax", 1.0, sides=(0.5, 0.5), sizes=(0.45, 0.55)),
    Kind("pacemaker", 0.8, sides=(0.65, 0.35), held_out=True),
    Kind("edema", 0.85, sizes=(0.5, 0.5), graded=True),
    Kind("atelectasis", 1.0, (0.5, 0.5), (0.2, 0.3, 0.5), (0.45, 0.55), layer="lung"),
    Kind("rib fracture", 0.95, (0.5, 0.5), (0.3, 0.4, 0.3)),
    Kind("cavity", 0.75, (0.45, 0.55), (0.6, 0.2, 0.2), (0.4, 0.6), held_out=True, layer="lung"),
    Kind("endotracheal tube", 0.28),
    Kind("central line", 0.29, sides=(0.35, 0.65)),
    Kind("emphysema", 0.28, sizes=(0.5, 0.5), graded=True),
    Kind("feeding tube", 0.27, held_out=True),
    Kind("pleural thickening", 0.3, (0.5, 0.5), (), (0.5, 0.5)),
    Kind("chest drain", 0.3, sides=(0.5, 0.5)),
    Kind("hilar enlargement", 0.3, (0.5, 0.5), (), (0.5, 0.5), held_out=True),
    Kind("bulla", 0.3, (0.5, 0.5), (0.5, 0.2, 0.3), (0.5, 0.5), layer="lung"),
    Kind("reticulation", 0.3, (0.5, 0.5), (0.2, 0.3, 0.5), (0.5, 0.5), layer="lung"),
    Kind("granuloma", 0.28, (0.5, 0.5), (0.4, 0.35, 0.25), layer="lung"),
    Kind("pleural plaque", 0.28, (0.5, 0.5), (0.2, 0.4, 0.4), (0.5, 0.5)),
    Kind("elevated diaphragm", 0.28, (0.4, 0.6), (), (0.5, 0.5)),
    Kind("sternal wires", 0.25),
    Kind("ground-glass opacity", 0.28, (0.5, 0.5), (0.3, 0.3, 0.4), (0.5, 0.5), layer="lung"),
    Kind("hiatal hernia", 0.22, sizes=(0.5, 0.5)),
    Kind("prosthetic valve", 0.22),
    Kind("abscess", 0.25, (0.5, 0.5), (0.3, 0.3, 0.4), (0.5, 0.5), held_out=True, layer="lung"),
    Kind("surgical clips", 0.22, (0.5, 0.5), (0.4, 0.3, 0.3)),
    Kind("subcutaneous air", 0.22, (0.5, 0.5), (), (0.5, 0.5), graded=True),
    Kind("scoliosis", 0.22, (0.5, 0.5), (), (0.5, 0.5), graded=True),
)
KIND = {kind.noun: kind for kind in KINDS}

# How much likelier the second kind becomes once the first is on the image, in both directions.
AFFINITY: dict[frozenset[str], float] = {
    frozenset(pair): factor
    for *pair, factor in (
        ("effusion", "cardiomegaly", 1.8),
        ("effusion", "edema", 2.0),
        ("effusion", "atelectasis", 1.8),
        ("effusion", "consolidation", 1.4),
        ("cardiomegaly", "edema", 2.5),
        ("cardiomegaly", "pacemaker", 2.0),
        ("pneumothorax", "rib fracture", 2.2),
        ("pneumothorax", "chest drain", 5.0),
        ("pneumothorax", "subcutaneous air", 4.0),
        ("pneumothorax", "bulla", 2.0),
        ("rib fracture", "subcutaneous air", 3.0),
        ("emphysema", "bulla", 4.0),
        ("emphysema", "cardiomegaly", 0.3),
        ("endotracheal tube", "central line", 4.0),
        ("endotracheal tube", "feeding tube", 5.0),
        ("central line", "feeding tube", 3.0),
        ("endotracheal tube", "edema", 2.0),
        ("sternal wires", "prosthetic valve", 6.0),
        ("sternal wires", "cardiomegaly", 2.0),
        ("pleural plaque", "pleural thickening", 3.0),
        ("granuloma", "hilar enlargement", 2.0),
    )
}
REPEAT = 0.5  # a kind that is already on the image comes again, elsewhere, with this much of its weight
SAME_SIDE = 0.65  # probability that a finding lies on the side of a related one
# Probabilities of 0, 1, 2, … findings on an image.
COUNTS_FEW_KINDS = (0.09, 0.16, 0.26, 0.27, 0.22)
COUNTS_MANY_KINDS = (0.06, 0.10, 0.17, 0.22, 0.22, 0.14, 0.09)


@dataclass(frozen=True)
class Finding:
    """A finding on an image, or a class name: then None leaves an attribute open."""

    kind: str
    side: str | None = None
    zone: str | None = None
    size: str | None = None

    @property
    def name(self) -> str:
        """As a class name: 'large left effusion', 'nodule in the right upper zone'."""
        if self.zone is None:
            return " ".join(filter(None, (self.size, self.side, self.kind)))
        place = " ".join(filter(None, (self.side, self.zone)))
        return " ".join(filter(None, (self.size, self.kind))) + f" in the {place} zone"

    @property
    def parts(self) -> set[str]:
        """The words a name is composed of: its kind and its attributes."""
        return set(filter(None, (self.kind, self.side, self.zone, self.size)))

    def matches(self, finding: Finding) -> bool:
        """A radiograph with this finding is a positive of the class that `self` names."""
        return self.kind == finding.kind and all(
            mine is None or mine == theirs
            for mine, theirs in zip(
                (self.side, self.zone, self.size), (finding.side, finding.zone, finding.size), strict=True
            )
        )


def _every_name() -> list[Finding]:
    """All class names, most frequent first: each prefix is a vocabulary with the highest prevalences it can have."""
    ranked: list[tuple[float, Finding]] = []
    for kind in KINDS:
        choices = [[(None, 1.0), *kind.options(a).items()] for a in ("side", "zone", "size")]
        for (side, p), (zone, q), (size, r) in product(*choices):
            ranked.append((kind.weight * p * q * r, Finding(kind.noun, side, zone, size)))
    return [name for _, name in sorted(ranked, key=lambda pair: -pair[0])]  # a stable sort: ties keep the table's order


ALL_NAMES: tuple[Finding, ...] = tuple(_every_name())
MIN_CLASSES = 14


@dataclass(frozen=True)
class PhantomVocabulary:
    """Class names in label order, and their three disjoint groups (each in label order)."""

    names: tuple[Finding, ...]
    seen: tuple[Finding, ...]
    """to train on; they cover every part of every unseen composition"""
    unseen: tuple[Finding, ...]
    """unseen compositions: each part (kind, side, zone, size) is in some seen name, the combination in none"""
    unseen_types: tuple[Finding, ...]
    """names of kinds of which the seen list has none"""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds that the names speak of; radiographs show no others."""
        used = {name.kind for name in self.names}
        return tuple(kind for kind in KINDS if kind.noun in used)


def make_vocabulary(classes: int) -> PhantomVocabulary:
    """The first `classes` names and their split; a smaller vocabulary is a prefix of a larger one, group by group.

    A composed name whose parts the seen names before it cover is a candidate for the unseen compositions;
    every third candidate becomes one.

    Raises:
        UserError: `classes` outside 14 … len(ALL_NAMES).
    """
    if not MIN_CLASSES <= classes <= len(ALL_NAMES):
        raise UserError(f"classes: must lie between {MIN_CLASSES} and {len(ALL_NAMES)}, got {classes}")
    names = ALL_NAMES[:classes]
    seen: list[Finding] = []
    unseen: list[Finding] = []
    unseen_types: list[Finding] = []
    covered: set[str] = set()
    candidates = 0
    for name in names:
        if KIND[name.kind].held_out:
            unseen_types.append(name)
            continue
        candidate = len(name.parts) > 1 and name.parts <= covered
        candidates += candidate
        if candidate and candidates % 3 == 1:
            unseen.append(name)
        else:
            seen.append(name)
            covered |= name.parts
    return PhantomVocabulary(names, tuple(seen), tuple(unseen), tuple(unseen_types))


def draw_findings(kinds: Sequence[Kind], rng: np.random.Generator) -> list[Finding]:
    """Findings of one image: related kinds come together (`AFFINITY`), often on one side, never two at one place."""
    counts = COUNTS_FEW_KINDS if len(kinds) <= 12 else COUNTS_MANY_KINDS
    findings: list[Finding] = []
    taken: set[tuple[str, str | None, str | None]] = set()
    for _ in range(rng.choice(len(counts), p=counts)):
        present = {finding.kind for finding in findings}
        weights = np.array([_weight(kind, present) for kind in kinds])
        kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
        finding = _draw_attributes(kind, findings, rng)
        places = _places(finding)
        if taken.isdisjoint(places):  # else the image simply has one finding fewer
            taken |= places
            findings.append(finding)
    return findings


def _weight(kind: Kind, present: set[str]) -> float:
    weight = kind.weight
    for other in present:
        weight *= AFFINITY.get(frozenset((kind.noun, other)), 1.0)
    if kind.noun in present:
        weight *= REPEAT if kind.sides else 0.0
    return weight


def _draw_attributes(kind: Kind, findings: Sequence[Finding], rng: np.random.Generator) -> Finding:
    drawn: dict[str, str | None] = {}
    for attribute in ("side", "zone", "size"):
        options = kind.options(attribute)
        drawn[attribute] = rng.choice(list(options), p=list(options.values())).item() if options else None
    related = [f.side for f in findings if f.side and AFFINITY.get(frozenset((kind.noun, f.kind)), 1.0) > 1.0]
    if drawn["side"] and related and rng.random() < SAME_SIDE:
        drawn["side"] = related[-1]
    return Finding(kind.noun, **drawn)


def _places(finding: Finding) -> set[tuple[str, str | None, str | None]]:
    layer = KIND[finding.kind].layer or finding.kind
    places = {(layer, finding.side, finding.zone)}
    if finding.kind == "effusion" and finding.size == "large":
        places.add(("lung", finding.side, "lower"))  # it would hide what lies there
    return places


def label_row(names: Sequence[Finding], findings: Sequence[Finding]) -> NDArray[np.int8]:
    """Labels (C,) of one image in the order of `names`: 1 where some finding matches the name, else 0."""
    return np.array([any(name.matches(f) for f in findings) for name in names], dtype=np.int8)
