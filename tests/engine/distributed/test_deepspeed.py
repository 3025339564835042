"""What the engine takes of DeepSpeed beyond its documented interface, and fp16 that overflows under ZeRO.

A DeepSpeed that lacks one of these names, or gives it another meaning, would train wrongly or fail in the middle of a
run: `make test` runs this with the installed version, `make test-lowest` with the oldest.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pspg.engine.distributed.deepspeed import Engine
from pspg.engine.distributed.loss_scale import LossScale
from pspg.engine.distributed.world import start
from pspg.engine.training.config import OptimConfig
from pspg.engine.training.optimizer import make_optimizer

FP16 = Path(__file__).parents[1] / "ranks" / "fp16.py"


def made(stage: int, autocast: torch.dtype | None = None) -> Engine:
    torch.manual_seed(0)
    world = start("cpu")
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make_optimizer(module, OptimConfig(name="adamw", lr=0.1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    settings: dict[str, Any] = {"batch_size": 5, "accumulate": 1, "clip_norm": 0.0, "zero_stage": stage}
    return Engine(module, optimizer, schedule, world, autocast=autocast, **settings)


def one_step(engine: Engine) -> None:
    engine.backward(engine(torch.ones(5, 3)).float().square().mean() / 100)
    engine.step()


def test_the_engine_of_deepspeed_has_what_is_used_of_it() -> None:
    engine = made(0)
    inner = engine._engine
    assert inner.enable_backward_allreduce is False  # set by the engine, for one rank
    assert "self.enable_backward_allreduce" in inspect.getsource(type(inner))
    assert callable(inner.allreduce_gradients)
    assert not inner.zero_optimization()
    assert inner.torch_autocast_z0_gradscaler is None
    assert isinstance(made(0, torch.float16)._engine.torch_autocast_z0_gradscaler, torch.amp.GradScaler)
    one_step(engine)
    assert inner.is_gradient_accumulation_boundary()
    import deepspeed.ops

    assert deepspeed.ops.__compatible_ops__ == {}  # read where shared-memory collectives would be compiled


@pytest.mark.parametrize("stage", [1, 2])
def test_the_sharded_optimizer_of_deepspeed_has_what_is_used_of_it(stage: int) -> None:
    engine = made(stage)
    inner = engine._engine.optimizer
    assert engine._engine.zero_optimization()
    assert isinstance(inner.optimizer, torch.optim.AdamW)
    assert callable(inner._lazy_init_hp_params_optimizer_state)
    one_step(engine)
    state = engine.optimizer_state()
    assert {name.rpartition("/")[2] for name in state} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(value.abs().sum() > 0 for name, value in state.items())
    assert inner.overflow is False


@pytest.mark.parametrize("stage", [1, 2])
def test_the_scale_that_is_set_is_the_one_that_deepspeed_divides_by(stage: int) -> None:
    plain, scaled = made(stage), made(stage, torch.float16)
    assert scaled._engine.optimizer.torch_autocast_gradscaler is None
    assert scaled._engine.optimizer.loss_scale == 65536
    for engine in (plain, scaled):
        one_step(engine)
    norms = [float(engine._engine.optimizer._global_grad_norm) for engine in (plain, scaled)]
    assert norms[1] == pytest.approx(norms[0], rel=0.01)


def test_stage_3_has_what_is_used_of_it() -> None:
    linear = F.linear
    engine = made(3)
    assert F.linear is linear
    assert len(engine._engine.optimizer.fp32_partitioned_groups_flat) > 0
    for parameter in engine.module.parameters():
        assert isinstance(parameter.ds_tensor, torch.Tensor)
        assert len(parameter.ds_shape) in (1, 2)
    one_step(engine)
    assert F.linear is linear
    assert [tensor.shape for tensor in engine.state().values()] == [(4, 3), (4,), (2, 4), (2,)]


def test_the_loss_scale_is_that_of_torch() -> None:
    """Through overflows and growth, and each takes the other's state."""
    theirs = torch.amp.GradScaler("cpu")
    assert set(LossScale().state_dict()) == set(theirs.state_dict())
    ours = LossScale()
    ours.load_state_dict({**theirs.state_dict(), "growth_interval": 3})
    theirs.load_state_dict(ours.state_dict())
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for overflow in [True, False, False, True, False, False, False, False, True]:
        weight.grad = theirs.scale(torch.ones(1)) * (float("inf") if overflow else 1.0)
        theirs.step(optimizer)
        theirs.update()
        ours.update(overflow)
        assert ours.state_dict() == theirs.state_dict()


@pytest.mark.slow
def test_an_overflow_of_one_rank_is_judged_by_all_alike(ranks: Callable[..., list[Popen[str]]]) -> None:
    """The step is left out on both ranks, the scale is halved, and training goes on as it does without ZeRO."""
    found: list[list[tuple[list[float], float]]] = []
    for stage in (0, 1, 2):
        for process in ranks([str(FP16), str(stage), "0.05"], 2):
            output, _ = process.communicate(timeout=200)
            assert process.returncode == 0, output[-3000:]
            lines = re.findall(r"step \d: \[(.*)\] scale ([\d.]+)", output)
            found.append([([float(word) for word in words.split(", ")], float(scale)) for words, scale in lines])
    for steps in found:
        (_, first), (skipped, second), *rest = steps
        assert [first, second, *(scale for _, scale in rest)] == [65536, 32768, 32768, 32768]
        assert skipped == steps[0][0]
        assert rest[0][0] != skipped
        for (weights, _), (expected, _) in zip(steps, found[0], strict=True):
            assert weights == pytest.approx(expected, abs=2e-6)
