"""What a person beside a run is told: how far it is, how long it will take, and what looks wrong."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

EXPLODED = 10.0
"""a loss that is so many times the smallest one so far"""
CHANCE = 0.5
"""AUC of scores that know nothing"""
EPOCHS = 3
"""epochs after which a validation at chance is worth a remark"""
WORTH = 10.0
"""seconds from which the estimated time is told before the first epoch ends"""


class Remarks:
    """Lines about one run; nothing on other ranks than the first.

    Args:
        epochs, steps: of the whole run.
        done: optimizer steps that an earlier process made.
        active: whether this process speaks.
    """

    def __init__(self, epochs: int, steps: int, done: int, *, active: bool) -> None:
        self._epochs, self._steps, self._active = epochs, steps, active
        self._began = time.perf_counter()
        self._pace: tuple[float, int] | None = None  # the first steps compile and fill caches
        self._told: set[str] = set()
        self._sum, self._batches, self._smallest = 0.0, 0, float("inf")
        self._step = done

    def logged(self, row: Mapping[str, Any], batches: int) -> None:
        """A row of the log: means over so many batches."""
        self._step, loss = row["step"], row["loss"]
        self._sum, self._batches = self._sum + loss * batches, self._batches + batches
        if loss > EXPLODED * self._smallest > 0:
            self._say(
                "loss",
                f"the loss is {loss:.4g} at step {self._step} and was {self._smallest:.4g}: lower optim.lr, or set "
                "optim.clip_norm",
            )
        self._smallest = min(self._smallest, loss)
        if self._pace is None:
            self._pace = time.perf_counter(), self._step
        elif "pace" not in self._told and self.left() >= WORTH:
            self._say(
                "pace", f"about {duration(self.left())} for {self._steps - self._step:,} steps to go", logging.INFO
            )

    def left(self) -> float:
        """Seconds that the rest will take, at the pace since the first row; 0: not known yet, or nothing is left."""
        began, first = self._pace or (0.0, self._step)
        if self._step == first:
            return 0.0
        return (time.perf_counter() - began) / (self._step - first) * (self._steps - self._step)

    def validated(self, epoch: int, lr: float, metrics: Mapping[str, float], best_epoch: int | None) -> None:
        """The end of an epoch, counted from 1; `best_epoch` is the best so far, None without validation."""
        now = time.perf_counter()
        parts = [f"loss {self._sum / max(self._batches, 1):.4g}", f"lr {lr:.2g}"]
        parts += [f"{key} {value:.4f}" for key, value in metrics.items()]
        if best_epoch is not None:
            parts.append("(best)" if best_epoch == epoch else f"(best: epoch {best_epoch})")
        left = f", {duration(self.left())} to go" if self.left() else ""
        parts.append(f"{duration(now - self._began)}{left}")
        self._say(f"epoch {epoch}", f"epoch {epoch}/{self._epochs}  {'  '.join(parts)}", logging.INFO)
        self._sum, self._batches, self._began = 0.0, 0, now
        if epoch >= EPOCHS and metrics.get("val_macro_auc", 1.0) < CHANCE:
            self._say(
                "chance",
                f"val_macro_auc is below {CHANCE} after {epoch} epochs, worse than guessing: are labels and names "
                "of classes in the same order, and the backbone's weights the right ones?",
            )

    def _say(self, key: str, line: str, level: int = logging.WARNING) -> None:
        if self._active and key not in self._told:
            log.log(level, line)
        self._told.add(key)


def duration(seconds: float) -> str:
    """A time in the two units that matter: 3 h 20 min, 9 min, 12 s."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24} d {hours % 24} h" if hours >= 24 else f"{hours} h {minutes:02} min"
