"""A step on several GPUs by the model: seconds of the slowest rank, of what the ranks send, and what limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from pspg.engine.models.clip import build_clip, clip_config
from pspg.engine.training.config import OptimConfig
from pspg.engine.training.optimizer import make_optimizer
from pspg.kernels.cases import N, W

from ..setup import make_setup
from ..traffic import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Network, group_sizes, step_payload
from .assumptions import Assumptions
from .price import kind, price
from .share import Share
from .trace import BACKWARD, DECODERS, IMAGE, PAIRS, PREFIXES, SINGLES, Operation, Step, trace_contrastive, trace_step

TEXTS, REST, COMMUNICATION = "texts", "rest", "communication"
GROUPS = {PAIRS: PAIRS, PREFIXES: TEXTS, SINGLES: TEXTS, BACKWARD: TEXTS, DECODERS: DECODERS, IMAGE: IMAGE}
"""part of the step → what limits; of the outer backward what is neither decoders nor images is nearly all of texts"""
CALLS = {ALL_REDUCE: 1, ALL_GATHER: 4, REDUCE_SCATTER: 2}
"""collectives of a phase-2 step; one more all-reduce where gradients of prompts are averaged"""
BATCH_NORMS = {ALL_GATHER: 1, ALL_REDUCE: 1}
"""collectives of a batch norm over all ranks: statistics forward, two sums backward"""


@dataclass(frozen=True)
class ImageShare:
    """The part that a rank has of a step of phase 1."""

    batch: int
    ranks: int = 1
    classes: int = 0
    samples: int = 0

    @property
    def images(self) -> int:
        return math.ceil(self.batch / self.ranks)


def price_rank(share: Share | ImageShare, table: Assumptions) -> dict[str, Any]:
    """What the last rank takes in a step: seconds by what limits, of the host without a recording, and memory.

    Returns:
        `seconds`, of a recorded step; `hidden_seconds`, of its collectives, which they do not count: the mean of the
        negative prompts' gradients goes on while the pairs run, at no cost to them, and is hidden as far as they last;
        `host_seconds`, in which a host starts the kernels one by one; `peak_bytes`; `limit`, the largest of `of`.
    """
    found: dict[str, float] = {}
    launches, step = 0.0, _traced(share)
    for operation, times in _repeated(step.operations, share):
        group = _group(operation, isinstance(share, ImageShare))
        found[group] = found.get(group, 0.0) + times * price(operation, table)
        launches += times * operation.kernels
    network = Network(1e-6 * table.round_us, table.node_bandwidth, table.network_bandwidth)
    hidden = 0.0
    if isinstance(share, ImageShare):
        found[COMMUNICATION] = _sent_1(share, network)
    else:
        found[COMMUNICATION], early = _sent_2(share, network)
        hidden = min(early, found.get(PAIRS, 0.0))
        found[COMMUNICATION] -= hidden
    host = 1e-6 * table.host_us * launches
    return {
        "seconds": sum(found.values()),
        "hidden_seconds": hidden,
        "host_seconds": host,
        "peak_bytes": step.peak_bytes,
        "limit": max(found, key=lambda name: found[name]),
        "of": found,
    }


def larger(share: Share | ImageShare, ranks: int) -> Share | ImageShare:
    """The step of so many ranks with as much work for each: classes for as many pairs a rank, in phase 1 images."""
    if isinstance(share, ImageShare):
        return replace(share, batch=share.batch * ranks, ranks=ranks)
    pairs = share.pairs * ranks
    classes = round((1 + math.sqrt(1 + 8 * pairs)) / 2)
    if share.samples and 2 * share.samples * classes < pairs:
        classes = round(pairs / (2 * share.samples))
    return replace(share, classes=classes, ranks=ranks)


def work(share: Share | ImageShare) -> int:
    """What all ranks do together: pairs, in phase 1 images."""
    if isinstance(share, ImageShare):
        return share.batch
    return replace(share, ranks=1).pairs


@cache
def _traced(share: Share | ImageShare) -> Step:
    if isinstance(share, ImageShare):
        return trace_contrastive(share.images)
    return trace_step(share.classes, share.batch, share=share)


def _group(operation: Operation, phase_1: bool) -> str:
    if phase_1:
        # Backward operators do not know where they belong; images alone have four dimensions.
        of_images = operation.part == IMAGE or any(len(shape) == 4 for shape in operation.shapes)
        return IMAGE if of_images else GROUPS.get(operation.part, REST)
    return DECODERS if kind(operation) == "prompt_decoder" else GROUPS.get(operation.part, REST)


def _repeated(operations: Sequence[Operation], share: Share | ImageShare) -> Iterator[tuple[Operation, float]]:
    """Operations, and how often each runs: those of a whole chunk of pairs also for the chunks that were left out."""
    losses = [number for number, operation in enumerate(operations) if operation.name == "_pairs_kernel"]
    chunk, left = range(0), 0.0
    if isinstance(share, Share) and share.pairs > share.traced and len(losses) > 2:
        # From the loss of one whole chunk to that of the next: its backward, then the forward of the next.
        chunk = range(*next(pairwise(losses)))
        launch = operations[losses[0]].launch
        assert launch is not None
        left = (share.pairs - share.traced) / launch.arguments["pairs"]
    for number, operation in enumerate(operations):
        yield operation, 1 + left if number in chunk else 1.0


def _sent_2(share: Share, network: Network) -> tuple[float, float]:
    """Seconds of all collectives, and of the one that is under way while the pairs run.

    A recorded step averages the gradients of prompts where these are fewer than the decoders' weights.
    """
    groups, decoders = _trained()
    prompts, calls, early = 2 * share.classes * N * W, CALLS, 0.0
    if prompts < decoders:
        calls = {**CALLS, ALL_REDUCE: 2}
        early = network.seconds({ALL_REDUCE: 4 * prompts // 2}, share.ranks)
    sizes = {"classes": share.classes, "batch": share.batch, "width": 1024}
    reduced = sum(groups) - decoders + min(prompts, decoders)
    payload = step_payload(groups, share.ranks, 0, scope="global", reduced=reduced, **sizes)
    return network.seconds(payload, share.ranks, calls), early


def _sent_1(share: ImageShare, network: Network) -> float:
    """Gradients of all weights, features of all ranks, and what batch norms tell each other."""
    parameters, channels = _clip()
    features = 2 * 4 * share.batch * 1024
    seconds = network.seconds({ALL_REDUCE: 4 * parameters, ALL_GATHER: features, REDUCE_SCATTER: features}, share.ranks)
    for count in channels:
        own = {ALL_GATHER: 4 * 3 * count * share.ranks, ALL_REDUCE: 4 * 2 * count}
        seconds += network.seconds(own, share.ranks, BATCH_NORMS)
    return seconds


@cache
def _trained() -> tuple[list[int], int]:
    """Elements that train, by group of the optimizer, and those of the decoders."""
    with torch.device("meta"):
        head = make_setup(2, 1, torch.device("meta"), "eager", torch.float32).head
    decoders = sum(parameter.numel() for parameter in head.prompt_learner.parameters())
    return group_sizes(make_optimizer(head, OptimConfig())), decoders


@cache
def _clip() -> tuple[int, list[int]]:
    """Parameters of the CLIP, and channels of its batch norms."""
    with torch.device("meta"):
        clip = build_clip({**clip_config("RN50"), "quick_gelu": True})
    channels = [layer.num_features for layer in clip.modules() if isinstance(layer, nn.BatchNorm2d)]
    return sum(parameter.numel() for parameter in clip.parameters()), channels
