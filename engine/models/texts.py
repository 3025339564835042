"""Texts through a CLIP's text tower without their padding."""

from __future__ import annotations

from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from pspg.kernels.text_tower import Packing, encode_packed, pack_texts

from .cast_weights import CastWeights
from .clip import text_encoder


class PackedTexts(NamedTuple):
    """Token ids of N texts up to their EOS, one text after the other."""

    ids: Tensor
    """(R,) int64; 0 in rows that belong to no text"""
    positions: Tensor
    slots: Tensor
    ends: Tensor
    seen: Tensor
    """as in `Packing`"""


def pack_tokens(tokens: Tensor, rows: int | None = None) -> PackedTexts:
    """Pack token ids (N, context length) on the CPU; EOS is the largest id, and what follows it does not matter.

    Args:
        rows: R, and the grid has the context's length then; None: as many as there are tokens, the longest text's.

    Raises:
        ValueError: more tokens than rows.
    """
    ends = tokens.argmax(dim=-1)
    tokens = tokens if rows else tokens[:, : int(ends.max()) + 1]
    packing = pack_texts(ends, tokens.shape[1], rows)
    known = packing.slots < tokens.numel()
    ids = torch.where(known, tokens.flatten()[packing.slots.clamp(max=tokens.numel() - 1)], 0)
    return PackedTexts(ids, *packing)


def encode_tokens(
    clip: open_clip.CLIP, texts: PackedTexts, cast: CastWeights | None = None, *, impl: str = "auto"
) -> Tensor:
    """Text features (N,D), not normalised, of packed texts; as `clip.encode_text` of the tokens.

    Gradients flow to all text weights.

    Args:
        cast: weights that stand in for the CLIP's own.
        impl: as of `encode_packed`.

    Raises:
        ValueError: an `impl` that cannot run.
    """
    encoder = text_encoder(clip, cast)
    embeddings = F.embedding(texts.ids, encoder.token_embedding)
    return encode_packed(encoder.tower, embeddings, Packing(*texts[1:]), impl=impl)
