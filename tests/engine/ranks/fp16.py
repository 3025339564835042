"""A rank of a training in fp16 under a ZeRO stage: prints, after each step, its weights' sum and the loss scale.

In step 1 a gradient overflows in the input of the last rank alone, and in one weight matrix alone.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from pspg.engine.distributed.deepspeed import Engine
from pspg.engine.distributed.world import start
from pspg.engine.training.config import OptimConfig
from pspg.engine.training.optimizer import make_optimizer

OVERFLOWS = 1


def main(stage: int, clip_norm: float) -> None:
    world = start("cpu", 60)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = make_optimizer(module, OptimConfig(lr=1e-2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    settings = {"batch_size": 2 * world.size, "accumulate": 1, "clip_norm": clip_norm, "zero_stage": stage}
    engine = Engine(module, optimizer, schedule, world, autocast=torch.float16, **settings)
    for step in range(4):
        torch.manual_seed(10 * step + world.rank)
        x = torch.randn(2, 4)
        if step == OVERFLOWS and world.rank == world.size - 1:
            x[0, 0] = 3e4  # its product with a scaled gradient is beyond fp16
        loss = engine(x).float().square().mean()
        engine.backward(loss)
        engine.step()
        scaler = engine.scaler_state()
        assert scaler is not None
        weights = [round(parameter.double().sum().item(), 9) for parameter in module.parameters()]
        print(f"rank {world.rank} step {step}: {weights} scale {scaler['scale']}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
