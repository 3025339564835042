"""The prompt decoder's parameters; its mathematics is in `pspg.kernels.prompt_decoder`."""

from __future__ import annotations

from torch import nn

from pspg.kernels.prompt_decoder import Decoder


class SelfAttention(nn.Module):
    """Attention across classes, a linear layer, and the LayerNorm that both share; holds parameters only."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(hidden_size, heads)
        self.fc = nn.Linear(hidden_size, hidden_size)
        self.layer_norm = nn.LayerNorm(hidden_size)


class PromptDecoder(nn.Module):
    """One GRU decoder under the published names; holds parameters only, `decode` runs several decoders at once.

    Linear weights (attention out-projections too) start from a normal of deviation 0.02 truncated at ±2 with zero
    biases; the GRU and the attention in-projections keep torch's initialisation.

    Args:
        width: D, of class features, image features and outputs.
        hidden_size: H.
        text_width: W, of the prompt vectors.
        heads: attention heads; they divide H.
    """

    def __init__(self, width: int, hidden_size: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.gru = nn.GRUCell(width, hidden_size)
        self.encoder_proj = nn.Linear(width, hidden_size)
        self.self_attention = SelfAttention(hidden_size, heads)
        self.encoder_attention = nn.MultiheadAttention(hidden_size, heads)
        self.fc = nn.Linear(hidden_size, width)
        self.output_proj = nn.Linear(width, text_width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def weights(self) -> Decoder:
        """Parameters by published name, for `decode`."""
        return dict(self.named_parameters())
