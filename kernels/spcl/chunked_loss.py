"""The pair loss of prompts, forward, loss and backward for a chunk of pairs at a time; exact in real arithmetic.

Every pair's loss depends on its own feature alone, so its gradient can be formed as soon as its feature is known, and
the chunk's activations dropped. What is kept for the outer backward are sums over all pairs: gradients of the prefix
cache, of the suffixes, of the image vectors and of the temperature. Nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..foreach import cast_all
from ..launch import processors
from ..pairs import Chunk, PairSelection, pair_indices
from ..precision import compute_dtype, no_autocast
from ..text_tower import Prompts, TextTower, encode_prompts
from ..text_tower.block_operations import BlockOperations, RaggedPairs
from ..text_tower.blocks import require_frozen, token_bytes
from ..text_tower.eager import EAGER
from ..text_tower.pair_chunks import PairChunks
from ..text_tower.prefix_cache import (
    PrefixCache,
    encode_prefixes,
    encode_suffixes,
    pair_suffix_index,
    pair_suffixes,
    unpadded_lengths,
)

FeatureLoss = Callable[..., Tensor]
"""(features (R,D), image vectors, logit scale, *, pairs, weights, impl) → loss of these pairs"""
ChunkLoss = Callable[[Chunk, tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]
"""(chunk, its rows of the tensors with a row a class, the other tensors) → the chunk's part of the loss"""


