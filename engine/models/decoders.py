"""The prompt decoders' parameters; their mathematics is in `pspg.kernels.prompt_decoder`."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspg.kernels.prompt_decoder import Decoder, Kind

BLOCKS = 2
"""of the Transformer decoder, as published"""


class PromptDecoder(nn.Module):
    """One decoder under the published names; holds parameters only, `decode` runs several decoders at once."""

    kind: ClassVar[Kind]
    output: ClassVar[str]
    """name of the layer that makes prompt vectors of what `decode` returns"""

    def weights(self) -> Decoder:
        """Parameters by published name, for `decode`."""
        return dict(self.named_parameters())

    @property
    def projection(self) -> nn.Linear:
        """The layer `output`: to W, or to n·W where one row of `decode` is all n vectors."""
        layer = self.get_submodule(self.output)
        assert isinstance(layer, nn.Linear)
        return layer


class SelfAttention(nn.Module):
    """Attention across classes, a linear layer, and the LayerNorm that both share; holds parameters only."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(hidden_size, heads)
        self.fc = nn.Linear(hidden_size, hidden_size)
        self.layer_norm = nn.LayerNorm(hidden_size)


class RecurrentDecoder(PromptDecoder):
    """What the GRU and the LSTM decoder share; the cell goes by its kind."""

    output = "output_proj"
    cell: ClassVar[type[nn.Module]]

    def __init__(self, width: int, hidden_size: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.add_module(self.kind, self.cell(width, hidden_size))
        self.encoder_proj = nn.Linear(width, hidden_size)
        self.self_attention = SelfAttention(hidden_size, heads)
        self.encoder_attention = nn.MultiheadAttention(hidden_size, heads)
        self.fc = nn.Linear(hidden_size, width)
        self.output_proj = nn.Linear(width, text_width)
        initialise(self)


class GRUDecoder(RecurrentDecoder):
    kind = "gru"
    cell = nn.GRUCell


class LSTMDecoder(RecurrentDecoder):
    kind = "lstm"
    cell = nn.LSTMCell


class Block(nn.Module):
    """One pre-norm block; holds parameters only."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(hidden_size, heads)
        self.cross_attn = nn.MultiheadAttention(hidden_size, heads)
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(hidden_size) for _ in range(3))
        wide = 4 * hidden_size
        self.mlp = nn.Sequential(nn.Linear(hidden_size, wide), nn.ReLU(), nn.Linear(wide, hidden_size))


class TransformerDecoder(PromptDecoder):
    kind = "transformer"
    output = "fc"

    def __init__(self, width: int, hidden_size: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.encoder_proj = nn.Linear(width, hidden_size)
        self.input_proj = nn.Linear(width, hidden_size)
        self.resblocks = nn.ModuleList(Block(hidden_size, heads) for _ in range(BLOCKS))
        self.fc = nn.Linear(hidden_size, text_width)
        initialise(self)


class MLPDecoder(PromptDecoder):
    kind = "mlp"
    output = "mlp.2"

    def __init__(self, width: int, hidden_size: int, outputs: int) -> None:
        super().__init__()
        # The activation between the two, at 1, has no parameters: `decode` applies it.
        self.mlp = nn.ModuleDict({"0": nn.Linear(width, hidden_size), "2": nn.Linear(hidden_size, outputs)})
        initialise(self)


def make_decoder(
    kind: Kind, width: int, hidden_size: int, text_width: int, heads: int, prompt_length: int
) -> PromptDecoder:
    """A decoder of a kind, freshly initialised.

    Args:
        kind: gru, lstm, transformer or mlp.
        width: D, of class features, image features and the recurrent decoders' outputs.
        hidden_size: H.
        text_width: W, of the prompt vectors.
        heads: attention heads; they divide H.
        prompt_length: n; the size of the mlp decoder depends on it.
    """
    if kind == "mlp":
        return MLPDecoder(width, hidden_size, prompt_length * text_width)
    classes = {"gru": GRUDecoder, "lstm": LSTMDecoder, "transformer": TransformerDecoder}
    return classes[kind](width, hidden_size, text_width, heads)


def initialise(module: nn.Module) -> None:
    """Linear weights (attention out-projections too) from a normal of deviation 0.02 truncated at ±2, zero biases.

    Recurrent cells and attention in-projections keep torch's initialisation.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


def draw_branches(drop_path: float, decoders: int, prompt_length: int, like: Tensor) -> Tensor:
    """`branches` of `decode` for a training step of the Transformer: (G,n,blocks,3,C), C as of `like` (C,D).

    Each residual branch of a class is dropped with a probability that grows over the blocks from 0 to `drop_path`; what
    is kept is scaled up, as in dropout.
    """
    ones = like.new_ones(decoders, prompt_length, 3, len(like))
    rates = (drop_path * block / (BLOCKS - 1) for block in range(BLOCKS))
    return torch.stack([F.dropout(ones, rate) for rate in rates], dim=2)
