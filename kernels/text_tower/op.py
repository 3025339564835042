"""Public forms of the text tower."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..dispatch import check_shapes, resolve, with_triton
from ..precision import compute_dtype, no_autocast
from . import reference
from .block_operations import Passes
from .blocks import EAGER, is_frozen, require_frozen
from .prefix_cache import Prefixes, encode_prefixes, encode_tails, single_tails, token_bytes
from .reference import TextTower
from .sequences import Frame, single_prompts


class PromptFeatures(NamedTuple):
    """Single prompts through the text tower."""

    features: Tensor
    """(G,C,D), not normalised"""
    prefixes: Prefixes | None
    """states of the first decoder's prefixes, where asked for and the form has them: `spcl` continues them"""


def default_memory(device: torch.device) -> int:
    """Bytes of the text tower's activations to hold at a time, where the caller names none.

    Measured on two CPU cores: larger chunks are no faster, and beyond 32 MB a tensor the allocator asks the system for
    fresh pages every time. The GPU's number is a guess: larger products, to keep it busy.
    """
    return 2**30 if device.type == "cuda" else 2**29


def encode(tower: TextTower, embeddings: Tensor, pooled: Tensor | int, *, impl: str = "auto") -> Tensor:
    """Text features of N embedding sequences, the token embedding bypassed.

    Gradients flow to `embeddings`, and to the tower's weights where they require them.

    Args:
        tower: the tower.
        embeddings: (N,T,W), before the positional embedding; T up to the tower's context length.
        pooled: position of the feature, one for all or (N,) int64. Tokens after it do not matter.
        impl: auto or reference.

    Returns:
        (N,D), not normalised.

    Raises:
        ValueError: shapes that do not fit, sequences longer than the context, or an `impl` that cannot run.
    """
    run = resolve(impl, {"reference": reference.encode})
    if isinstance(pooled, int):
        pooled = torch.full((len(embeddings),), pooled, device=embeddings.device)
    check_shapes(
        "encode",
        embeddings=(embeddings, "N T W"),
        positional_embedding=(tower.positional_embedding, "context W"),
        pooled=(pooled, "N"),
    )
    if embeddings.shape[1] > tower.context_length:
        raise ValueError(f"encode: {embeddings.shape[1]} tokens, the context holds {tower.context_length}")
    return run(tower, embeddings, pooled)


def encode_prompts(
    tower: TextTower,
    frame: Frame,
    prompts: Tensor,
    *,
    prefixes: bool = False,
    memory: int | None = None,
    impl: str = "auto",
) -> PromptFeatures:
    """Text features of the single prompts [SOS, V_c, suffix_c] that G decoders wrote for C classes (paper 3.2).

    Gradients flow to `prompts`. Where the activations that backward needs exceed `memory`, classes are encoded in
    groups, and each group once more in backward.

    Args:
        tower: the tower.
        frame: constant embeddings around the prompts.
        prompts: (G,C,n,W).
        prefixes: keep the prefixes of `prompts[0]` for `spcl`.
        memory: bytes of activations to hold at a time; None: `default_memory`.
        impl: triton (shared prefixes with kernels between the matrix products; first on a GPU), eager (the same in
            torch; both need frozen weights), reference (77 tokens a prompt), or auto, the first that can run.

    Raises:
        ValueError: shapes that do not fit, or an `impl` that cannot run.
    """
    run = resolve(impl, shared_forms(tower, impl, prompts, _encode_prompts, _encode_whole_prompts))
    check_shapes("encode_prompts", prompts=(prompts, "G C n W"), suffix=(frame.suffix, "C K W"))
    return run(tower, frame, prompts, prefixes, memory or default_memory(prompts.device))


def shared_forms(
    tower: TextTower, impl: str, prompts: Tensor, shared: Callable[..., Any], literal: Callable[..., Any]
) -> dict[str, Callable[..., Any]]:
    """Forms of an operator on prompts: `shared` takes the `Passes` of its form as `passes`.

    `auto` skips the forms that would drop gradients of a tower that trains.
    """
    if impl == "auto" and not is_frozen(tower):
        return {"reference": literal}
    eager: dict[str, Callable[..., Any]] = {"eager": partial(shared, passes=EAGER), "reference": literal}
    return with_triton(eager, partial(_with_kernels, shared), prompts, compute_dtype(prompts))


def _with_kernels(shared: Callable[..., Any], *arguments: Any) -> Any:
    from .triton import FUSED  # imports triton

    return shared(*arguments, passes=FUSED)


def _encode_whole_prompts(
    tower: TextTower, frame: Frame, prompts: Tensor, prefixes: bool, memory: int
) -> PromptFeatures:
    sides = [single_prompts(side, frame, tokens=tower.context_length) for side in prompts]
    embeddings, pooled = (torch.cat(parts) for parts in zip(*sides, strict=True))
    return PromptFeatures(reference.encode(tower, embeddings, pooled).unflatten(0, prompts.shape[:2]), None)


def _encode_prompts(
    tower: TextTower, frame: Frame, prompts: Tensor, prefixes: bool, memory: int, *, passes: Passes
) -> PromptFeatures:
    require_frozen(tower)
    dtype = compute_dtype(prompts)
    tower, frame, prompts = tower.to(dtype), frame.to(dtype), prompts.to(dtype)
    sides, classes, n, _ = prompts.shape

    def encode_group(prompts: Tensor, frame: Frame) -> tuple[Tensor, ...]:
        states = encode_prefixes(tower, frame, prompts.flatten(0, 1), passes)
        count = len(frame.lengths)
        rows = torch.arange(sides * count, device=prompts.device)
        lengths = (1 + n + frame.name_lengths).repeat(sides) if frame.named else None
        features = encode_tails(tower, states, single_tails(tower, frame, n), rows, rows % count, lengths, passes)
        kept = (state[:count] for state in states) if prefixes else ()
        return features.unflatten(0, (sides, count)), *kept

    with no_autocast(prompts):
        needed = sides * (1 + n + frame.longest_name + (2 if frame.named else 1)) * token_bytes(tower)
        size = max(memory // needed, 1)
        groups = []
        for start in range(0, classes, size):
            stop = min(start + size, classes)
            part = prompts[:, start:stop], frame.rows(start, stop)
            if size < classes and torch.is_grad_enabled():
                groups.append(checkpoint(encode_group, *part, use_reentrant=False, preserve_rng_state=False))
            else:
                groups.append(encode_group(*part))
    features, *states = zip(*groups, strict=True)
    return PromptFeatures(torch.cat(features, dim=1), tuple(map(torch.cat, states)) or None)
