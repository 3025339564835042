"""A picture of a few validation images with what they show and what the model says, for the loggers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.batch import Batch

SHOWN = 3
"""classes of the highest probability that stand below an image"""


class FirstImages:
    """Batches of a loader, unchanged; the pixels of the first images are kept.

    Args:
        batches: in the same order at each iteration.
        count: images to keep.
    """

    def __init__(self, batches: Iterable[Batch], count: int) -> None:
        self._batches, self._count = batches, count
        self.pixels: list[NDArray[np.uint8]] = []
        """(h,w) each"""
        self.ids: list[str] = []

    @property
    def bad(self) -> dict[str, str]:
        """id → reason of the images that the loader has left out."""
        return dict(getattr(self._batches, "bad", {}))

    def __iter__(self) -> Iterator[Batch]:
        self.pixels, self.ids = [], []
        for batch in self._batches:
            room = self._count - len(self.ids)
            if room > 0:
                self.pixels += [image.cpu().numpy() for image in batch.pixels[:room]]
                self.ids += batch.ids[:room]
            yield batch


def panel(
    pixels: Sequence[NDArray[np.uint8]],
    labels: NDArray[np.float64],
    probabilities: NDArray[np.float64],
    class_names: Sequence[str],
) -> NDArray[np.uint8]:
    """A row of N images (h,w,3), each above its positive labels and its highest probabilities.

    Args:
        pixels: N images (h,w).
        labels: (N,C) in {1, 0, -1}.
        probabilities: (N,C).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(pixels), 3.6), dpi=100, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    axes = np.atleast_1d(np.asarray(figure.subplots(1, len(pixels)), dtype=object))
    for axis, image, truth, scores in zip(axes, pixels, labels, probabilities, strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        axis.set_xticks([])
        axis.set_yticks([])
        present = ", ".join(name for name, value in zip(class_names, truth, strict=True) if value == 1) or "nothing"
        lines = textwrap.wrap(f"has: {present}", 34)[:4]
        for number in np.argsort(-scores, kind="stable")[:SHOWN]:
            mark = {1: "✓", -1: "?"}.get(int(truth[number]), "✗")
            lines.append(textwrap.shorten(f"{scores[number]:.2f} {mark} {class_names[number]}", 34, placeholder="…"))
        axis.set_xlabel("\n".join(lines).replace("$", r"\$"), fontsize=8, loc="left")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
