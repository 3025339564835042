"""Reports of a run while it trains: metrics.jsonl, loggers and a progress bar."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..utils.errors import UserError, first_line
from ..utils.files import naming, write_text
from ..utils.metrics_log import read_metrics
from .loggers import LOGGERS, Logger, RunStart

log = logging.getLogger(__name__)

T = TypeVar("T")


class Telemetry:
    """Writes the metrics of one run. Every method does nothing on other ranks than the first.

    Args:
        folder: run folder.
        active: whether this process writes.
        step: optimizer step the run continues after; later rows of a killed run are cut off.
        loggers: names of those that get the metrics, too.
        settings: of the run, dotted key → value.
        metrics: those that sum a run up.

    Raises:
        UserError: a logger that cannot start.
    """

    def __init__(
        self,
        folder: Path,
        *,
        active: bool,
        step: int,
        loggers: Sequence[str] = (),
        settings: dict[str, Any] | None = None,
        metrics: tuple[str, ...] = (),
    ) -> None:
        self._active = active
        self._loggers: list[Logger] = []
        self._bar: tqdm | None = None
        self._since = time.perf_counter()
        self._images = 0
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = self._path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", buffering=1)
        start = RunStart(folder, step, settings or {}, metrics)
        self._loggers += [_start(name, start) for name in loggers]

    def epoch(self, epoch: int, epochs: int, images: int, done: int) -> None:
        """Start the progress bar of an epoch of `images` images, `done` of which an earlier process trained on."""
        if self._active:
            self._bar = tqdm(
                total=images,
                initial=done,
                desc=f"epoch {epoch + 1}/{epochs}",
                unit="img",
                leave=False,
                dynamic_ncols=True,
                disable=None,
            )
        self._since = time.perf_counter()
        self._images = 0

    def batch(self, images: int) -> None:
        """Count one batch of `images` images over all ranks."""
        self._images += images
        if self._bar is not None:
            self._bar.update(images)

    def end_epoch(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def images_per_second(self) -> float:
        """Rate since the last call."""
        now = time.perf_counter()
        rate = self._images / max(now - self._since, 1e-9)
        self._since, self._images = now, 0
        return rate

    def log(self, row: dict[str, Any]) -> None:
        """Append one row; it must hold `step`. Values that are not finite are written as null."""
        if not self._active:
            return
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        with naming(self._path):
            self._file.write(json.dumps(clean) + "\n")
        values = {key: max(value) if isinstance(value, list) else value for key, value in clean.items()}
        scalars = {key: float(value) for key, value in values.items() if value is not None and key != "step"}
        self._tell(lambda logger: logger.scalars(scalars, row["step"]))
        if self._bar is not None:
            self._bar.set_postfix(
                {key: f"{row[key]:.4g}" for key in ("loss", "lr") if key in row},
                refresh=False,
            )

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Give the loggers a picture (h,w,3)."""
        self._tell(lambda logger: logger.picture(name, pixels, step))

    def close(self, *, failed: bool = False) -> None:
        """Flush and close the files; `failed`: the run did not come to its end."""
        self.end_epoch()
        if self._active:
            with naming(self._path):
                self._file.close()
            self._tell(lambda logger: logger.close(failed=failed))

    def _tell(self, what: Callable[[Logger], None]) -> None:
        """Call every logger; a remote one that fails is told of once and left out, and the run goes on."""
        for logger in list(self._loggers):
            try:
                what(logger)
            except Exception as error:
                if not logger.remote:
                    raise
                self._loggers.remove(logger)
                log.warning(f"logger: {logger.name} no longer logs this run: {first_line(error)[:200]}")


def _start(name: str, start: RunStart) -> Logger:
    logger = LOGGERS[name]
    try:
        return logger(start)
    except Exception as error:
        if not logger.remote:
            raise
        reason = first_line(error)[:200]
        raise UserError(f"logger: {name} does not start: {reason}; set it up, or leave it out") from error


class LoaderWatch:
    """Share of the time that the host waits for the loader, and one line, once, where that limits a run.

    Only the host's clock is read. The first batch of an epoch does not count: its loader is starting.

    Args:
        advice: what to do about it.
        active: whether this process speaks.
    """

    LIMIT = 0.25

    def __init__(self, advice: str, *, active: bool = True) -> None:
        self._advice, self._silent = advice, not active
        self._restart()

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches of an epoch."""
        start = 0.0
        for number, batch in enumerate(batches):
            if number:
                self._waited += time.perf_counter() - start
                self._batches += 1
            else:
                self._restart()
            yield batch
            start = time.perf_counter()

    def share(self, device_wait: float) -> float:
        """Share of the time since the last call that went into waiting for batches; speaks up if it is large.

        A host that runs ahead of a busy device waits for the loader at no cost. Then it waits for the device, too, when
        it logs: for `device_wait` seconds, longer than a step, and there is nothing to say.
        """
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        share = self._waited / elapsed
        if share > self.LIMIT and device_wait * self._batches < elapsed and not self._silent:
            self._silent = True
            log.info(
                f"the loader is the bottleneck: {share:.0%} of the time goes into waiting for images; {self._advice}"
            )
        self._restart()
        return share

    def _restart(self) -> None:
        self._waited, self._batches, self._since = 0.0, 0, time.perf_counter()
