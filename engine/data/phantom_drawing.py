"""Draws a crude chest film from a list of findings: attenuation is summed, then turned into grey.

Coordinates: u to the image's right, v downwards, both about −1.05 … 1.05 over the film, so that a film looks the same
at every size. The patient's right is on the image's left (u < 0); an "L" marks the patient's left. Inside one half
of the chest, w is the distance from the midline towards that side's wall.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .phantom_vocabulary import Finding

Field = NDArray[np.float32]
SIGN = {"left": 1.0, "right": -1.0}
ZONE_V = {"upper": -0.42, "middle": -0.04, "lower": 0.30}
APEX = -0.80
LUNG = 0.64  # attenuation that air takes away


@dataclass
class Anatomy:
    """What the findings change about the body before anything is drawn on it."""

    heart: float = 1.0
    base: dict[str, float] = field(default_factory=lambda: {"right": 0.50, "left": 0.56})
    """v of each diaphragm's dome"""
    curve: float = 0.0
    """sideways bow of the spine, u"""
    air: float = 1.0
    """how dark the lungs are"""


class Film:
    """The pixel grid, the attenuation so far, and the shapes that the drawing functions share."""

    def __init__(self, size: int, rng: np.random.Generator, anatomy: Anatomy) -> None:
        self.size, self.rng, self.anatomy = size, rng, anatomy
        axis = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(2.1 / size) - np.float32(1.05)
        angle, zoom = np.deg2rad(rng.normal(0, 1.5)), rng.normal(1.0, 0.025)
        du, dv = rng.normal(0, 0.02, 2)
        x, y = axis[None, :] * zoom + du, axis[:, None] * zoom + dv
        self.u: Field = np.asarray(x * np.cos(angle) + y * np.sin(angle), np.float32)
        self.v: Field = np.asarray(y * np.cos(angle) - x * np.sin(angle), np.float32)
        self.soft = max(2.1 / size, 0.012)
        self.attenuation: Field = np.zeros((size, size), np.float32)
        self.width = float(rng.normal(1.0, 0.04))  # habitus
        self.w = {side: self.u * np.float32(sign / self.width) for side, sign in SIGN.items()}
        self.depth = {side: self.lung_distance(side) for side in SIGN}
        self.lung = {side: self.inside(self.depth[side]) for side in SIGN}
        self.air: Field = (self.lung["left"] + self.lung["right"]) * np.float32(anatomy.air)

    def inside(self, distance: Field, soft: float | None = None) -> Field:
        """1 where the signed distance is negative, 0 where positive, with an anti-aliased edge."""
        return np.clip(np.float32(0.5) - distance / np.float32(soft or self.soft), 0, 1)

    def add(self, shape: Field, amount: float) -> None:
        self.attenuation += shape * np.float32(amount)

    def disc(self, u: float, v: float, radius: float, stretch: float = 1.0) -> Field:
        """Signed distance to a disc; `stretch` makes it wider than tall."""
        return np.hypot((self.u - u) / stretch, self.v - v) - np.float32(radius)

    def capsule(self, start: tuple[float, float], end: tuple[float, float], radius: float) -> Field:
        """Signed distance to a thick line."""
        (a, b), (c, d) = start, end
        length = max((c - a) ** 2 + (d - b) ** 2, 1e-9)
        t = np.clip(((self.u - a) * (c - a) + (self.v - b) * (d - b)) / length, 0, 1)
        return np.hypot(self.u - a - t * (c - a), self.v - b - t * (d - b)) - np.float32(radius)

    def line(self, points: Sequence[tuple[float, float]], radius: float, amount: float) -> None:
        """A wire or tube; never thinner than the pixels can show, but then fainter."""
        visible = max(radius, 0.4 * self.soft)
        distance = np.minimum.reduce(
            [self.capsule(p, q, visible) for p, q in zip(points, points[1:], strict=False)]
        )
        self.add(self.inside(distance), amount * max(radius / visible, 0.7))

    def noise(self, cells: int) -> Field:
        """Smooth noise of about unit deviation, the same at every film size."""
        grid = self.rng.standard_normal((cells, cells)).astype(np.float32)
        return np.asarray(Image.fromarray(grid).resize((self.size, self.size), Image.Resampling.BICUBIC))

    def dome(self, side: str, w: Field | None = None) -> Field:
        """v of the diaphragm: highest in the middle of the half, lowest at the costophrenic angle."""
        w = self.w[side] if w is None else w
        return self.anatomy.base[side] + np.float32(1.1) * (w - np.float32(0.4)) ** 2

    def lung_distance(self, side: str, collapse: float = 1.0) -> Field:
        """Signed distance (negative inside) to a lung, shrunk by `collapse` towards its medial base."""
        base = self.anatomy.base[side]
        w = 0.14 + (self.w[side] - 0.14) / np.float32(collapse)
        v = base + (self.v - base) / np.float32(collapse)
        t = np.clip((v - APEX) / 1.4, 0, 1)
        outer = 0.36 + 0.46 * np.sqrt(1 - (1 - np.minimum(t / 0.7, 1)) ** 2)
        inner = 0.36 - 0.22 * np.sqrt(1 - (1 - np.minimum(t / 0.3, 1)) ** 2)
        walls = np.maximum(w - outer, inner - w)
        return np.maximum(np.maximum(walls, v - self.dome(side, w)), APEX - v)

    def opacify(self, shape: Field, amount: float = 1.0) -> None:
        """Replace this share of the air that is left by soft tissue or fluid."""
        replaced = np.minimum(shape * np.float32(amount), 1) * self.air
        self.air = self.air - replaced
        self.add(replaced, LUNG)

    def spot(self, finding: Finding, spread: float = 0.07) -> tuple[float, float]:
        """A random place (u, v) in the finding's side and zone, clear of the heart and the wall."""
        assert finding.side is not None
        assert finding.zone is not None
        du, dv = self.rng.uniform(-spread, spread, 2)
        w = {"upper": 0.43, "middle": 0.48, "lower": 0.54}[finding.zone] + (0.05 if finding.side == "left" else 0)
        v = ZONE_V[finding.zone] + min(0.0, self.anatomy.base[finding.side] - 0.50)
        return float(SIGN[finding.side] * (w + du) * self.width), float(v + dv)


