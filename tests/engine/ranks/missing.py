"""Recorded steps of ranks of which some cannot read all of their images, against one process that reads the others'.

In float64: loss and every gradient, of every decoder and pair loss, with one recording for all batches.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[3]))

from pspg.engine.config import LossConfig, ModelConfig
from pspg.engine.data.batch import Batch
from pspg.engine.distributed.world import World
from pspg.engine.models.clip import build_clip
from pspg.engine.models.decoders.gru import GRUDecoder
from pspg.engine.models.pspg import PsPG
from pspg.engine.training import cuda_graph
from pspg.engine.training.global_batch import GlobalPromptTask, SharedBatches
from pspg.engine.training.images_ahead import ImagesAhead
from pspg.engine.training.losses import PromptLoss
from pspg.engine.training.tasks import PromptTask
from tests.engine.conftest import tiny_config
from tests.engine.recorder import CheckedRecorder

SHARE = 3
"""images of a rank"""
NAMES = ["edema", "mass", "pleural effusion", "nodule", "no finding"]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gru", {"pair": "spcl"}),
    ("gru", {"pair": "spcl", "pair_samples": 1}),
    ("lstm", {"pair": "pcl", "pair_reduction": "mean", "classification_reduction": "mean"}),
    ("transformer", {"pair": "ranking", "preset": "published"}),
    ("mlp", {"pair": "pcl"}),
]


def model(decoder: str) -> PsPG:
    torch.manual_seed(0)
    clip = build_clip(tiny_config()).double().eval()
    found = PsPG(clip, ModelConfig(decoder=decoder, prompt_length=3, hidden_size=8, decoder_heads=2), NAMES)
    with torch.no_grad():
        for parameter in found.head.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return found.freeze()


def batch_of(rows: list[int], *, dummy: bool = False) -> Batch:
    """These of 100 images."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (100, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(-1, 2, (100, len(NAMES)), generator=generator).float()
    index = torch.tensor(rows)
    return Batch([str(row) for row in rows], index, pixels[index], labels[index], None, 0.5, 0.25, dummy=dummy)


def readable(ranks: int) -> list[list[int]]:
    """Images that can be read of each of several batches, by their place: all, not one, not a rank's, hardly any."""
    every, first = list(range(ranks * SHARE)), list(range(SHARE))
    return [
        every,
        [place for place in every if place != SHARE + 1],
        [place for place in every if place not in first],
        every,
        [1, ranks * SHARE - 1],
        [ranks * SHARE - 1],
    ]


def own_batch(rank: int, start: int, places: list[int]) -> Batch:
    """What the loader of a rank gives: its images, or one of another batch."""
    own = [start + place for place in places if place // SHARE == rank]
    return batch_of(own) if own else batch_of([99], dummy=True)


def close(got: Tensor | None, expected: Tensor | None) -> None:
    zero = torch.zeros((), dtype=torch.float64)
    got, expected = (zero if tensor is None else tensor for tensor in (got, expected))
    torch.testing.assert_close(got.expand_as(expected), expected, rtol=1e-9, atol=1e-11)


def check(decoder: str, loss: dict[str, Any], *, ahead: bool) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    world = World(rank, ranks, torch.device("cpu"))
    settings: dict[str, Any] = {"bank": None, "precision": "fp32"}
    parts = (model(decoder), PromptLoss(LossConfig(**loss)), world, None)
    one, shared = PromptTask(*parts, **settings), GlobalPromptTask(*parts, may_miss=True, **settings)
    sets = [(ranks * SHARE * number, places) for number, places in enumerate(readable(ranks))]
    loader = SimpleNamespace(
        batches_per_epoch=len(sets),
        bad={},
        batches=lambda epoch, start: iter([own_batch(rank, *images) for images in sets]),
    )
    batches = list(SharedBatches(loader, SHARE, rank).batches(0))
    recorder = CheckedRecorder()
    images = ImagesAhead(shared, world.device, recorder, together=True, reduce=True) if ahead else None
    graph = cuda_graph.StepGraph(shared, world.device, recorder, together=True, reduce=True)
    for number, (start, places) in enumerate(sets):
        torch.manual_seed(number)
        following = batches[number + 1] if number + 1 < len(batches) else None
        found = graph(batches[number]) if images is None else images(batches[number], following)
        assert found is not None, (graph if images is None else images.graph).refusal
        torch.manual_seed(number)
        whole = batch_of([start + place for place in places])
        tensors = one.tensors(whole)
        assert tensors is not None
        expected = one.outcome(whole, tensors, reduce=False)
        total = found[0].clone()
        dist.all_reduce(total)
        close(total / ranks, expected[0])
        for got, right in zip(found[2], expected[2], strict=True):
            close(got, right)
    assert recorder.replays == 1 + len(sets), "one recording and its check, then a replay a batch"


def check_decoders_of_others() -> None:
    """One that does not take `present` records whole batches alone; nothing is masked where nothing can be missing."""
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    parts = (model("gru"), PromptLoss(LossConfig()), world, None)
    whole, partial = SharedBatches(
        SimpleNamespace(batches_per_epoch=2, bad={}, batches=lambda *_: map(batch_of, ([0, 1, 2], [3, 4]))), SHARE, 0
    ).batches(0)
    settings: dict[str, Any] = {"bank": None, "precision": "fp32"}
    GRUDecoder.takes_present = False
    try:
        for task in (GlobalPromptTask(*parts, may_miss=True, **settings), GlobalPromptTask(*parts, **settings)):
            assert "present" not in (task.tensors(whole) or {"present": None})
            assert task.tensors(partial) is None
            assert task.pixels(partial) is None
            GRUDecoder.takes_present = True
    finally:
        GRUDecoder.takes_present = True


if __name__ == "__main__":
    dist.init_process_group("gloo")
    cuda_graph.WARM_UP = 0
    for decoder, loss in CASES:
        check(decoder, loss, ahead=False)
    check(*CASES[0], ahead=True)
    check_decoders_of_others()
    dist.barrier()
    dist.destroy_process_group()
