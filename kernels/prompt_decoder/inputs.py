"""What the implementations of every kind of prompt decoder are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

Decoder = Mapping[str, Tensor]
"""Parameters of one decoder, under the published names without prefix (`gru.weight_ih`, `encoder_proj.weight`, …)."""


@dataclass(frozen=True)
class Inputs:
    """Arguments of `op.decode`, checked; it says what each is."""

    decoders: Sequence[Decoder]
    class_features: Tensor
    context: Tensor
    prompt_length: int
    heads: int
    branches: Tensor | None = None
    present: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """Context of the images that count, (B',D): which these are is read on the host."""
        return self.context if self.present is None else self.context[self.present]