def draw_film(findings: Sequence[Finding], size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A film (size, size), 8-bit grey, of a patient with these findings; the same `rng` state gives the same film."""
    anatomy = Anatomy()
    for finding in findings:
        if finding.kind in CHANGES:
            CHANGES[finding.kind](anatomy, finding)
    film = Film(size, rng, anatomy)
    _draw_body(film)
    for finding in findings:
        if finding.kind in DRAWINGS:
            DRAWINGS[finding.kind](film, finding)
    grey = 1 - np.exp(-np.float32(rng.normal(1.5, 0.07)) * np.maximum(film.attenuation, 0))
    grey = grey + np.float32(0.012) * film.noise(9)
    grey = grey + np.float32(0.016) * rng.standard_normal((size, size), dtype=np.float32)
    return np.asarray(np.clip(grey * 255 + 0.5, 0, 255), np.uint8)


def _draw_body(film: Film) -> None:
    u, v, anatomy, rng = film.u, film.v, film.anatomy, film.rng
    shoulder = 0.30 + 0.80 * np.clip((v + 0.98) / 0.26, 0, 1) ** 0.6 - 0.12 * np.clip(v + 0.6, 0, 0.8)
    film.add(film.inside(np.abs(u) / film.width - shoulder, 0.04), 0.86)
    film.add(film.air, -LUNG)
    for side, sign in SIGN.items():
        _draw_ribs(film, side)
        film.line(  # the clavicle
            [(sign * 0.09, -0.60), (sign * 0.38, -0.70), (sign * 0.62, -0.69), (sign * 0.90, -0.79)], 0.030, 0.13
        )
        _draw_vessels(film, side)
        abdomen = film.inside(film.dome(side) - v, 0.03) * film.inside(-film.w[side])
        film.add(abdomen, 0.10)
    film.add(film.inside(film.disc(0.42, 0.80, 0.11, 1.5), 0.06), -0.28)  # gas in the stomach
    bow = np.float32(anatomy.curve) * np.cos(np.clip(v * 1.3, -1.5, 1.5))
    spine = film.inside(np.abs(u - bow) - 0.085, 0.03)
    film.add(spine, 0.16)
    film.add(spine * film.inside(0.35 - np.abs(((v + 0.02) / 0.15) % 1 - 0.5), 0.1), -0.08)  # discs between vertebrae
    film.add(film.inside(np.abs(u + 0.01) - 0.045, 0.03) * film.inside(v + 0.28, 0.1), -0.22)  # trachea
    # Heart and great vessels are one silhouette in front of the air.
    scale = anatomy.heart * rng.normal(1.0, 0.05)
    x, y = u - (0.06 + 0.12 * scale), v - 0.27
    tilted = np.hypot((0.88 * x + 0.47 * y) / (0.36 * scale**0.8), (0.88 * y - 0.47 * x) / 0.30) - np.float32(1)
    atrium = film.disc(-0.05 - 0.06 * scale, 0.28, 0.20 * scale**0.6)
    vessels = np.maximum(np.abs(u - 0.02) - 0.15, v - 0.70)
    knob = film.disc(0.15, -0.35, 0.10)
    silhouette = film.inside(np.minimum(np.minimum(tilted * 0.3, atrium), np.minimum(vessels, knob)), 0.05)
    film.opacify(silhouette)
    film.add(silhouette * film.inside(np.abs(v + 0.1) - 0.70, 0.15), 0.10)
    film.line([(0.80, -0.98), (0.80, -0.88), (0.86, -0.88)], 0.012, 1.4)  # the side marker, an L


def _draw_ribs(film: Film, side: str) -> None:
    w, v = film.w[side], film.v
    cage = film.inside(film.depth[side] - 0.05, 0.06)
    for fall, shift, thickness, amount in ((0.42, 0.0, 0.026, 0.12), (-0.50, 0.09, 0.022, 0.05)):  # behind, in front
        course = fall * (w - 0.25) ** 2 * np.sign(w - 0.25) * 1.6
        ribs = film.inside(np.abs((v - course + shift) % 0.18 - 0.09) - thickness, max(film.soft, 0.02))
        film.add(ribs * cage, amount)


def _draw_vessels(film: Film, side: str) -> None:
    sign, rng = SIGN[side], film.rng
    hilum = (sign * 0.20, -0.10 if side == "left" else -0.06)
    film.add(film.inside(film.disc(*hilum, 0.09), 0.09), 0.16)
    angles = np.linspace(-1.1, 1.2, 6) + rng.normal(0, 0.1, 6)
    for angle in angles:
        reach = rng.uniform(0.28, 0.45)
        end = (hilum[0] + sign * reach * np.cos(angle), hilum[1] + 1.2 * reach * np.sin(angle))
        film.add(film.inside(film.capsule(hilum, end, 0.008), 0.05), 0.07)


# Findings. Each function draws one on the film; sizes are in the film's coordinates.


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
