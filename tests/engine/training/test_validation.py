"""Validation: in eval mode, every image counts the same; and weights that are lost are not saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pspg.engine.checkpoints.run import last_checkpoint
from pspg.engine.config import LossConfig, ModelConfig
from pspg.engine.data.batch import Batch
from pspg.engine.distributed.world import start
from pspg.engine.models.clip import tokenize
from pspg.engine.models.pspg import PsPG
from pspg.engine.training.config import OptimConfig, TrainConfig
from pspg.engine.training.losses import PromptLoss, contrastive_loss
from pspg.engine.training.tasks import ContrastiveTask, PromptTask
from pspg.engine.training.trainer import Trainer
from pspg.engine.utils.errors import UserError


def batch(rows: range) -> Batch:
    noise = torch.Generator().manual_seed(rows.start)
    return Batch(
        ids=[str(row) for row in rows],
        index=torch.tensor(rows),
        pixels=torch.randint(0, 256, (len(rows), 32, 32), generator=noise, dtype=torch.uint8),
        labels=torch.eye(4)[torch.tensor(rows) % 4],
        tokens=tokenize([f"report {row}" for row in rows], 77),
        mean=0.4,
        std=0.2,
    )


BATCHES = [batch(range(4)), batch(range(4, 6))]


def test_validation_loss_is_a_mean_over_images_in_eval_mode(make_clip: Callable[..., Any]) -> None:
    task = ContrastiveTask(make_clip().float(), start("cpu"), BATCHES, "fp32")
    task.module.train()
    found = task.validate(task.module)["val_loss"]
    assert not task.module.training
    with torch.no_grad():
        four, two = (contrastive_loss(*task.module(*task.inputs(batch))).item() for batch in BATCHES)
    assert four != pytest.approx(two)
    assert found == pytest.approx((4 * four + 2 * two) / 6)


def test_macro_auc_is_measured_in_eval_mode(make_clip: Callable[..., Any], names: list[str]) -> None:
    config = ModelConfig(prompt_length=3, hidden_size=8, decoder_heads=2, dropout=0.9)
    model = PsPG(make_clip().float(), config, names)
    task = PromptTask(model, PromptLoss(LossConfig()), start("cpu"), BATCHES, bank=None, precision="fp32")
    task.module.train()
    found = task.validate(task.module)
    assert not task.module.training
    assert 0 <= found["val_macro_auc"] <= 1
    assert task.validate(task.module) == found


class Lost:
    """Its weights are no numbers after the first epoch, though its loss is one."""

    def __init__(self) -> None:
        self.module = nn.Linear(2, 1)

    def inputs(self, batch: Tensor) -> tuple[Tensor]:
        return (batch,)

    def loss(self, output: Tensor, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return output.square().mean(), {}

    def validate(self, module: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            module.weight.fill_(torch.nan)  # type: ignore[operator, union-attr]
        return {}

    def score(self, metrics: dict[str, float]) -> None:
        return None


class Loader:
    batches_per_epoch = 1
    bad: dict[str, str] = {}  # noqa: RUF012

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Tensor]:
        yield torch.ones(1, 2)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    config = TrainConfig(output=str(tmp_path), optim=OptimConfig(epochs=1, warmup_epochs=0), batch_size=1, device="cpu")
    with pytest.raises(UserError, match="training diverged: weights are not finite after step 1"):
        Trainer(config, Lost(), Loader(), start("cpu"), {}).fit()  # type: ignore[arg-type]
    assert last_checkpoint(tmp_path) is None
