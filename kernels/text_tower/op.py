"""The text tower's public functions."""

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
from .block_operations import BlockOperations
from .blocks import is_frozen, require_frozen, token_bytes
from .eager import EAGER
from .prefix_cache import Prompts, encode_prefixes
from .reference import TextTower
from .sequences import PromptTemplate, single_prompts


class EncodedPrompts(NamedTuple):
    """Single prompts through the text tower."""

    features: Tensor
    """(G,C,D), not normalised"""
    prompts: Prompts
    """the first decoder's prompts, for `spcl`; with their prefix cache if that was asked for and the implementation has
    one"""


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
    template: PromptTemplate,
    prompts: Tensor,
    *,
    keep_cache: bool = False,
    memory: int | None = None,
    impl: str = "auto",
) -> EncodedPrompts:
    """Text features of the single prompts [SOS, V_c, suffix_c] that G decoders wrote for C classes (paper 3.2).

    Gradients flow to `prompts`. Where the activations that backward needs exceed `memory`, classes are encoded in
    groups, and each group once more in backward.

    Args:
        tower: the tower.
        template: constant token embeddings around the prompts.
        prompts: (G,C,n,W).
        keep_cache: keep the prefix cache of `prompts[0]` for `spcl`.
        memory: bytes of activations to hold at a time; None: `default_memory`.
        impl: triton (prefix cache, kernels between the matrix products; first on a GPU), eager (the same in torch; both
            need frozen weights), reference (77 tokens a prompt), or auto, the first that can run.

    Raises:
        ValueError: shapes that do not fit, or an `impl` that cannot run.
    """
    run = resolve(impl, implementations(tower, impl, prompts, _encode_with_cache, _encode_whole))
    check_shapes("encode_prompts", prompts=(prompts, "G C n W"), token_suffix=(template.token_suffix, "C K W"))
    return run(tower, template, prompts, keep_cache, memory or default_memory(prompts.device))


def implementations(
    tower: TextTower, impl: str, vectors: Tensor, cached: Callable[..., Any], literal: Callable[..., Any]
) -> dict[str, Callable[..., Any]]:
    """Implementations of an operator on prompts: `literal`, and `cached` with one `operations` or another.

    `auto` skips those that would drop gradients of a tower that trains.
    """
    if impl == "auto" and not is_frozen(tower):
        return {"reference": literal}
    eager: dict[str, Callable[..., Any]] = {"eager": partial(cached, operations=EAGER), "reference": literal}
    return with_triton(eager, partial(_with_kernels, cached), vectors, compute_dtype(vectors))


def _with_kernels(cached: Callable[..., Any], *arguments: Any) -> Any:
    from .triton import TRITON  # imports triton

    return cached(*arguments, operations=TRITON)


def _encode_whole(
    tower: TextTower, template: PromptTemplate, prompts: Tensor, keep_cache: bool, memory: int
) -> EncodedPrompts:
    sides = [single_prompts(side, template, tokens=tower.context_length) for side in prompts]
    embeddings, pooled = (torch.cat(parts) for parts in zip(*sides, strict=True))
    features = reference.encode(tower, embeddings, pooled).unflatten(0, prompts.shape[:2])
    return EncodedPrompts(features, Prompts(prompts[0], template))


def _encode_with_cache(
    tower: TextTower,
    template: PromptTemplate,
    prompts: Tensor,
    keep_cache: bool,
    memory: int,
    *,
    operations: BlockOperations,
) -> EncodedPrompts:
    require_frozen(tower)
    given = Prompts(prompts[0], template)
    dtype = compute_dtype(prompts)
    tower, template, prompts = tower.to(dtype), template.to(dtype), prompts.to(dtype)
    sides, classes, n, _ = prompts.shape

    def encode_group(prompts: Tensor, template: PromptTemplate) -> tuple[Tensor, ...]:
        count = len(template.lengths)
        keep = count if keep_cache else 0
        encoded = encode_prefixes(tower, template, prompts.flatten(0, 1), operations, keep=keep, singles=True)
        assert encoded.features is not None
        return encoded.features.unflatten(0, (sides, count)), *encoded.cache

    with no_autocast(prompts):
        needed = sides * template.single_tokens(n) * token_bytes(tower)
        size = max(memory // needed, 1)
        groups = []
        for start in range(0, classes, size):
            stop = min(start + size, classes)
            part = prompts[:, start:stop], template.rows(start, stop)
            if size < classes and torch.is_grad_enabled():
                groups.append(checkpoint(encode_group, *part, use_reentrant=False, preserve_rng_state=False))
            else:
                groups.append(encode_group(*part))
    features, *states = zip(*groups, strict=True)
    cache = tuple(map(torch.cat, states)) or None
    return EncodedPrompts(torch.cat(features, dim=1), given._replace(cache=cache))
