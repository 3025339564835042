"""Public form of the pair loss of prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from ..dispatch import check_shapes, resolve
from ..pair_loss import pair_loss
from ..precision import compute_dtype, no_autocast
from ..text_tower import (
    Frame,
    Prefixes,
    TextTower,
    default_memory,
    encode_prompts,
    number_of_pairs,
    pair_indices,
)
from ..text_tower.block_operations import Passes
from ..text_tower.blocks import EAGER, require_frozen
from ..text_tower.op import shared_forms
from ..text_tower.prefix_cache import Tails, encode_prefixes, encode_tails, pair_rows, pair_tails, token_bytes
from . import reference
from .chunked_loss import Chunk, row_major_chunks, sampled_chunks, sum_of_chunks
from .sampling import PairSample

PairLoss = Callable[..., Tensor]
"""`pair_loss` but for features, image vectors, temperature, pairs, weights and form"""
Target = Literal["batch", "sample"]
Reduction = Literal["sum", "mean"]


def spcl(
    tower: TextTower,
    frame: Frame,
    prompts: Tensor,
    image_vectors: Tensor,
    logit_scale: Tensor,
    labels: Tensor,
    *,
    target: Target = "batch",
    reduction: Reduction = "sum",
    prefixes: Prefixes | None = None,
    sample: PairSample | None = None,
    part: tuple[int, int] | None = None,
    memory: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """SPCL or PCL of generated prompts (paper eqs. 5 to 8): pair prompts, text tower, pair loss.

    The eager form takes the pairs chunk by chunk, forward, loss and backward, and keeps their gradients only: what it
    holds of activations does not grow with the number of pairs (24 to 32 bytes of indices a pair do).

    Args:
        tower: frozen text tower.
        frame: constant embeddings around the prompts.
        prompts: (C,n,W) positive prompts.
        image_vectors: (B,D) fused image vectors.
        logit_scale: scalar, log of the inverse temperature.
        labels: (B,C) in {1, 0, -1}; -1 counts as 0.
        target: batch (SPCL) or sample (PCL).
        reduction: sum or mean. No pairs (C < 2): 0, with zero gradients.
        prefixes: what `encode_prompts` kept of the same prompts; None: they are encoded here.
        sample: pairs and weights to estimate the loss from; None: all pairs.
        part: (start, stop), the loss of these pairs alone, numbered row-major (with `sample`: in its order); losses and
            gradients of parts add up to the whole. None: all. An empty part gives 0, with zero gradients.
        memory: bytes of activations to hold at a time; None: `default_memory`. A chunk has at least one pair.
        impl: triton (exact algebra with kernels, first on a GPU; PCL's loss itself stays in torch), eager (exact
            algebra in torch; both need frozen weights), reference, or auto, the first that can run.

    Returns:
        Scalar, float32 or better.

    Raises:
        ValueError: shapes that do not fit, or an `impl` that cannot run.
    """
    check_shapes(
        "spcl",
        prompts=(prompts, "C n W"),
        suffix=(frame.suffix, "C K W"),
        projection=(tower.projection, "W D"),
        image_vectors=(image_vectors, "B D"),
        labels=(labels, "B C"),
    )
    run = resolve(impl, shared_forms(tower, impl, prompts, _chunked, _whole))
    count = number_of_pairs(len(prompts)) if sample is None else len(sample.first)
    if part is not None and not 0 <= part[0] <= part[1] <= count:
        raise ValueError(f"spcl: part {part} of {count} pairs")

    def loss(features: Tensor, vectors: Tensor, scale: Tensor, *, impl: str, **options: Any) -> Tensor:
        form = "triton" if impl == "triton" and target == "batch" else "reference"
        return pair_loss(features, vectors, scale, labels, target=target, reduction=reduction, impl=form, **options)

    memory = memory or default_memory(prompts.device)
    return run(tower, frame, prompts, image_vectors, logit_scale, loss, sample, part, prefixes, memory)


def pair_features(tower: TextTower, frame: Frame, prompts: Tensor, *, impl: str = "auto") -> Tensor:
    """(P,D) text features, not normalised, of the pair prompts of `prompts` (C,n,W), pairs i < j row-major.

    Args:
        impl: triton, eager (shared prefixes; both need frozen weights), reference, or auto, the first that can run.

    Raises:
        ValueError: an `impl` that cannot run.
    """
    first, second = pair_indices(len(prompts), prompts.device)
    run = resolve(impl, shared_forms(tower, impl, prompts, _pair_features, reference.pair_features))
    return run(tower, frame, prompts, first, second)


def _whole(
    tower: TextTower,
    frame: Frame,
    prompts: Tensor,
    image_vectors: Tensor,
    logit_scale: Tensor,
    loss: PairLoss,
    sample: PairSample | None,
    part: tuple[int, int] | None,
    *_: object,
) -> Tensor:
    """All features, then the loss; there are no prefixes to continue, and no bound on the memory."""
    first, second, weights = _pairs(prompts, sample, part)
    features = reference.pair_features(tower, frame, prompts, first, second)
    return loss(features, image_vectors, logit_scale, pairs=(first, second), weights=weights, impl="reference")


def _chunked(
    tower: TextTower,
    frame: Frame,
    prompts: Tensor,
    image_vectors: Tensor,
    logit_scale: Tensor,
    loss: PairLoss,
    sample: PairSample | None,
    part: tuple[int, int] | None,
    prefixes: Prefixes | None,
    memory: int,
    *,
    passes: Passes,
) -> Tensor:
    require_frozen(tower)
    classes, n, _ = prompts.shape
    dtype = compute_dtype(prompts)
    tower, frame, prompts = tower.to(dtype), frame.to(dtype), prompts.to(dtype)
    size = max(memory // ((n + 1 + frame.longest_name) * token_bytes(tower)), 1)
    first, second, weights = _pairs(prompts, sample, part)
    chunks, (low, high) = _chunks(classes, size, sample, part)
    form = "eager" if passes is EAGER else "triton"
    with no_autocast(prompts):
        if prefixes is None:
            some, around = prompts[None, low:high], frame.rows(low, high)
            prefixes = encode_prompts(tower, around, some, prefixes=True, memory=memory, impl=form).prefixes
        elif part is not None:
            prefixes = tuple(state[low:high] for state in prefixes)
        assert prefixes is not None
        tails = pair_tails(tower, frame, prompts)
        rows = pair_rows(frame, first, second)
        lengths = 1 + n + frame.name_lengths[first] if frame.named else None

        def loss_of(chunk: Chunk, states: Prefixes, shared: tuple[Tensor, ...]) -> Tensor:
            part = slice(*chunk[:2])
            x, entry, vectors, scale = shared
            features = encode_tails(
                tower,
                states,
                Tails(x, entry, tails.pooled),
                first[part] - (low + chunk[2]),
                rows[part],
                None if lengths is None else lengths[part],
                passes,
            )
            factors = None if weights is None else weights[part]
            return loss(features, vectors, scale, pairs=(first[part], second[part]), weights=factors, impl=form)

        return sum_of_chunks(loss_of, chunks, prefixes, (tails.x, tails.entry, image_vectors, logit_scale))


def _pairs(
    prompts: Tensor, sample: PairSample | None, part: tuple[int, int] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Classes i and j of the pairs, and the factors of their losses."""
    if sample is not None:
        return (sample if part is None else sample.part(*part)).to(prompts.device)
    first, second = pair_indices(len(prompts), prompts.device)
    return (first, second, None) if part is None else (first[slice(*part)], second[slice(*part)], None)


