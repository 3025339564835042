"""A phase-2 step under the engine on several ranks of this machine."""

from __future__ import annotations

import os
import socket
import statistics
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from pspg.engine.config import LossConfig, ModelConfig
from pspg.engine.data.batch import Batch
from pspg.engine.distributed.collectives import barrier
from pspg.engine.distributed.deepspeed import Engine
from pspg.engine.distributed.world import start
from pspg.engine.models.clip import build_clip, clip_config
from pspg.engine.models.pspg import PsPG
from pspg.engine.training.config import OptimConfig
from pspg.engine.training.global_batch import GlobalPromptTask, SharedBatches
from pspg.engine.training.losses import PromptLoss
from pspg.engine.training.optimizer import make_optimizer
from pspg.engine.training.tasks import PromptTask
from pspg.engine.utils.device import autocast_dtype
from pspg.engine.utils.errors import UserError

from .child import Child
from .machine import peak_bytes, timed
from .traffic import Traffic, group_sizes, step_payload

NARROW: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
NARROW_HEAD = ModelConfig(prompt_length=4, hidden_size=32, decoder_heads=2)
PATIENCE = 600
"""seconds for the ranks of one measurement"""


class Settings(NamedTuple):
    """Settings that all ranks of a measurement share."""

    classes: int
    device: str
    zero_stage: int
    scope: str
    repeat: int


def measure(count: int, batch: int, settings: Settings) -> dict[str, Any]:
    """A step of `batch` images on `count` ranks: what the slowest of them took, and what the first sent.

    Raises:
        UserError: a rank ended before its work was done.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [Child(_work, rank, count, port, batch, settings) for rank in range(count)]
    found: list[dict[str, Any]] = []
    try:
        for child in children:
            if not child.pipe.poll(PATIENCE):
                raise UserError(f"{count} ranks did not answer within {PATIENCE} s")
            found.append(child.pipe.recv())
    except EOFError:
        raise UserError(f"one of {count} ranks ended before its work was done") from None
    finally:
        for child in children:
            child.close(10 if len(found) == count else 0)
    seconds = [max(times) for times in zip(*(part["seconds"] for part in found), strict=True)]
    first = found[0]
    sizes = {"scope": settings.scope, "classes": settings.classes, "batch": batch, "width": first["width"]}
    return {
        "seconds": statistics.median(seconds),
        "repeat": len(seconds),
        "peak_bytes": max(part["peak_bytes"] for part in found),
        "payload": first["payload"],
        "calls": first["calls"],
        "formula": step_payload(first["groups"], count, settings.zero_stage, **sizes),
        "parameters": sum(first["groups"]),
    }


@dataclass
class _One:
    """A loader of one batch."""

    batch: Batch
    batches_per_epoch: int = 1
    bad: dict[str, str] = field(default_factory=dict)

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        yield self.batch


def _work(pipe: Any, rank: int, count: int, port: int, batch: int, settings: Settings) -> None:
    """One rank: steps under the engine, their seconds, and what the ranks sent in one more."""
    classes, device, zero_stage, scope, repeat = settings
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    cuda = device == "cuda"
    if not cuda:
        torch.set_num_threads(1)
    world = start(device, PATIENCE)
    torch.manual_seed(0)
    clip = build_clip({**(clip_config("RN50") if cuda else NARROW), "quick_gelu": True})
    head = ModelConfig() if cuda else NARROW_HEAD
    autocast = autocast_dtype("auto", world.device)
    model = PsPG(clip, head, [f"class {number}" for number in range(classes)])
    model.to(world.device).freeze(autocast)
    shared = scope == "global" and count > 1
    task = (GlobalPromptTask if shared else PromptTask)(
        model, PromptLoss(LossConfig()), world, None, bank=None, precision="auto"
    )
    optimizer = make_optimizer(task.module, OptimConfig())
    groups = group_sizes(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    engine = Engine(
        task.module,
        optimizer,
        scheduler,
        world,
        batch_size=batch,
        accumulate=1,
        clip_norm=0.0,
        zero_stage=zero_stage,
        autocast=autocast,
    )
    share, side = batch // count, 224 if cuda else 64
    pixels = torch.randint(0, 256, (share, side, side), dtype=torch.uint8)
    labels = (torch.rand(share, classes) < 0.1).float()
    images = Batch([str(row) for row in range(share)], torch.arange(share), pixels, labels, None, mean=0.5, std=0.25)
    loader = SharedBatches(_One(images), share, world.rank) if shared else _One(images)

    def step() -> None:
        (batch,) = loader.batches(0)
        loss, _ = task.loss(engine(*task.inputs(batch)), batch)
        engine.backward(loss)
        engine.step()

    seconds = []
    traffic = Traffic()
    for number in range(2 + repeat + 1):
        barrier()
        with traffic if number == 2 + repeat else nullcontext():
            seconds.append(timed(step, world.device))
    answer = {"seconds": seconds[2:-1], "payload": dict(traffic.payload), "calls": dict(traffic.calls)}
    width = model.tower.projection.shape[1]
    pipe.send({**answer, "groups": groups, "width": width, "peak_bytes": peak_bytes(world.device)})
    barrier()
