"""Draws a crude chest film from a list of findings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .canvas import SIGN, ZONE_V, Anatomy, Field, Film, draw_body
from .vocabulary import Finding


def draw_film(findings: Sequence[Finding], size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A film (size, size), 8-bit grey, of a patient with these findings; the same `rng` state gives the same film."""
    anatomy = Anatomy()
    for finding in findings:
        if finding.kind in CHANGES:
            CHANGES[finding.kind](anatomy, finding)
    film = Film(size, rng, anatomy)
    draw_body(film)
    for finding in findings:
        if finding.kind in DRAWINGS:
            DRAWINGS[finding.kind](film, finding)
    grey = 1 - np.exp(-np.float32(rng.normal(1.5, 0.07)) * np.maximum(film.attenuation, 0))
    grey = grey + np.float32(0.012) * film.noise(9)
    grey = grey + np.float32(0.016) * rng.standard_normal((size, size), dtype=np.float32)
    return np.asarray(np.clip(grey * 255 + 0.5, 0, 255), np.uint8)


# Each function draws one finding; lengths are in the film's coordinates, amounts are attenuation.


def _pick(finding: Finding, small: float, large: float) -> float:
    return large if finding.size in ("large", "severe") else small


def _effusion(film: Film, finding: Finding) -> None:
    side = str(finding.side)
    height = _pick(finding, 0.16, 0.56) * film.rng.uniform(0.85, 1.15)
    level = film.anatomy.base[side] + 0.08 - height - 0.50 * np.clip(film.w[side] - 0.35, 0, 1) ** 2  # the meniscus
    film.opacify(film.inside(level - film.v, 0.05) * film.inside(-film.w[side]))


def _pneumothorax(film: Film, finding: Finding) -> None:
    side = str(finding.side)
    collapsed = film.lung_distance(side, _pick(finding, 0.88, 0.66) * film.rng.uniform(0.97, 1.03))
    air = film.air * film.inside(-film.w[side])
    film.add(air * film.inside(-collapsed), -0.16)
    film.add(air * film.inside(collapsed), 0.05)
    film.add(air * film.inside(np.abs(collapsed) - 0.012), 0.20)  # the pleural line


def _nodule(film: Film, finding: Finding) -> None:
    radius = _pick(finding, 0.066, 0.125) * film.rng.uniform(0.92, 1.08)
    film.add(film.inside(film.disc(*film.spot(finding), radius), 0.03), 0.52)


def _granuloma(film: Film, finding: Finding) -> None:
    film.add(film.inside(film.disc(*film.spot(finding), 0.032)), 1.1)


def _patch(film: Film, finding: Finding, amount: float, grain: float) -> None:
    u, v = film.spot(finding, 0.05)
    radius = _pick(finding, 0.13, 0.22)
    distance = film.disc(u, v, radius, 1.1) + np.float32(0.035) * film.noise(14)
    texture = np.clip(1 + np.float32(grain) * film.noise(24), 0, 2)
    film.opacify(film.inside(distance, 0.12) * texture, amount)


def _consolidation(film: Film, finding: Finding) -> None:
    _patch(film, finding, 0.72, 0.25)


def _ground_glass(film: Film, finding: Finding) -> None:
    _patch(film, finding, 0.30, 0.10)


def _reticulation(film: Film, finding: Finding) -> None:
    u, v = film.spot(finding, 0.04)
    area = film.inside(film.disc(u, v, _pick(finding, 0.15, 0.24)), 0.06)
    net = np.zeros_like(film.u)
    for angle in (0.3, 1.35, 2.4):
        across = film.u * np.cos(angle) + film.v * np.sin(angle)
        net = np.maximum(net, film.inside(np.abs(across % 0.09 - 0.045) - 0.006, max(film.soft, 0.02)))
    film.add(area * net * film.inside(film.depth[str(finding.side)], 0.04), 0.35)


def _atelectasis(film: Film, finding: Finding) -> None:
    u, v = film.spot(finding, 0.04)
    half = _pick(finding, 0.13, 0.22)
    slope = SIGN[str(finding.side)] * film.rng.uniform(-0.2, 0.35)
    for step in (0.0,) if finding.size == "small" else (-0.075, 0.0, 0.075):
        film.line([(u - half, v + step - slope * half), (u + half, v + step + slope * half)], 0.021, 0.46)


