"""One rank without ZeRO: nothing is reduced, and gradients that come ready are taken as `backward` would make them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pspg.engine.distributed.deepspeed import Engine
from pspg.engine.distributed.world import start
from pspg.engine.training.config import OptimConfig
from pspg.engine.training.optimizer import make_optimizer


def train(accumulate: int, *, reduce: bool = False, ready: bool = False) -> tuple[list[Tensor], int]:
    """Weights after six batches, and how often gradients were reduced."""
    torch.manual_seed(0)
    world = start("cpu")
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    module[2].bias.requires_grad_(False)
    optimizer = make_optimizer(module, OptimConfig(lr=0.1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    settings: dict[str, Any] = {"batch_size": 5, "accumulate": accumulate, "clip_norm": 0.5, "zero_stage": 0}
    engine = Engine(module, optimizer, schedule, world, autocast=None, **settings)
    inner = engine._engine
    inner.enable_backward_allreduce |= reduce
    calls, reduced = [], inner.allreduce_gradients
    inner.allreduce_gradients = lambda: (calls.append(1), reduced())
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for _ in range(6):
        loss = (module.forward if ready else engine)(torch.randn(5, 3)).square().sum()
        if ready:
            engine.accumulate(torch.autograd.grad(loss, parameters))
        else:
            engine.backward(loss)
        engine.step()
    return [parameter.detach() for parameter in module.parameters()], len(calls)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_are_those_of_reduced_gradients(accumulate: int) -> None:
    expected, reductions = train(accumulate, reduce=True)
    assert reductions == 6
    for settings in ({}, {"ready": True}):
        found, reductions = train(accumulate, **settings)
        assert reductions == 0
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_gradients_of_several_ranks_are_reduced_when_they_come_ready() -> None:
    expected, _ = train(3)
    found, reductions = train(3, reduce=True, ready=True)
    assert reductions == 6
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