def chunked_loss(
    tower: TextTower,
    prompts: Prompts,
    image_vectors: Tensor,
    logit_scale: Tensor,
    loss: FeatureLoss,
    pairs: PairSelection,
    memory: int,
    *,
    operations: BlockOperations,
) -> Tensor:
    """Loss of the selected pairs, in equal chunks of at least one, each of at most `memory` bytes of activations."""
    require_frozen(tower)
    dtype = compute_dtype(prompts.vectors)
    tower, template, vectors = tower.to(dtype), prompts.template.to(dtype), prompts.vectors.to(dtype)
    n = vectors.shape[1]
    tokens = n + 1 + template.longest_name
    size = chunk_size(
        len(pairs), tokens, memory // (tokens * token_bytes(tower, operations)), processors(vectors.device)
    )
    first, second, weights = pairs.to(vectors.device)
    low, high = pairs.rows
    window, prefix_index = pairs.window, first
    if window is not None:
        low, high, prefix_index = 0, len(window), first - window[0]
    impl = "eager" if operations is EAGER else "triton"
    with no_autocast(vectors):
        if prompts.cache is None:
            if window is None:
                own, around = vectors[low:high], template.rows(low, high)
            else:
                own, around = vectors.index_select(0, window), template.take(window)
            cache = encode_prompts(tower, around, own[None], keep_cache=True, memory=memory, impl=impl).prompts.cache
            assert cache is not None
        elif window is not None:
            cache = tuple(state.index_select(0, window) for state in prompts.cache)
        else:
            cache = prompts.cache if pairs.bounds is None else tuple(state[low:high] for state in prompts.cache)
        suffixes = pair_suffixes(tower, template, vectors)
        suffix_index = pair_suffix_index(template, first, second)
        ragged = PairChunks(
            prefix_index,
            suffix_index,
            size,
            prefixes=len(vectors) if window is None else high,
            suffixes=len(suffixes.x),
            prefix_tokens=cache[0].shape[1],
            suffix_tokens=tokens,
            prefix_lengths=unpadded_lengths(template, first, n),
            pooled=suffixes.pooled_of(suffix_index),
        )
        chunks = list(pairs.chunks(size))
        if len(chunks) == 1:  # of all rows, so that their gradients need no room beside the chunk's
            chunks = [chunks[0]._replace(low=0, high=high - low)]

        def loss_of(chunk: Chunk, cache: PrefixCache, shared: tuple[Tensor, ...]) -> Tensor:
            part = slice(chunk.start, chunk.stop)
            x, entry, image_vectors, scale = shared
            own = ragged.chunk(chunk.start // size, low + chunk.low, low + chunk.high)
            features = encode_suffixes(tower, cache, suffixes._replace(x=x, entry=entry), own, operations)
            factors = None if weights is None else weights[part]
            return loss(features, image_vectors, scale, pairs=(first[part], second[part]), weights=factors, impl=impl)

        shared = (suffixes.x, suffixes.entry, image_vectors, logit_scale)
        return sum_of_chunks(loss_of, chunks, cache, shared)


def chunk_size(pairs: int, tokens: int, most: int, processors: int | None) -> int:
    """Pairs of a chunk where all chunks are equal, but for a last one shorter by less than their number.

    On a GPU the rows of a chunk, `tokens` a pair, fill whole waves of its processors where more than one chunk is
    needed: a product with W columns, the narrowest, is two tiles of 256 wide, and a tile is 128 rows high.

    Args:
        most: pairs that memory allows.
        processors: of the GPU; None: a CPU.
    """
    most = max(most, 1)
    wave = 128 * (processors or 0) // 2
    if pairs > most and wave and most * tokens >= wave:
        most = most * tokens // wave * wave // tokens
    return max(ceil(pairs / ceil(pairs / most)), 1) if pairs else 1


def pair_features(tower: TextTower, prompts: Prompts, *, operations: BlockOperations) -> Tensor:
    """(P,D) features of all pair prompts at once."""
    require_frozen(tower)
    dtype = compute_dtype(prompts.vectors)
    tower, template, vectors = tower.to(dtype), prompts.template.to(dtype), prompts.vectors.to(dtype)
    first, second = pair_indices(len(vectors), vectors.device)
    with no_autocast(vectors):
        cache = encode_prefixes(tower, template, vectors, operations, keep=len(vectors)).cache
        lengths = unpadded_lengths(template, first, vectors.shape[1])
        suffixes, suffix_index = pair_suffixes(tower, template, vectors), pair_suffix_index(template, first, second)
        ragged = RaggedPairs(
            first,
            suffix_index,
            prefixes=len(vectors),
            suffixes=len(suffixes.x),
            prefix_tokens=cache[0].shape[1],
            suffix_tokens=suffixes.x.shape[1],
            prefix_lengths=lengths,
            pooled=suffixes.pooled_of(suffix_index),
        )
        return encode_suffixes(tower, cache, suffixes, ragged, operations)


def sum_of_chunks(
    loss_of: ChunkLoss, chunks: Sequence[Chunk], by_class: Sequence[Tensor], shared: Sequence[Tensor]
) -> Tensor:
    """Σ over chunks of `loss_of`, in float32 or better, differentiable in all tensors.

    Args:
        by_class: tensors with a row a class, of which a chunk sees its rows only.
        shared: tensors that every chunk sees whole.
    """
    return _Sum.apply(loss_of, chunks, torch.is_grad_enabled(), len(by_class), *by_class, *shared)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss_of: ChunkLoss, chunks: Sequence[Chunk], recording: bool, by_class: int, *inputs: Tensor
    ) -> Tensor:
        wanted = [recording and tensor.requires_grad for tensor in inputs]
        # Sums over many chunks: float32 or better, whatever the inputs are. One chunk of all rows is its own sum.
        whole = len(chunks) == 1 and (chunks[0].low, chunks[0].high) == (0, len(inputs[0]))
        sums = [] if whole else [_zeros(tensor) for tensor, want in zip(inputs, wanted, strict=True) if want]
        total = _zeros(inputs[-1]).sum()
        for chunk in chunks:
            rows = slice(chunk.low, chunk.high)
            views = [tensor[rows] if number < by_class else tensor for number, tensor in enumerate(inputs)]
            leaves = [view.detach().requires_grad_(want) for view, want in zip(views, wanted, strict=True)]
            with torch.set_grad_enabled(any(wanted)):
                loss = loss_of(chunk, tuple(leaves[:by_class]), tuple(leaves[by_class:]))
            total += loss.detach()
            if not any(wanted):
                continue
            found = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])
            gradients = cast_all(found, [_wide(part.dtype) for part in found])
            if whole:
                sums = gradients
                continue
            places = [number for number, want in enumerate(wanted) if want]
            targets = [s[rows] if number < by_class else s for number, s in zip(places, sums, strict=True)]
            torch._foreach_add_(targets, gradients)
        ctx.save_for_backward(*sums)
        ctx.wanted, ctx.dtypes = wanted, [tensor.dtype for tensor, want in zip(inputs, wanted, strict=True) if want]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = iter(cast_all(torch._foreach_mul(ctx.saved_tensors, gradient), ctx.dtypes))
        return None, None, None, None, *(next(found) if want else None for want in ctx.wanted)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=_wide(tensor.dtype))