def _ring(film: Film, u: float, v: float, radius: float, wall: float) -> Field:
    distance = film.disc(u, v, radius)
    film.add(film.inside(np.abs(distance) - wall), 0.42)
    return film.inside(distance + wall)


def _cavity(film: Film, finding: Finding) -> None:
    inner = _ring(film, *film.spot(finding), _pick(finding, 0.085, 0.15), 0.028)
    film.add(inner, -0.10)


def _bulla(film: Film, finding: Finding) -> None:
    inner = _ring(film, *film.spot(finding), _pick(finding, 0.12, 0.20), 0.006)
    film.add(inner, -0.16)


def _abscess(film: Film, finding: Finding) -> None:
    u, v = film.spot(finding)
    inner = _ring(film, u, v, _pick(finding, 0.10, 0.17), 0.024)
    film.add(inner * film.inside(v - film.v), 0.42)  # fluid with an air level


def _fracture(film: Film, finding: Finding) -> None:
    sign, rng = SIGN[str(finding.side)], film.rng
    v = ZONE_V[str(finding.zone)] + rng.uniform(-0.06, 0.06)
    wall = 0.66 if finding.zone == "upper" else 0.76
    u = sign * (wall + rng.uniform(-0.03, 0.02)) * film.width
    # Two displaced ends with a dark cleft between them.
    film.line([(u - sign * 0.15, v - 0.06), (u - sign * 0.02, v + 0.01)], 0.030, 0.45)
    film.line([(u + sign * 0.03, v - 0.06), (u + sign * 0.10, v + 0.06)], 0.030, 0.45)
    film.line([(u, v - 0.09), (u + sign * 0.01, v + 0.08)], 0.012, -0.28)


def _edema(film: Film, finding: Finding) -> None:
    amount = _pick(finding, 0.30, 0.65)
    texture = np.clip(1 + np.float32(0.35) * film.noise(20), 0, 2)
    for sign in SIGN.values():
        wing = np.exp(-(((film.u - sign * 0.28) / 0.26) ** 2) - ((film.v + 0.02) / 0.36) ** 2).astype(np.float32)
        film.opacify(wing * texture, amount)


def _pacemaker(film: Film, finding: Finding) -> None:
    sign = SIGN[str(finding.side)]
    u, v = sign * film.rng.uniform(0.50, 0.60), film.rng.uniform(-0.56, -0.48)
    box = np.maximum(np.abs(film.u - u) - 0.085, np.abs(film.v - v) - 0.065)
    film.add(film.inside(box - 0.02), 1.3)
    film.line([(u, v), (sign * 0.30, -0.62), (-0.09, -0.38), (-0.10, 0.10), (0.22, 0.42)], 0.010, 0.9)


def _central_line(film: Film, finding: Finding) -> None:
    sign = SIGN[str(finding.side)]
    film.line([(sign * 0.30, -1.0), (sign * 0.22, -0.72), (-0.10, -0.45), (-0.11, 0.02)], 0.012, 0.7)


def _chest_drain(film: Film, finding: Finding) -> None:
    sign = SIGN[str(finding.side)]
    film.line([(sign * 1.0, 0.34), (sign * 0.66, 0.16), (sign * 0.52, -0.16), (sign * 0.46, -0.48)], 0.018, 0.8)


def _endotracheal_tube(film: Film, finding: Finding) -> None:
    film.line([(0.0, -1.05), (-0.01, -0.46)], 0.020, 0.9)


def _feeding_tube(film: Film, finding: Finding) -> None:
    film.line([(0.03, -1.05), (0.03, 0.20), (0.10, 0.52), (0.30, 0.74), (0.50, 0.80)], 0.012, 0.8)


def _pleural_thickening(film: Film, finding: Finding) -> None:
    side = str(finding.side)
    thickness = _pick(finding, 0.05, 0.11)
    cap = film.lung[side] * film.inside(-thickness - film.depth[side]) * film.inside(film.v + 0.52, 0.12)
    film.add(cap, 0.45)


