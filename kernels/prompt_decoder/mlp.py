"""The prompt decoder that is not autoregressive (paper, table 3): one projection of a hidden layer is all n vectors.

It sees neither the images nor the other classes. There is no work in it to save: its one implementation is literal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import Inputs
from .kind import DecoderKind
from .reference import linear


def decode(inputs: Inputs) -> Tensor:
    """Hidden layer QuickGELU(mlp.0(t_0)) of each of G decoders, (G,C,H)."""
    hidden = (linear(p, "mlp.0", inputs.class_features) for p in inputs.decoders)
    return torch.stack([x * torch.sigmoid(1.702 * x) for x in hidden])


KIND = DecoderKind(
    name="mlp",
    implementations={"eager": decode, "reference": decode},
    first_weight="mlp.0.weight",
)
