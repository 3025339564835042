"""Pictures of similarity maps, drawn over the image that the tower saw."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from textwrap import fill

import matplotlib as mpl
import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from ..utils.files import naming

COLUMNS, PANELS = 4, 12  # panels a row and a picture, the image's included
SIDE, GAP, HEADING, TEXT = 256, 8, 42, 13
"""pixels: side of a panel, space around it, its heading's height, size of the letters"""
SCALE = 96
"""pixels: width of the colour scale with its numbers"""
AGAINST, TOWARDS = np.array([64, 140, 255], np.float32), np.array([255, 64, 26], np.float32)
"""blue for less, red for more, the clearer the larger: where the log-odds are near 0 the image shows through"""
DENSEST = 0.65
INK, SOFT = "#e5e7eb", "#9ca3af"


def draw_maps(
    image: NDArray[np.uint8],
    maps: Tensor,
    names: Sequence[str],
    probabilities: Sequence[float],
    *,
    limit: float,
    title: str,
) -> bytes:
    """A PNG with the image alone and, panel by panel, with the map of each class, all on one scale.

    Args:
        image: (h,w) grey, as the tower saw it.
        maps: (K,g,g).
        names, probabilities: K.
        limit: end of the scale, positive.
        title: above all panels.
    """
    columns = min(COLUMNS, len(names) + 1)
    rows = math.ceil((len(names) + 1) / columns)
    width, height = columns * (SIDE + GAP) + GAP + SCALE, 28 + rows * (SIDE + HEADING + GAP)
    canvas = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, 8), title, INK, _font())
    panels = [("the image as the model sees it", np.repeat(_panel(image)[..., None], 3, axis=2))]
    headings = [f"{_two_lines(name)}{p:.2f}" for name, p in zip(names, probabilities, strict=True)]
    panels += zip(headings, overlay(image, maps, limit), strict=True)
    for number, (heading, pixels) in enumerate(panels):
        x = GAP + number % columns * (SIDE + GAP)
        y = 28 + number // columns * (SIDE + HEADING + GAP)
        draw.multiline_text((x, y), heading, INK, _font(), spacing=2)
        canvas.paste(Image.fromarray(pixels), (x, y + HEADING))
    _draw_scale(canvas, draw, columns * (SIDE + GAP) + 2 * GAP, 28 + HEADING, limit)
    out = io.BytesIO()
    canvas.save(out, "PNG", compress_level=1)
    return out.getvalue()


def overlay(image: NDArray[np.uint8], maps: Tensor, limit: float) -> NDArray[np.uint8]:
    """The image in the colours of each map, (K,SIDE,SIDE,3).

    Args:
        image: (h,w) grey.
        maps: (K,g,g) log-odds.
        limit: log-odds of the full colour.
    """
    if not len(maps):
        return np.empty((0, SIDE, SIDE, 3), np.uint8)
    large = F.interpolate(maps[None].float(), size=(SIDE, SIDE), mode="bilinear", align_corners=False)[0]
    level = (large / limit).clamp(-1, 1).add(1).mul(127.5).round().byte().numpy()
    return _blends()[level, _panel(image)]


def beside(image: NDArray[np.uint8], maps: Tensor) -> NDArray[np.uint8]:
    """The image (h,w) and, right of it, in the colours of its map (1,g,g), on a scale of its own: (SIDE,2·SIDE+4,3)."""
    alone = np.repeat(_panel(image)[..., None], 3, axis=2)
    gap = np.zeros((SIDE, 4, 3), np.uint8)
    return np.concatenate([alone, gap, overlay(image, maps, max(float(maps.abs().max()), 1e-6))[0]], axis=1)


@cache
def _blends() -> NDArray[np.uint8]:
    """Colour (256,256,3) of a level of log-odds, 0 to 255 for −limit to limit, over a grey: a lookup, for speed."""
    strength = np.linspace(-1, 1, 256, dtype=np.float32)[:, None, None]
    density = DENSEST * np.abs(strength)
    grey = np.arange(256, dtype=np.float32)[:, None]
    return (grey + density * (np.where(strength < 0, AGAINST, TOWARDS) - grey)).round().astype(np.uint8)


