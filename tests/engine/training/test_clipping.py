"""The gradient norm that a step may have, seen in how far it moves the weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pspg.engine.distributed.world import start
from pspg.engine.training.config import OptimConfig, TrainConfig
from pspg.engine.training.trainer import Trainer


class Task:
    """The gradient is `batch`, of norm 5."""

    def __init__(self) -> None:
        self.module = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(self.module.weight)

    def inputs(self, batch: Tensor) -> tuple[Tensor]:
        return (batch,)

    def loss(self, output: Tensor, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return output.sum(), {}

    def validate(self, module: nn.Module) -> dict[str, float]:
        return {}

    def score(self, metrics: dict[str, float]) -> None:
        return None


class Loader:
    batches_per_epoch = 1
    bad: dict[str, str] = {}  # noqa: RUF012

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Tensor]:
        yield torch.tensor([[3.0, -4.0]])


@pytest.mark.parametrize(("clip_norm", "moved"), [(0.0, 5.0), (0.5, 0.5), (10.0, 5.0)])
def test_a_step_is_as_long_as_the_clipped_gradient(tmp_path: Path, clip_norm: float, moved: float) -> None:
    """Plain SGD with a learning rate of 1; 0 means no clipping."""
    optim = OptimConfig(
        lr=1.0, momentum=0.0, weight_decay=0.0, epochs=1, warmup_epochs=0, schedule="constant", clip_norm=clip_norm
    )
    task = Task()
    config = TrainConfig(output=str(tmp_path), optim=optim, batch_size=1, device="cpu")
    Trainer(config, task, Loader(), start("cpu"), {}).fit()  # type: ignore[arg-type]
    expected = torch.tensor([[-3.0, 4.0]]) * moved / 5
    torch.testing.assert_close(task.module.weight.detach(), expected, rtol=1e-4, atol=0)
