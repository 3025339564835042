"""The pair loss of prompts, forward, loss and backward for a chunk of pairs at a time; exact in real arithmetic.

Every pair's loss depends on its own feature alone, so its gradient can be formed as soon as its feature is known, and
the chunk's activations dropped. What is kept for the outer backward are sums over all pairs: gradients of the prefix
cache, of the suffixes, of the image vectors and of the temperature. Nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..pairs import Chunk, PairSelection, pair_indices
from ..precision import compute_dtype, no_autocast
from ..text_tower import Prompts, TextTower, encode_prompts
from ..text_tower.block_operations import BlockOperations
from ..text_tower.blocks import require_frozen, token_bytes
from ..text_tower.eager import EAGER
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
    """Loss of the selected pairs; as many pairs a chunk as `memory` bytes of activations allow, at least one."""
    require_frozen(tower)
    dtype = compute_dtype(prompts.vectors)
    tower, template, vectors = tower.to(dtype), prompts.template.to(dtype), prompts.vectors.to(dtype)
    n = vectors.shape[1]
    size = max(memory // ((n + 1 + template.longest_name) * token_bytes(tower)), 1)
    first, second, weights = pairs.to(vectors.device)
    low, high = pairs.rows
    impl = "eager" if operations is EAGER else "triton"
    with no_autocast(vectors):
        if prompts.cache is None:
            rows = vectors[None, low:high], template.rows(low, high)
            cache = encode_prompts(tower, rows[1], rows[0], keep_cache=True, memory=memory, impl=impl).prompts.cache
            assert cache is not None
        else:
            cache = prompts.cache if pairs.bounds is None else tuple(state[low:high] for state in prompts.cache)
        suffixes = pair_suffixes(tower, template, vectors)
        suffix_index = pair_suffix_index(template, first, second)
        lengths = unpadded_lengths(template, first, n)

        def loss_of(chunk: Chunk, cache: PrefixCache, shared: tuple[Tensor, ...]) -> Tensor:
            part = slice(chunk.start, chunk.stop)
            x, entry, image_vectors, scale = shared
            features = encode_suffixes(
                tower,
                cache,
                suffixes._replace(x=x, entry=entry),
                first[part] - (low + chunk.low),
                suffix_index[part],
                None if lengths is None else lengths[part],
                operations,
            )
            factors = None if weights is None else weights[part]
            return loss(features, image_vectors, scale, pairs=(first[part], second[part]), weights=factors, impl=impl)

        shared = (suffixes.x, suffixes.entry, image_vectors, logit_scale)
        return sum_of_chunks(loss_of, pairs.chunks(size), cache, shared)


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
        return encode_suffixes(tower, cache, suffixes, first, suffix_index, lengths, operations)


def sum_of_chunks(
    loss_of: ChunkLoss, chunks: Iterable[Chunk], by_class: Sequence[Tensor], shared: Sequence[Tensor]
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
        ctx: Any, loss_of: ChunkLoss, chunks: Iterable[Chunk], recording: bool, by_class: int, *inputs: Tensor
    ) -> Tensor:
        wanted = [recording and tensor.requires_grad for tensor in inputs]
        # Sums over many chunks: float32 or better, whatever the inputs are.
        sums = [_zeros(tensor) if want else None for tensor, want in zip(inputs, wanted, strict=True)]
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
            gradients = iter(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad]))
            for number, buffer in enumerate(sums):
                if buffer is not None:
                    (buffer[rows] if number < by_class else buffer).add_(next(gradients))
        ctx.save_for_backward(*sums)
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, None, None, *(None if t is None else (t * gradient).to(dtype) for t, dtype in found)


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
