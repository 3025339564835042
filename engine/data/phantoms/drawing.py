"""Draws a crude chest radiograph from a list of findings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .canvas import SIGN, ZONE_V, Anatomy, Canvas, Field, draw_body
from .vocabulary import Finding


def draw_radiograph(findings: Sequence[Finding], size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A radiograph (size, size), 8-bit grey, of a patient with these findings; a function of the state of `rng`."""
    anatomy = Anatomy()
    for finding in findings:
        if finding.kind in CHANGES:
            CHANGES[finding.kind](anatomy, finding)
    canvas = Canvas(size, rng, anatomy)
    draw_body(canvas)
    for finding in findings:
        if finding.kind in DRAWINGS:
            DRAWINGS[finding.kind](canvas, finding)
    grey = 1 - np.exp(-np.float32(rng.normal(1.5, 0.07)) * np.maximum(canvas.attenuation, 0))
    grey = grey + np.float32(0.012) * canvas.noise(9)
    grey = grey + np.float32(0.016) * rng.standard_normal((size, size), dtype=np.float32)
    return np.asarray(np.clip(grey * 255 + 0.5, 0, 255), np.uint8)


# Each function draws one finding; lengths are in the canvas's coordinates, amounts are attenuation.


def _pick(finding: Finding, small: float, large: float) -> float:
    return large if finding.size in ("large", "severe") else small


def _effusion(canvas: Canvas, finding: Finding) -> None:
    side = str(finding.side)
    height = _pick(finding, 0.16, 0.56) * canvas.rng.uniform(0.85, 1.15)
    level = canvas.anatomy.base[side] + 0.08 - height - 0.50 * np.clip(canvas.w[side] - 0.35, 0, 1) ** 2  # the meniscus
    canvas.opacify(canvas.inside(level - canvas.v, 0.05) * canvas.inside(-canvas.w[side]))


def _pneumothorax(canvas: Canvas, finding: Finding) -> None:
    side = str(finding.side)
    collapsed = canvas.lung_distance(side, _pick(finding, 0.88, 0.66) * canvas.rng.uniform(0.97, 1.03))
    air = canvas.air * canvas.inside(-canvas.w[side])
    canvas.add(air * canvas.inside(-collapsed), -0.16)
    canvas.add(air * canvas.inside(collapsed), 0.05)
    canvas.add(air * canvas.inside(np.abs(collapsed) - 0.012), 0.20)  # the pleural line


def _nodule(canvas: Canvas, finding: Finding) -> None:
    radius = _pick(finding, 0.066, 0.125) * canvas.rng.uniform(0.92, 1.08)
    canvas.add(canvas.inside(canvas.disc(*canvas.spot(finding), radius), 0.03), 0.52)


def _granuloma(canvas: Canvas, finding: Finding) -> None:
    canvas.add(canvas.inside(canvas.disc(*canvas.spot(finding), 0.032)), 1.1)


def _patch(canvas: Canvas, finding: Finding, amount: float, grain: float) -> None:
    u, v = canvas.spot(finding, 0.05)
    radius = _pick(finding, 0.13, 0.22)
    distance = canvas.disc(u, v, radius, 1.1) + np.float32(0.035) * canvas.noise(14)
    texture = np.clip(1 + np.float32(grain) * canvas.noise(24), 0, 2)
    canvas.opacify(canvas.inside(distance, 0.12) * texture, amount)


def _consolidation(canvas: Canvas, finding: Finding) -> None:
    _patch(canvas, finding, 0.72, 0.25)


def _ground_glass(canvas: Canvas, finding: Finding) -> None:
    _patch(canvas, finding, 0.30, 0.10)


