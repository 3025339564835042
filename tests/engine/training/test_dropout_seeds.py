"""Ranks that draw the same dropout: all that share a batch, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pspg.engine.distributed.world import start
from pspg.engine.training.config import OptimConfig, TrainConfig
from pspg.engine.training.trainer import Trainer, step_seed


class Task:
    """Keeps the seed that each batch finds."""

    def __init__(self) -> None:
        self.module = nn.Linear(2, 1)
        self.seeds: list[int] = []

    def inputs(self, batch: Tensor) -> tuple[Tensor]:
        self.seeds.append(torch.initial_seed())
        return (batch,)

    def loss(self, output: Tensor, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return output.square().mean(), {}

    def validate(self, module: nn.Module) -> dict[str, float]:
        return {}

    def score(self, metrics: dict[str, float]) -> None:
        return None


class Loader:
    batches_per_epoch = 3
    bad: dict[str, str] = {}  # noqa: RUF012

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Tensor]:
        yield from [torch.ones(2, 2)] * 3


@pytest.mark.parametrize(("scope", "rank"), [("global", 0), ("local", 1)])
def test_seed_of_the_second_rank(tmp_path: Path, scope: Any, rank: int) -> None:
    task, world = Task(), replace(start("cpu"), rank=1)
    optim = OptimConfig(lr=1e-3, epochs=2, warmup_epochs=0)
    config = TrainConfig(output=str(tmp_path), optim=optim, batch_size=2, device="cpu", scope=scope, seed=5)
    Trainer(config, task, Loader(), world, {}).fit()  # type: ignore[arg-type]
    assert task.seeds == [step_seed(5, batch, rank) for batch in range(1, 7)]