def _chunks(
    classes: int, size: int, sample: PairSample | None, part: tuple[int, int] | None
) -> tuple[list[Chunk], tuple[int, int]]:
    """Chunks of the pairs that `_pairs` gives, and the classes low to high among which their first ones lie."""
    if sample is not None:
        chunks = sampled_chunks((sample if part is None else sample.part(*part)).first, size)
    else:
        chunks = list(row_major_chunks(classes, size, part))
    if part is None:
        return chunks, (0, classes)
    if not chunks:
        return [], (0, 1)  # a prefix that no pair continues still hands its zero gradient to the prompts
    begin = 0 if sample is not None else part[0]
    low, high = chunks[0][2], chunks[-1][3]
    return [(start - begin, stop - begin, i - low, k - low) for start, stop, i, k in chunks], (low, high)


def _pair_features(
    tower: TextTower, frame: Frame, prompts: Tensor, first: Tensor, second: Tensor, *, passes: Passes
) -> Tensor:
    require_frozen(tower)
    dtype = compute_dtype(prompts)
    tower, frame, prompts = tower.to(dtype), frame.to(dtype), prompts.to(dtype)
    with no_autocast(prompts):
        prefixes = encode_prefixes(tower, frame, prompts, passes)
        lengths = 1 + prompts.shape[1] + frame.name_lengths[first] if frame.named else None
        tails = pair_tails(tower, frame, prompts)
        return encode_tails(tower, prefixes, tails, first, pair_rows(frame, first, second), lengths, passes)