def _panel(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _draw_scale(canvas: Image.Image, draw: ImageDraw.ImageDraw, x: int, y: int, limit: float) -> None:
    """The colours on black from `limit` at the top to −`limit`, with their numbers."""
    colours = _blends()[np.linspace(255, 0, SIDE).round().astype(np.uint8), 0]
    canvas.paste(Image.fromarray(np.repeat(colours[:, None], 14, axis=1)), (x, y))
    draw.rectangle((x - 1, y - 1, x + 14, y + SIDE), outline="#6b7280")
    draw.multiline_text((x - 2, y - 34), "log-odds\nof a place", SOFT, _font(11), spacing=1)
    for value, place in ((limit, 0.0), (0.0, 0.5), (-limit, 1.0)):
        draw.text((x + 20, y + place * SIDE), f"{value:+.2g}" if value else "0", INK, _font(), anchor="lm")


@cache
def _font(size: int = TEXT) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib: it has Greek and Cyrillic letters, Pillow's own does not."""
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


class MapWriter:
    """Pictures of scored images, one each (more where there are many classes), the most probable classes first.

    Args:
        folder: where they go; it exists.
        class_names: C names.
        columns: of the classes to draw.
        threshold: draw a class only if its probability is at least this.
        images: how many images there are, for the progress bar.
    """

    def __init__(
        self, folder: Path, class_names: Sequence[str], columns: Sequence[int], threshold: float, images: int
    ) -> None:
        self.folder, self.class_names, self.columns, self.threshold = folder, class_names, list(columns), threshold
        self.drawn = 0
        """images that have a picture"""
        self._taken: set[str] = set()
        self._bar = tqdm(total=images, desc="drawing maps", unit="img", leave=False, dynamic_ncols=True, disable=None)

    def write(self, ids: Sequence[str], pixels: Tensor, maps: Tensor, probabilities: NDArray[np.float64]) -> None:
        """Draw a batch.

        Args:
            ids: B image ids.
            pixels: (B,h,w) uint8.
            maps: (B,C,g,g).
            probabilities: (B,C).
        """
        images, maps = pixels.cpu().numpy(), maps.cpu()
        for row, name in enumerate(ids):
            found = probabilities[row]
            shown = [c for c in self.columns if found[c] >= self.threshold]
            shown.sort(key=lambda c: -found[c])
            limit = max(float(maps[row, shown].abs().max()), 1e-6) if shown else 1.0  # of all pages: they compare
            pages = [shown[start : start + PANELS - 1] for start in range(0, len(shown), PANELS - 1)]
            for number, page in enumerate(pages, 1):
                suffix = f" ({number} of {len(pages)})" if len(pages) > 1 else ""
                picture = draw_maps(
                    images[row],
                    maps[row, page],
                    [self.class_names[c] for c in page],
                    [float(found[c]) for c in page],
                    limit=limit,
                    title=_shortened(name) + suffix,
                )
                path = self.folder / self._file(name, number)
                with naming(path):
                    path.write_bytes(picture)
            self.drawn += bool(pages)
            self._bar.update()

    def close(self) -> None:
        """Remove the progress bar."""
        self._bar.close()

    def _file(self, name: str, page: int) -> str:
        """A file name that every system takes and no other picture has, also where case does not count."""
        stem = re.sub(r"\.(png|jpe?g|dcm|dicom)$", "", name, flags=re.IGNORECASE)
        stem = re.sub(r"[^\w.-]+", "_", stem, flags=re.ASCII)[:100].strip("._") or "image"
        stem += f"-{page}" if page > 1 else ""
        file, number = stem, 1
        while file.casefold() in self._taken:
            number += 1
            file = f"{stem}_{number}"
        self._taken.add(file.casefold())
        return f"{file}.png"


def _two_lines(name: str, width: int = 32) -> str:
    """A class name, to be followed by its probability, always two lines, so that panels line up."""
    lines = fill(_shortened(name, 2 * width - 8), width).split("\n")
    return "\n".join(lines[:2]) + ("\n" if len(lines) == 1 else "  ")


def _shortened(name: str, longest: int = 90) -> str:
    line = " ".join(name.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"
