"""TensorBoard: event files in `tensorboard/` of the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...utils.files import naming
from . import LOGGERS
from ._base import Logger, RunStart


@LOGGERS.register
class TensorBoardLogger(Logger):
    name = "tensorboard"
    package = "tensorboard"

    def __init__(self, start: RunStart) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._folder = start.folder / "tensorboard"
        self._writer = SummaryWriter(str(self._folder), purge_step=start.step + 1)
        file: Any = self._writer.file_writer
        # SummaryWriter.add_hparams would make a second run for them.
        with naming(self._folder):
            for summary in hparams(dict(start.settings), dict.fromkeys(start.metrics, 0.0)):
                file.add_summary(summary)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        with naming(self._folder):
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        with naming(self._folder):
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        with naming(self._folder):
            self._writer.close()