def _reticulation(canvas: Canvas, finding: Finding) -> None:
    u, v = canvas.spot(finding, 0.04)
    area = canvas.inside(canvas.disc(u, v, _pick(finding, 0.15, 0.24)), 0.06)
    net = np.zeros_like(canvas.u)
    for angle in (0.3, 1.35, 2.4):
        across = canvas.u * np.cos(angle) + canvas.v * np.sin(angle)
        net = np.maximum(net, canvas.inside(np.abs(across % 0.09 - 0.045) - 0.006, max(canvas.soft, 0.02)))
    canvas.add(area * net * canvas.inside(canvas.depth[str(finding.side)], 0.04), 0.35)


def _atelectasis(canvas: Canvas, finding: Finding) -> None:
    u, v = canvas.spot(finding, 0.04)
    half = _pick(finding, 0.13, 0.22)
    slope = SIGN[str(finding.side)] * canvas.rng.uniform(-0.2, 0.35)
    for step in (0.0,) if finding.size == "small" else (-0.075, 0.0, 0.075):
        canvas.line([(u - half, v + step - slope * half), (u + half, v + step + slope * half)], 0.021, 0.46)


def _ring(canvas: Canvas, u: float, v: float, radius: float, wall: float) -> Field:
    distance = canvas.disc(u, v, radius)
    canvas.add(canvas.inside(np.abs(distance) - wall), 0.42)
    return canvas.inside(distance + wall)


def _cavity(canvas: Canvas, finding: Finding) -> None:
    inner = _ring(canvas, *canvas.spot(finding), _pick(finding, 0.085, 0.15), 0.028)
    canvas.add(inner, -0.10)


def _bulla(canvas: Canvas, finding: Finding) -> None:
    inner = _ring(canvas, *canvas.spot(finding), _pick(finding, 0.12, 0.20), 0.006)
    canvas.add(inner, -0.16)


def _abscess(canvas: Canvas, finding: Finding) -> None:
    u, v = canvas.spot(finding)
    inner = _ring(canvas, u, v, _pick(finding, 0.10, 0.17), 0.024)
    canvas.add(inner * canvas.inside(v - canvas.v), 0.42)  # fluid with an air level


def _fracture(canvas: Canvas, finding: Finding) -> None:
    sign, rng = SIGN[str(finding.side)], canvas.rng
    v = ZONE_V[str(finding.zone)] + rng.uniform(-0.06, 0.06)
    wall = 0.66 if finding.zone == "upper" else 0.76
    u = sign * (wall + rng.uniform(-0.03, 0.02)) * canvas.width
    # Two displaced ends with a dark cleft between them.
    canvas.line([(u - sign * 0.15, v - 0.06), (u - sign * 0.02, v + 0.01)], 0.030, 0.45)
    canvas.line([(u + sign * 0.03, v - 0.06), (u + sign * 0.10, v + 0.06)], 0.030, 0.45)
    canvas.line([(u, v - 0.09), (u + sign * 0.01, v + 0.08)], 0.012, -0.28)


def _edema(canvas: Canvas, finding: Finding) -> None:
    amount = _pick(finding, 0.30, 0.65)
    texture = np.clip(1 + np.float32(0.35) * canvas.noise(20), 0, 2)
    for sign in SIGN.values():
        wing = np.exp(-(((canvas.u - sign * 0.28) / 0.26) ** 2) - ((canvas.v + 0.02) / 0.36) ** 2).astype(np.float32)
        canvas.opacify(wing * texture, amount)


def _pacemaker(canvas: Canvas, finding: Finding) -> None:
    sign = SIGN[str(finding.side)]
    u, v = sign * canvas.rng.uniform(0.50, 0.60), canvas.rng.uniform(-0.56, -0.48)
    box = np.maximum(np.abs(canvas.u - u) - 0.085, np.abs(canvas.v - v) - 0.065)
    canvas.add(canvas.inside(box - 0.02), 1.3)
    canvas.line([(u, v), (sign * 0.30, -0.62), (-0.09, -0.38), (-0.10, 0.10), (0.22, 0.42)], 0.010, 0.9)