def _hilar_enlargement(film: Film, finding: Finding) -> None:
    radius = _pick(finding, 0.11, 0.17)
    film.add(film.inside(film.disc(SIGN[str(finding.side)] * 0.25, -0.08, radius), 0.05), 0.42)


def _plaque(film: Film, finding: Finding) -> None:
    sign = SIGN[str(finding.side)]
    v, half = ZONE_V[str(finding.zone)], _pick(finding, 0.06, 0.13)
    wall = 0.60 if finding.zone == "upper" else 0.72
    film.line([(sign * wall * film.width, v - half), (sign * (wall + 0.02) * film.width, v + half)], 0.034, 0.7)


def _sternal_wires(film: Film, finding: Finding) -> None:
    for v in np.arange(-0.42, 0.40, 0.16):
        film.line([(-0.045, v - 0.03), (0.045, v + 0.03)], 0.012, 1.1)
        film.line([(-0.045, v + 0.03), (0.045, v - 0.03)], 0.012, 1.1)


def _hernia(film: Film, finding: Finding) -> None:
    radius = _pick(finding, 0.11, 0.19)
    inner = _ring(film, 0.16, 0.40, radius, 0.016)
    film.add(inner * film.inside(film.v - 0.40), -0.36)


def _valve(film: Film, finding: Finding) -> None:
    film.add(film.inside(np.abs(film.disc(0.10, 0.18, 0.075, 1.3)) - 0.016), 1.3)


def _clips(film: Film, finding: Finding) -> None:
    u, v = film.spot(finding, 0.04)
    for du, dv in film.rng.uniform(-0.09, 0.09, (4, 2)):
        film.line([(u + du - 0.02, v + dv), (u + du + 0.02, v + dv + 0.015)], 0.013, 1.3)


def _subcutaneous_air(film: Film, finding: Finding) -> None:
    w = film.w[str(finding.side)]
    wall = film.inside(0.05 - film.depth[str(finding.side)], 0.05) * film.inside(0.5 - w, 0.1)
    strips = np.clip(film.noise(22), 0, 1) * film.inside(np.abs(film.v + 0.25) - 0.55, 0.2)
    film.add(wall * strips, -_pick(finding, 0.35, 0.75))


DRAWINGS: dict[str, Callable[[Film, Finding], None]] = {
    "effusion": _effusion,
    "pneumothorax": _pneumothorax,
    "nodule": _nodule,
    "granuloma": _granuloma,
    "consolidation": _consolidation,
    "ground-glass opacity": _ground_glass,
    "reticulation": _reticulation,
    "atelectasis": _atelectasis,
    "cavity": _cavity,
    "bulla": _bulla,
    "abscess": _abscess,
    "rib fracture": _fracture,
    "edema": _edema,
    "pacemaker": _pacemaker,
    "central line": _central_line,
    "chest drain": _chest_drain,
    "endotracheal tube": _endotracheal_tube,
    "feeding tube": _feeding_tube,
    "pleural thickening": _pleural_thickening,
    "hilar enlargement": _hilar_enlargement,
    "pleural plaque": _plaque,
    "sternal wires": _sternal_wires,
    "hiatal hernia": _hernia,
    "prosthetic valve": _valve,
    "surgical clips": _clips,
    "subcutaneous air": _subcutaneous_air,
}


def _cardiomegaly(anatomy: Anatomy, finding: Finding) -> None:
    anatomy.heart = _pick(finding, 1.40, 1.90)


def _emphysema(anatomy: Anatomy, finding: Finding) -> None:
    anatomy.air += _pick(finding, 0.10, 0.22)
    for side in anatomy.base:
        anatomy.base[side] += _pick(finding, 0.08, 0.16)


def _elevated_diaphragm(anatomy: Anatomy, finding: Finding) -> None:
    anatomy.base[str(finding.side)] -= _pick(finding, 0.16, 0.34)


def _scoliosis(anatomy: Anatomy, finding: Finding) -> None:
    anatomy.curve = SIGN[str(finding.side)] * _pick(finding, 0.12, 0.24)


CHANGES: dict[str, Callable[[Anatomy, Finding], None]] = {
    "cardiomegaly": _cardiomegaly,
    "emphysema": _emphysema,
    "elevated diaphragm": _elevated_diaphragm,
    "scoliosis": _scoliosis,
}
