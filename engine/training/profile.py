"""A trace of a few steps of a run by torch.profiler."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..utils.files import naming
from .config import ProfileConfig

log = logging.getLogger(__name__)


class StepProfiler:
    """Records the steps that the settings name and writes a trace, which Perfetto (ui.perfetto.dev) shows.

    Outside these steps nothing is recorded and nothing waits. A run that ends before them writes no trace.

    Args:
        config: which steps, counted from those of this process.
        folder: run folder; the trace goes to `profile/`.
        rank: of this process, each of which writes a trace.
    """

    def __init__(self, config: ProfileConfig, folder: Path, rank: int) -> None:
        self._config, self._folder, self._rank = config, folder, rank
        self._steps = -1
        self._running: Any = None

    def step(self) -> None:
        """The first step is about to begin, or a step has ended."""
        self._steps += 1
        config = self._config
        if config.steps and self._steps == config.start:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._running = profile(activities=activities, record_shapes=True)
            self._running.start()
        elif self._steps == config.start + config.steps:
            self.stop()

    def stop(self) -> None:
        """Write what was recorded, whole or in part."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        folder = self._folder / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank{self._rank}-step{self._config.start}.json.gz"
        with naming(path):
            running.export_chrome_trace(str(path))
        if self._rank == 0:
            log.info(f"profile of {self._steps - self._config.start} steps: {path}, for ui.perfetto.dev")
