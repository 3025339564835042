"""Attention and MLP of packed texts that train, on a CPU, where a pass over memory costs as much as it computes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..precision import compute_dtype
from .eager import QUICK


def fits(*tensors: Tensor) -> bool:
    """Whether the functions here take these: on a CPU, of one dtype, which autocast leaves as it is."""
    return all(t.device.type == "cpu" and t.dtype == tensors[0].dtype for t in tensors) and (
        compute_dtype(tensors[0]) == tensors[0].dtype
    )


def follow_on(ends: Tensor, rows: int) -> bool:
    """Whether texts with these last rows (N,) follow one another within R rows.

    Those of a packing do; the inputs that a recording of a step is checked with are reversed, and their results unread.
    """
    bounds = [-1, *ends.tolist(), rows]
    return all(start < stop for start, stop in pairwise(bounds))


def attention_by_text(heads: int, qkv: Tensor, ends: Tensor) -> Tensor:
    """Causal attention within each text, one text after the other, without a grid: a text costs its own length squared.

    Args:
        heads: number of heads.
        qkv: (R,3W), queries, keys and values.
        ends: (N,) int64, row of each text's last token; texts follow one another from row 0.

    Returns:
        (R,W); 0 in rows behind the last text.
    """
    out: Tensor = _AttentionByText.apply(heads, qkv, [0, *(ends + 1).tolist()])
    return out


def quick_gelu_mlp(y: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
    """MLP of a block with QuickGELU, silu(1.702 h) / 1.702, whose scales are in the products, also in backward.

    Args:
        y: (R,W).
        w_fc, b_fc: (4W,W) and (4W,).
        w_proj, b_proj: (W,4W) and (W,).

    Returns:
        (R,W); gradients reach all arguments.
    """
    out: Tensor = _QuickGELUMLP.apply(y, w_fc, b_fc, w_proj, b_proj)
    return out


class _AttentionByText(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: int, qkv: Tensor, bounds: list[int]) -> Tensor:
        parts = qkv.unflatten(-1, (3, heads, -1))
        out = qkv.new_empty(len(qkv), heads, parts.shape[-1])
        out[bounds[-1] :] = 0
        sums = []
        for start, stop in pairwise(bounds):
            q, k, v = _heads_first(parts[start:stop])
            attended, of_text = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True)
            out[start:stop] = attended[0].transpose(0, 1)
            sums.append(of_text)
        ctx.save_for_backward(qkv, out, *sums)
        ctx.bounds = bounds
        return out.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, *sums = ctx.saved_tensors
        rows, heads, size = out.shape
        parts, gradient = qkv.view(rows, 3, heads, size), gradient.reshape(rows, 1, heads, size)
        result = torch.empty_like(parts)
        result[ctx.bounds[-1] :] = 0
        for (start, stop), of_text in zip(pairwise(ctx.bounds), sums, strict=True):
            (g,), (o,) = _heads_first(gradient[start:stop]), _heads_first(out[start:stop, None])
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g, *_heads_first(parts[start:stop]), o, of_text, 0.0, True
            )
            for number, part in enumerate(found):
                result[start:stop, number] = part[0].transpose(0, 1)
        return None, result.view(qkv.shape), None


def _heads_first(rows: Tensor) -> tuple[Tensor, ...]:
    """(T,K,heads,d) → K times (1,heads,T,d)."""
    return rows.permute(1, 2, 0, 3)[:, None].unbind(0)


class _QuickGELUMLP(torch.autograd.Function):
    """Autograd would scale each product's gradients in passes of their own."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
        hidden = torch.addmm(b_fc, y, w_fc.T, beta=QUICK, alpha=QUICK)
        activated = F.silu(hidden)
        ctx.save_for_backward(y, hidden, activated, w_fc, w_proj)
        return torch.addmm(b_proj, activated, w_proj.T, alpha=1 / QUICK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        y, hidden, activated, w_fc, w_proj = ctx.saved_tensors
        # The scale before the activation and the one behind it cancel in what passes both.
        d_fc = torch.ops.aten.silu_backward(gradient @ w_proj, hidden)
        # With beta = 0 what would be added is not read.
        d_w_proj = torch.addmm(gradient.new_empty(1), gradient.T, activated, beta=0, alpha=1 / QUICK)
        return d_fc @ w_fc, d_fc.T @ y, d_fc.sum(0), d_w_proj, gradient.sum(0)
