"""The loaders as jobs of the suite: seconds a batch, from files and from the pixel cache, by `benchmarks.loading`."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from pspg.engine.data.loaders.choose import pick_loader
from pspg.engine.utils.errors import UserError

from . import loading
from .rows import FAILED, TOO_LARGE, UNAVAILABLE, Row, without_numbers
from .suite import Job, Started

LOADERS: tuple[Literal["torch", "dali"], ...] = ("torch", "dali")


def jobs(device: str) -> list[Job]:
    """A job a source."""
    return [Loading(rank=40 + k, source=source) for k, source in enumerate(loading.SOURCES)]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Augmented training batches of one source through every loader; its pixels are compared with Pillow's before."""

    rank: int
    source: str
    B: int = 64
    batches: int = 5
    films: int = 12
    size: int = 1024
    image_size: int = 224
    workers: int = 2

    @property
    def key(self) -> str:
        return f"pipeline/{self.source}/B{self.B}-workers{self.workers}"

    def run(self, device: torch.device, without: Mapping[str, str], started: Started) -> list[Row]:
        return [self._row(loader, device, without, started) for loader in LOADERS]

    def _row(
        self, loader: Literal["torch", "dali"], device: torch.device, without: Mapping[str, str], started: Started
    ) -> Row:
        row = Row(
            job=self.key,
            suite="pipeline",
            operator=self.source,
            provider=loader,
            B=self.B,
            device=device.type,
            dtype="uint8",
        )
        if loader in without:
            return without_numbers(row, TOO_LARGE, without[loader])
        started(loader)
        try:
            pick_loader("loader", loader, device)
        except UserError as error:
            return without_numbers(row, UNAVAILABLE, str(error))
        try:
            with tempfile.TemporaryDirectory() as folder:
                (found,) = loading.measure(self.arguments(loader, device), device, Path(folder))
        except UserError as error:
            return without_numbers(row, FAILED, str(error))
        detail = (
            f"{found['images_per_s']:.0f} images/s of {self.size}² films to {self.image_size}², {self.workers} workers"
        )
        start = f"first batch after {found['start_seconds']:.1f} s"
        low, middle, high = (found[f"batch_seconds{edge}"] for edge in ("_p20", "", "_p80"))
        return replace(row, p20=low, p50=middle, p80=high, repeats=found["epochs"], detail=f"{detail}; {start}")

    def arguments(self, loader: str, device: torch.device) -> Namespace:
        """As the command line of `benchmarks.loading` gives them."""
        return Namespace(
            source=[self.source],
            loader=[loader],
            workers=[self.workers],
            device=device.type,
            batch=self.B,
            batches=self.batches,
            films=self.films,
            size=self.size,
            image_size=self.image_size,
            repeat=3,
            step_ms=None,
        )
