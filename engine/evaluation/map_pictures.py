"""Pictures of similarity maps, drawn over the image that the tower saw."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..utils.files import naming

COLUMNS, PANELS = 4, 12  # panels a row and a picture, the image's included
STYLE: Any = {
    "font.size": 8,
    "text.parse_math": False,  # a class name may hold a dollar sign
    "text.color": "#e5e7eb",
    "axes.titlesize": 8.5,
    "ytick.color": "#e5e7eb",
    "axes.labelcolor": "#e5e7eb",
}


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
    size = image.shape[0]
    large = F.interpolate(maps[None].float(), size=image.shape, mode="bilinear", align_corners=False)[0]
    norm, colours = Normalize(-limit, limit), _colours()
    columns = min(COLUMNS, len(names) + 1)
    rows = math.ceil((len(names) + 1) / columns)
    extent = (0, size, size, 0)
    out = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(columns * 2.4 + 0.8, rows * 2.7 + 0.3), layout="constrained", facecolor="black")
        figure.suptitle(title, fontsize=9)
        panels = figure.subplots(rows, columns, squeeze=False)
        for number, axes in enumerate(panels.flat):
            axes.set_axis_off()
            if number > len(names):
                continue
            axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=extent)
            if not number:
                axes.set_title("the image as the model sees it\n")
                continue
            axes.imshow(large[number - 1].numpy(), cmap=colours, norm=norm, extent=extent)
            axes.set_title(f"{_two_lines(names[number - 1])}{probabilities[number - 1]:.2f}")
        bar = figure.colorbar(
            ScalarMappable(norm, colours), ax=list(panels.flat), shrink=0.9 / rows, aspect=18, anchor=(0, 1)
        )
        bar.set_label("log-odds of the class at a position")
        bar.ax.set_facecolor("black")
        bar.outline.set_edgecolor("#6b7280")
        figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


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


def _colours() -> ListedColormap:
    """Blue for less, red for more, the clearer the larger: where the log-odds are near 0 the image shows through."""
    strength = np.linspace(-1, 1, 256)
    colours = np.empty((256, 4))
    colours[:, :3] = np.where(strength[:, None] < 0, [0.25, 0.55, 1.0], [1.0, 0.25, 0.1])
    colours[:, 3] = 0.65 * np.abs(strength)
    return ListedColormap(colours)


def _two_lines(name: str, width: int = 34) -> str:
    """A class name, to be followed by its probability, always two lines, so that panels line up."""
    lines = fill(_shortened(name, 2 * width - 8), width).split("\n")
    return "\n".join(lines[:2]) + ("\n" if len(lines) == 1 else "  ")


def _shortened(name: str, longest: int = 90) -> str:
    line = " ".join(name.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"