def _central_line(canvas: Canvas, finding: Finding) -> None:
    sign = SIGN[str(finding.side)]
    canvas.line([(sign * 0.30, -1.0), (sign * 0.22, -0.72), (-0.10, -0.45), (-0.11, 0.02)], 0.012, 0.7)


def _chest_drain(canvas: Canvas, finding: Finding) -> None:
    sign = SIGN[str(finding.side)]
    canvas.line([(sign * 1.0, 0.34), (sign * 0.66, 0.16), (sign * 0.52, -0.16), (sign * 0.46, -0.48)], 0.018, 0.8)


def _endotracheal_tube(canvas: Canvas, finding: Finding) -> None:
    canvas.line([(0.0, -1.05), (-0.01, -0.46)], 0.020, 0.9)


def _feeding_tube(canvas: Canvas, finding: Finding) -> None:
    canvas.line([(0.03, -1.05), (0.03, 0.20), (0.10, 0.52), (0.30, 0.74), (0.50, 0.80)], 0.012, 0.8)


def _pleural_thickening(canvas: Canvas, finding: Finding) -> None:
    side = str(finding.side)
    thickness = _pick(finding, 0.05, 0.11)
    cap = canvas.lung[side] * canvas.inside(-thickness - canvas.depth[side]) * canvas.inside(canvas.v + 0.52, 0.12)
    canvas.add(cap, 0.45)


def _hilar_enlargement(canvas: Canvas, finding: Finding) -> None:
    radius = _pick(finding, 0.11, 0.17)
    canvas.add(canvas.inside(canvas.disc(SIGN[str(finding.side)] * 0.25, -0.08, radius), 0.05), 0.42)


def _plaque(canvas: Canvas, finding: Finding) -> None:
    sign = SIGN[str(finding.side)]
    v, half = ZONE_V[str(finding.zone)], _pick(finding, 0.06, 0.13)
    wall = 0.60 if finding.zone == "upper" else 0.72
    canvas.line([(sign * wall * canvas.width, v - half), (sign * (wall + 0.02) * canvas.width, v + half)], 0.034, 0.7)


def _sternal_wires(canvas: Canvas, finding: Finding) -> None:
    for v in np.arange(-0.42, 0.40, 0.16):
        canvas.line([(-0.045, v - 0.03), (0.045, v + 0.03)], 0.012, 1.1)
        canvas.line([(-0.045, v + 0.03), (0.045, v - 0.03)], 0.012, 1.1)


def _hernia(canvas: Canvas, finding: Finding) -> None:
    radius = _pick(finding, 0.11, 0.19)
    inner = _ring(canvas, 0.16, 0.40, radius, 0.016)
    canvas.add(inner * canvas.inside(canvas.v - 0.40), -0.36)


def _valve(canvas: Canvas, finding: Finding) -> None:
    canvas.add(canvas.inside(np.abs(canvas.disc(0.10, 0.18, 0.075, 1.3)) - 0.016), 1.3)


def _clips(canvas: Canvas, finding: Finding) -> None:
    u, v = canvas.spot(finding, 0.04)
    for du, dv in canvas.rng.uniform(-0.09, 0.09, (4, 2)):
        canvas.line([(u + du - 0.02, v + dv), (u + du + 0.02, v + dv + 0.015)], 0.013, 1.3)


def _subcutaneous_air(canvas: Canvas, finding: Finding) -> None:
    w = canvas.w[str(finding.side)]
    wall = canvas.inside(0.05 - canvas.depth[str(finding.side)], 0.05) * canvas.inside(0.5 - w, 0.1)
    strips = np.clip(canvas.noise(22), 0, 1) * canvas.inside(np.abs(canvas.v + 0.25) - 0.55, 0.2)
    canvas.add(wall * strips, -_pick(finding, 0.35, 0.75))


DRAWINGS: dict[str, Callable[[Canvas, Finding], None]] = {
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
