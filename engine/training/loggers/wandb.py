"""Weights & Biases. Its own variables say where: WANDB_MODE (offline writes to the run's folder), WANDB_PROJECT, …"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from . import LOGGERS
from ._base import Logger, RunStart, remember, remembered

log = logging.getLogger(__name__)


@LOGGERS.register
class WandbLogger(Logger):
    name = package = "wandb"
    remote = True

    def __init__(self, start: RunStart) -> None:
        import wandb

        self._library = wandb
        # Neither the terminal's lines nor the code leave the machine.
        quiet = wandb.Settings(console="off", save_code=False, silent=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "pspg"),
            name=start.folder.resolve().name,
            id=remembered(start, self.name),
            resume="allow",
            dir=str(start.folder),
            config=dict(start.settings),
            settings=quiet,
        )
        remember(start, self.name, self._run.id)
        # Rows after the last checkpoint come twice where a run was killed; W&B drops steps that go back.
        self._run.define_metric("*", step_metric="step")
        log.info(f"W&B: {self._run.dir if self._run.offline else self._run.url}")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        self._run.log({name: self._library.Image(pixels), "step": step})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
