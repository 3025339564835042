"""Every row of the paper's ablations (tables 2, 3 and 6) is a configuration that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pspg.engine.config import LossConfig, ModelConfig
from pspg.engine.models.pspg import PsPG
from pspg.engine.training.config import OptimConfig
from pspg.engine.training.losses import PromptLoss
from pspg.engine.training.optimizer import make_optimizer
from pspg.kernels.prompt_decoder import KINDS

LABELS = torch.tensor([[1.0, 0, 0, 1], [0, 1, -1, 0], [0, 0, 1, 1]])
LOSSES: dict[str, dict[str, Any]] = {
    "BCE": {"classification": "bce", "pair": "none"},
    "ASL": {"pair": "none"},
    "ASL+Ranking": {"pair": "ranking"},
    "ASL+PCL": {"pair": "pcl"},
    "ASL+SPCL": {"pair": "spcl"},
}


def train(clip: Any, names: list[str], loss: dict[str, Any], **config: Any) -> None:
    """Two steps on one batch lower its loss, and move everything that trains."""
    torch.manual_seed(0)
    settings = {"prompt_length": 3, "hidden_size": 8, "decoder_heads": 2, "dropout": 0.0, "drop_path": 0.0, **config}
    model = PsPG(clip, ModelConfig(**settings), names).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(model.head, OptimConfig(name="adamw", lr=1e-5, weight_decay=0))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    losses = []
    for _ in range(3):
        total, _ = PromptLoss(LossConfig(**loss))(model(images), LABELS, model.tower)
        losses.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2] > 0, losses
    still = {name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])}
    assert not still


@pytest.mark.parametrize("prompts", ["dual", "shared", "positive"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_prompt_modes(make_clip: Callable[..., Any], names: list[str], loss: str, prompts: str) -> None:
    train(make_clip(), names, LOSSES[loss], prompts=prompts)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("fusion", ["global", "ungated", "gate_before_norm", "gate_after_norm"])
def test_losses_and_features(make_clip: Callable[..., Any], names: list[str], loss: str, fusion: str) -> None:
    train(make_clip(), names, LOSSES[loss], fusion=fusion)


@pytest.mark.parametrize("decoder", list(KINDS))
@pytest.mark.parametrize(("length", "prefix"), [(8, False), (16, True), (32, False)])
def test_decoders_and_lengths(
    make_clip: Callable[..., Any], names: list[str], decoder: str, length: int, prefix: bool
) -> None:
    train(make_clip(), names, LOSSES["ASL+SPCL"], decoder=decoder, prompt_length=length, prefix=prefix)
