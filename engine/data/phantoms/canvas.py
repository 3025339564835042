"""The canvas of a phantom radiograph and the healthy chest on it: attenuation is summed.

Coordinates: u to the image's right, v downwards, both about −1.05 … 1.05 over the image, so that it looks the same
at every size. The patient's right is on the image's left (u < 0); an "L" marks the patient's left. Inside one half
of the chest, w is the distance from the midline towards that side's wall.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .vocabulary import Finding

Field = NDArray[np.floating[Any]]
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


class Canvas:
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
        edge: Field = np.clip(np.float32(0.5) - distance / np.float32(soft or self.soft), 0, 1)
        return edge

    def add(self, shape: Field, amount: float) -> None:
        self.attenuation += shape * np.float32(amount)

    def disc(self, u: float, v: float, radius: float, stretch: float = 1.0) -> Field:
        """Signed distance to a disc; `stretch` makes it wider than tall."""
        distance: Field = np.hypot((self.u - u) / stretch, self.v - v)
        return distance - np.float32(radius)

    def capsule(self, start: tuple[float, float], end: tuple[float, float], radius: float) -> Field:
        """Signed distance to a thick line."""
        (a, b), (c, d) = start, end
        length = max((c - a) ** 2 + (d - b) ** 2, 1e-9)
        t = np.clip(((self.u - a) * (c - a) + (self.v - b) * (d - b)) / length, 0, 1)
        return np.hypot(self.u - a - t * (c - a), self.v - b - t * (d - b)) - np.float32(radius)

    def line(self, points: Sequence[tuple[float, float]], radius: float, amount: float) -> None:
        """A wire or tube; never thinner than the pixels can show, but then fainter."""
        visible = max(radius, 0.4 * self.soft)
        distance = np.minimum.reduce([self.capsule(p, q, visible) for p, q in pairwise(points)])
        self.add(self.inside(distance), amount * max(radius / visible, 0.7))

    def noise(self, cells: int) -> Field:
        """Smooth noise of about unit deviation, the same at every image size."""
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
        distance: Field = np.maximum(np.maximum(walls, v - self.dome(side, w)), APEX - v)
        return distance

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


def draw_body(canvas: Canvas) -> None:
    """A healthy chest, but for what `canvas.anatomy` says."""
    u, v, anatomy, rng = canvas.u, canvas.v, canvas.anatomy, canvas.rng
    shoulder = 0.30 + 0.80 * np.clip((v + 0.98) / 0.26, 0, 1) ** 0.6 - 0.12 * np.clip(v + 0.6, 0, 0.8)
    canvas.add(canvas.inside(np.abs(u) / canvas.width - shoulder, 0.04), 0.86)
    canvas.add(canvas.air, -LUNG)
    for side, sign in SIGN.items():
        _draw_ribs(canvas, side)
        canvas.line(  # the clavicle
            [(sign * 0.09, -0.60), (sign * 0.38, -0.70), (sign * 0.62, -0.69), (sign * 0.90, -0.79)], 0.030, 0.13
        )
        _draw_vessels(canvas, side)
        abdomen = canvas.inside(canvas.dome(side) - v, 0.03) * canvas.inside(-canvas.w[side])
        canvas.add(abdomen, 0.10)
    canvas.add(canvas.inside(canvas.disc(0.42, 0.80, 0.11, 1.5), 0.06), -0.28)  # gas in the stomach
    bow = np.float32(anatomy.curve) * np.cos(np.clip(v * 1.3, -1.5, 1.5))
    spine = canvas.inside(np.abs(u - bow) - 0.085, 0.03)
    canvas.add(spine, 0.16)
    canvas.add(spine * canvas.inside(0.35 - np.abs(((v + 0.02) / 0.15) % 1 - 0.5), 0.1), -0.08)  # discs of the spine
    canvas.add(canvas.inside(np.abs(u + 0.01) - 0.045, 0.03) * canvas.inside(v + 0.28, 0.1), -0.22)  # trachea
    # Heart and great vessels are one silhouette in front of the air.
    scale = anatomy.heart * rng.normal(1.0, 0.05)
    x, y = u - (0.06 + 0.12 * scale), v - 0.27
    tilted = np.hypot((0.88 * x + 0.47 * y) / (0.36 * scale**0.8), (0.88 * y - 0.47 * x) / 0.30) - np.float32(1)
    atrium = canvas.disc(-0.05 - 0.06 * scale, 0.28, 0.20 * scale**0.6)
    vessels = np.maximum(np.abs(u - 0.02) - 0.15, v - 0.70)
    knob = canvas.disc(0.15, -0.35, 0.10)
    silhouette = canvas.inside(np.minimum(np.minimum(tilted * 0.3, atrium), np.minimum(vessels, knob)), 0.05)
    canvas.opacify(silhouette)
    canvas.add(silhouette * canvas.inside(np.abs(v + 0.1) - 0.70, 0.15), 0.10)
    canvas.line([(0.80, -0.98), (0.80, -0.88), (0.86, -0.88)], 0.012, 1.4)  # the side marker, an L


def _draw_ribs(canvas: Canvas, side: str) -> None:
    w, v = canvas.w[side], canvas.v
    cage = canvas.inside(canvas.depth[side] - 0.05, 0.06)
    for fall, shift, thickness, amount in ((0.42, 0.0, 0.026, 0.12), (-0.50, 0.09, 0.022, 0.05)):  # behind, in front
        course = fall * (w - 0.25) ** 2 * np.sign(w - 0.25) * 1.6
        ribs = canvas.inside(np.abs((v - course + shift) % 0.18 - 0.09) - thickness, max(canvas.soft, 0.02))
        canvas.add(ribs * cage, amount)


def _draw_vessels(canvas: Canvas, side: str) -> None:
    sign, rng = SIGN[side], canvas.rng
    hilum = (sign * 0.20, -0.10 if side == "left" else -0.06)
    canvas.add(canvas.inside(canvas.disc(*hilum, 0.09), 0.09), 0.16)
    angles = np.linspace(-1.1, 1.2, 6) + rng.normal(0, 0.1, 6)
    for angle in angles:
        reach = rng.uniform(0.28, 0.45)
        end = (hilum[0] + sign * reach * np.cos(angle), hilum[1] + 1.2 * reach * np.sin(angle))
        canvas.add(canvas.inside(canvas.capsule(hilum, end, 0.008), 0.05), 0.07)
