"""Between log points the host never waits for the device: no operator of a training step reads a value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pspg.engine.config import LossConfig, ModelConfig
from pspg.engine.data.batch import Batch
from pspg.engine.distributed.world import start
from pspg.engine.models.pspg import PsPG
from pspg.engine.training.config import OptimConfig, TrainConfig
from pspg.engine.training.losses import PromptLoss, contrastive_loss
from pspg.engine.training.losses.classification.bce import binary_cross_entropy
from pspg.engine.training.losses.pair.ranking import ranking_loss
from pspg.engine.training.optimizer import make_optimizer
from pspg.engine.training.tasks import PromptTask
from pspg.engine.training.trainer import Trainer
from tests.engine.recorder import HostReads


class Loader:
    """Four batches of three images."""

    def __init__(self, classes: int) -> None:
        self.batches_per_epoch, self.bad, self._classes = 4, {}, classes

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(start_batch, self.batches_per_epoch):
            pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator)
            labels = torch.randint(-1, 2, (3, self._classes), generator=generator).float()
            yield Batch(["a", "b", "c"], torch.arange(3), pixels, labels, None, mean=0.5, std=0.25)


def test_the_trap_catches_reads() -> None:
    x = torch.arange(3.0)
    with HostReads() as reads:
        x.sum().item()
        x[x > 1]
        bool((x > 5).any())
        x.nonzero()
        x.to("meta")
        x.double()
    assert reads.seen == ["_local_scalar_dense", "index", "_local_scalar_dense", "nonzero", "_to_copy cpu to meta"]


@pytest.mark.parametrize(
    ("pair", "settings"),
    [
        *((pair, {"prefix": prefix}) for pair in ("spcl", "pcl", "ranking") for prefix in (False, True)),
        ("spcl", {"decoder": "lstm"}),
        ("spcl", {"decoder": "transformer"}),
        ("spcl", {"decoder": "mlp", "prompts": "shared"}),
        ("spcl", {"prompts": "positive"}),
        ("ranking", {"decoder": "context", "fusion": "regions"}),
    ],
)
def test_a_training_epoch_reads_nothing_before_it_logs(
    make_clip: Callable[..., Any], names: list[str], tmp_path: Path, pair: Any, settings: dict[str, Any]
) -> None:
    small = ModelConfig(prompt_length=3, hidden_size=8, decoder_heads=2, **settings)
    world = start("cpu")
    model = PsPG(make_clip().float(), small, names).freeze()
    task = PromptTask(model, PromptLoss(LossConfig(pair=pair)), world, None, bank=None, precision="fp32")
    config = TrainConfig(
        output=str(tmp_path), batch_size=3, log_every=100, optim=OptimConfig(epochs=1, warmup_epochs=0, accumulate=2)
    )
    trainer = Trainer(config, task, Loader(len(names)), world, {})
    before: list[str] = []
    log = trainer._log

    def log_and_note(*arguments: Any) -> None:
        before.extend(reads.seen)
        log(*arguments)

    trainer._log = log_and_note  # type: ignore[method-assign]
    with HostReads() as reads:
        trainer._train_epoch()
    trainer.telemetry.close()
    assert trainer.step == 2
    assert before == []


def test_the_other_losses_read_nothing() -> None:
    logits, labels = torch.randn(3, 2, 4, requires_grad=True), torch.randint(-1, 2, (3, 4))
    features, scale = torch.randn(3, 8, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    with HostReads() as reads:
        loss = binary_cross_entropy(logits, labels) + ranking_loss(logits, labels)
        (loss + contrastive_loss(features, features.flip(0), scale)).backward()
    assert reads.seen == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_never_synchronises(make_clip: Callable[..., Any], names: list[str]) -> None:
    """CUDA's own check, in the precision that a GPU trains in."""
    device = torch.device("cuda")
    small = ModelConfig(prompt_length=3, hidden_size=8, decoder_heads=2)
    model = PsPG(make_clip().float(), small, names).to(device).train().freeze(torch.bfloat16)
    optimizer = make_optimizer(model.head, OptimConfig())
    images, labels = torch.randn(3, 3, 32, 32, device=device), torch.ones(3, len(names), device=device)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            output = model(images)
            loss, _ = PromptLoss(LossConfig())(output, labels, model.tower)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
