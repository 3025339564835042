"""`torchrun --nproc_per_node=N -m benchmarks.overhead`: what the DeepSpeed engine adds to a step, on a CPU.

The parameters of phase 2's head, a loss that costs next to nothing, SGD: by plain torch, with one all-reduce of all
gradients, and by the engine at each ZeRO stage, in turns. Medians of rank 0; CPU time counts all its threads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pspg.engine.config import ModelConfig
from pspg.engine.distributed.deepspeed import Engine
from pspg.engine.distributed.world import start
from pspg.engine.models.pspg import PromptHead
from pspg.engine.training.config import OptimConfig
from pspg.engine.training.optimizer import make_optimizer

TURNS = 15


class Squares(nn.Module):
    """The mean square of all parameters of a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self) -> Tensor:
        return torch.stack([parameter.square().mean() for parameter in self.inner.parameters()]).sum()


def main() -> None:
    """Print a line for each."""
    world = start("cpu", 60)
    torch.set_num_threads(1)
    module = Squares(PromptHead(1024, 512, ModelConfig()))
    ways: dict[str, Callable[[], None]] = {"torch": _plain(deepcopy(module), world.size)}
    for stage in (0, 1, 2):
        own = deepcopy(module)
        optimizer = make_optimizer(own, OptimConfig())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        settings: dict[str, Any] = {"batch_size": world.size, "accumulate": 1, "clip_norm": 0.0, "zero_stage": stage}
        ways[f"ZeRO {stage}"] = _sharded(Engine(own, optimizer, schedule, world, autocast=None, **settings))
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(2 + TURNS):
        for name, step in ways.items():
            dist.barrier()
            wall, used = time.perf_counter(), time.process_time()
            step()
            taken[name].append((time.perf_counter() - wall, time.process_time() - used))
    if world.is_main:
        count = sum(parameter.numel() for parameter in module.parameters())
        print(f"{world.size} ranks, {count:,} parameters, medians of {TURNS} steps in turns")
        for name, times in taken.items():
            clock, used = (1e3 * statistics.median(part) for part in zip(*times[2:], strict=True))
            print(f"{name:<8}{clock:>9.1f} ms by the clock{used:>9.1f} ms of CPU")


def _plain(module: nn.Module, ranks: int) -> Callable[[], None]:
    optimizer = make_optimizer(module, OptimConfig())
    parameters = list(module.parameters())

    def step() -> None:
        module().backward()
        if ranks > 1:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients]) / ranks
            dist.all_reduce(flat)
            for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(piece.view_as(gradient))
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sharded(engine: Engine) -> Callable[[], None]:
    def step() -> None:
        engine.backward(engine())
        engine.step()

    return step


if __name__ == "__main__":
    main()
