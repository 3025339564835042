"""Transformer decoder (paper, table 3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import DECODERS
from ._base import DecoderSizes, PromptDecoder, initialise

BLOCKS = 2
"""blocks, as published"""


class Block(nn.Module):
    """One pre-norm block; holds parameters only."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(hidden_size, heads)
        self.cross_attn = nn.MultiheadAttention(hidden_size, heads)
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(hidden_size) for _ in range(3))
        wide = 4 * hidden_size
        self.mlp = nn.Sequential(nn.Linear(hidden_size, wide), nn.ReLU(), nn.Linear(wide, hidden_size))


@DECODERS.register
class TransformerDecoder(PromptDecoder):
    """Two blocks of self-attention over classes, cross-attention to images, and an MLP."""

    name = "transformer"
    takes_present = True
    output = "fc"
    published = ("input_proj.weight", 0)

    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__(sizes)
        width, hidden_size, text_width, heads, _ = sizes
        self.encoder_proj = nn.Linear(width, hidden_size)
        self.input_proj = nn.Linear(width, hidden_size)
        self.resblocks = nn.ModuleList(Block(hidden_size, heads) for _ in range(BLOCKS))
        self.fc = nn.Linear(hidden_size, text_width)
        initialise(self)

    @classmethod
    def random_factors(cls, drop_path: float, decoders: int, prompt_length: int, like: Tensor) -> dict[str, Any]:
        """Drop-path factors `branches` (G,n,blocks,3,C), C as of `like` (C,D).

        Each residual branch of a class is dropped with a probability that grows over the blocks from 0 to `drop_path`;
        what is kept is scaled up, as in dropout.
        """
        ones = like.new_ones(decoders, prompt_length, 3, len(like))
        rates = (drop_path * block / (BLOCKS - 1) for block in range(BLOCKS))
        return {"branches": torch.stack([F.dropout(ones, rate) for rate in rates], dim=2)}
