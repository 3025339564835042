"""Bytes that the ranks of a step send: counted, by formula, and what a formula of latency and bandwidth makes of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
KINDS = {
    "allreduce_": ALL_REDUCE,
    "allreduce_coalesced_": ALL_REDUCE,
    "allgather_": ALL_GATHER,
    "_allgather_base_": ALL_GATHER,
    "allgather_into_tensor_coalesced_": ALL_GATHER,
    "reduce_scatter_": REDUCE_SCATTER,
    "_reduce_scatter_base_": REDUCE_SCATTER,
}
"""c10d operator → kind; others are counted under their own name"""


class Traffic(TorchDispatchMode):
    """Counts the collectives of this rank while it is active: `payload`, bytes of each kind, and `calls`.

    The payload is the whole tensor that a collective reduces, gathers or scatters, whatever a rank sends of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            kind = KINDS.get(name, name)
            self.payload[kind] += max(map(_bytes, args))
            self.calls[kind] += 1
        return function(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    return sum(tensor.nbytes for tensor in tree_iter(argument) if isinstance(tensor, Tensor))


def group_sizes(optimizer: Optimizer) -> list[int]:
    """Elements of each group."""
    return [sum(parameter.numel() for parameter in group["params"]) for group in optimizer.param_groups]


def step_payload(
    groups: Sequence[int],
    ranks: int,
    zero_stage: int,
    *,
    scope: str,
    classes: int,
    batch: int,
    width: int,
    reduced: int | None = None,
) -> dict[str, int]:
    """Bytes of payload that a phase-2 step needs, by kind of collective.

    Gradients are reduced in fp32; one rank without ZeRO sends nothing. ZeRO 1 and 2 update a part of the weights each
    and gather them, padded to a multiple of twice the ranks, and add up the gradient norm of each group. Under scope
    global ranks gather the labels and numbers of their images, the context, the text features and the image vectors,
    and scatter the gradients of the last two.

    Args:
        groups: elements that train, by group of the optimizer.
        batch: images over all ranks.
        width: D, of features.
        reduced: elements whose gradients are averaged, in a recorded step: those of the prompts in place of the
            decoders' weights, if they are fewer, and of the other weights; None: of all weights.
    """
    if ranks == 1 and not zero_stage:
        return {}  # its gradients are the means
    found = {ALL_REDUCE: 4 * (sum(groups) if reduced is None else reduced)}
    if zero_stage:
        found[ALL_REDUCE] += 4 * len(groups)
        found[ALL_GATHER] = 4 * sum(math.ceil(count / (2 * ranks)) * 2 * ranks for count in groups)
    if scope == "local" or ranks == 1:
        return found
    images = 4 * batch * width
    # Pieces of unequal length are padded; where there are fewer classes than ranks, each encodes them all.
    texts = 4 * 2 * width * ranks * math.ceil(classes / ranks) if ranks <= classes else 0
    labels = 4 * (ranks + batch * classes)
    found[ALL_GATHER] = found.get(ALL_GATHER, 0) + labels + 2 * images + texts
    found[REDUCE_SCATTER] = images + texts
    return found


@dataclass(frozen=True)
class Network:
    """α–β model of rings: a collective of S bytes on N ranks takes rounds · (α + S / N / β)."""

    latency: float
    """α, seconds a round"""
    node_bandwidth: float
    """β within a node, bytes/s a GPU"""
    network_bandwidth: float
    """β between nodes, bytes/s a GPU"""
    gpus_per_node: int = 8

    def seconds(self, payload: Mapping[str, int], ranks: int, calls: Mapping[str, int] | None = None) -> float:
        """Seconds of the collectives of a step, one after the other, none hidden behind computation.

        Args:
            payload: bytes, by kind of collective.
            calls: collectives of a kind, that the bytes are of; one where it says nothing.
        """
        bandwidth = self.node_bandwidth if ranks <= self.gpus_per_node else self.network_bandwidth
        rounds = {kind: (ranks - 1) * (2 if kind == ALL_REDUCE else 1) for kind in payload}
        return math.fsum(
            rounds[kind] * ((calls or {}).get(kind, 1) * self.latency + size / ranks / bandwidth)
            for kind, size in payload.items()
        )
