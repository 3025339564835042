"""The prompt decoder that is not autoregressive (paper, table 3): one projection of a hidden layer is all n vectors.

It sees neither the images nor the other classes. There is no work in it to save: its one implementation is literal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kind import DecoderKind
from .reference import Decoder, linear


def decode(
    decoders: Sequence[Decoder],
    class_features: Tensor,
    context: Tensor,
    *,
    prompt_length: int,
    heads: int,
    present: Tensor | None = None,
) -> Tensor:
    """Hidden layer QuickGELU(mlp.0(t_0)) of each of G decoders, (G,C,H); arguments as `op.decode`."""
    hidden = (linear(p, "mlp.0", class_features) for p in decoders)
    return torch.stack([x * torch.sigmoid(1.702 * x) for x in hidden])


KIND = DecoderKind(
    name="mlp",
    implementations={"eager": decode, "reference": decode},
    first_weight="mlp.0.weight",
)
