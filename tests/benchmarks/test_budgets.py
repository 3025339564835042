"""Budgets of a step on a GPU: launches, memory, and work that is not to be done twice; nothing is timed.

A change that lowers a number lowers it in the table below, too.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from benchmarks.model.trace import BACKWARD, FILLS, PAIRS, Operation, Step, trace_contrastive, trace_step

BATCH = 64
LAUNCHES = {14: 1020, 28: 1030, 108: 2960}
"""C → kernels of a step, 64 images"""
PEAK_GIB = {14: 0.6, 28: 1.2, 108: 1.9, 193: 2.4}
"""C → GiB alive at most, weights and optimizer state included"""
CONTRASTIVE_LAUNCHES, CONTRASTIVE_GIB = 1130, 4.8
"""of a step of phase 1: 64 images, reports of 64 tokens"""
CHUNKS = {14: 1, 28: 1, 108: 12, 193: 38}
"""C → chunks of pairs"""
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "unique", "_unique2", "equal"}
"""operators that the host waits for"""
INDEX_OPERATORS = {"sort": 1, "searchsorted": 2, "arange": 8, "triu_indices": 1}
"""operator → how often the pairs may ask for it, however many their chunks are"""
CLASSES = [14, 28, 108, pytest.param(193, marks=pytest.mark.slow)]


@cache
def step(classes: int) -> Step:
    return trace_step(classes, BATCH)


def told(operations: list[Operation]) -> str:
    """The operators of a list, most frequent first."""
    counts = Counter(f"{o.name} at {o.where}, {o.part}" for o in operations for _ in range(o.kernels))
    return "".join(f"\n{number:6d} {text}" for text, number in counts.most_common(25))


@pytest.mark.parametrize("classes", LAUNCHES)
def test_launches(classes: int) -> None:
    operations = step(classes).operations
    found = sum(o.kernels for o in operations)
    assert found <= LAUNCHES[classes], f"{found} launches:{told(operations)}"


@pytest.mark.parametrize("classes", CLASSES)
def test_memory(classes: int) -> None:
    found = step(classes)
    assert found.peak_bytes <= PEAK_GIB[classes] * 2**30, f"{found.peak_bytes / 2**30:.2f} GiB at {found.peak_at}"


@pytest.mark.parametrize("classes", CLASSES)
def test_chunks(classes: int) -> None:
    assert sum(o.name == "_pairs_kernel" for o in step(classes).operations) <= CHUNKS[classes]


@pytest.mark.parametrize("classes", CLASSES)
def test_backward_writes_no_zeros_for_gradients_that_nobody_reads(classes: int) -> None:
    zeros = [o for o in step(classes).operations if o.name == "zeros"]
    assert not zeros, told(zeros)


@pytest.mark.parametrize("classes", CLASSES)
def test_fills_of_backward(classes: int) -> None:
    """The loss's own gradient, 1; h_0 of the decoders, and the gradient that reaches their last step."""
    fills = [o for o in step(classes).operations if o.name in FILLS and o.part == BACKWARD]
    assert len(fills) <= 3, told(fills)


@pytest.mark.parametrize("classes", CLASSES)
def test_the_host_waits_for_nothing(classes: int) -> None:
    waits = [o for o in step(classes).operations if o.name in WAITS]
    assert not waits, told(waits)


@pytest.mark.parametrize("classes", CLASSES)
def test_no_constant_is_read_twice_to_be_cast(classes: int) -> None:
    """Weights, class features, images: each is stacked or cast to a dtype once a step."""
    casts = [o for o in step(classes).operations if o.name in ("_to_copy", "stack", "_foreach_copy_")]
    counts = Counter((o.result, constant) for o in casts for constant in set(o.constants))
    twice = [o for o in casts if any(counts[o.result, constant] > 1 for constant in o.constants)]
    assert not twice, told(twice)


@pytest.mark.parametrize("classes", CLASSES)
def test_indices_of_pairs_are_made_once_for_all_chunks(classes: int) -> None:
    operations = [o for o in step(classes).operations if o.part == PAIRS and o.name in INDEX_OPERATORS]
    counts = Counter(o.name for o in operations)
    assert not {name for name, count in counts.items() if count > INDEX_OPERATORS[name]}, told(operations)


def test_nothing_of_the_encoder_runs_again_in_backward() -> None:
    """With the memory that a GPU is given by default no class list of this size is encoded in groups."""
    again = [o for o in step(108).operations if o.part == BACKWARD and o.name == "addmm"]
    assert not again, told(again)


def test_a_step_of_phase_1() -> None:
    found = trace_contrastive(BATCH)
    launches = sum(o.kernels for o in found.operations)
    assert launches <= CONTRASTIVE_LAUNCHES, f"{launches} launches:{told(found.operations)}"
    assert found.peak_bytes <= CONTRASTIVE_GIB * 2**30, f"{found.peak_bytes / 2**30:.2f} GiB at {found.peak_at}"
    waits = [o for o in found.operations if o.name in WAITS]
    assert not waits, told(waits)
    # Images and positions of the pool.
    casts = [o for o in found.operations if o.name == "_to_copy" and o.constants]
    assert len(casts) <= 2, told(casts)
    norms = [o for o in found.operations if o.name in ("native_batch_norm", "relu_", "threshold_backward")]
    assert not norms, told(norms)
