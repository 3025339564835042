"""A kind of prompt decoder, described for `decode`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from .inputs import Inputs

Implementation = Callable[[Inputs], Tensor]
"""inputs → outputs, as `op.decode`"""


@dataclass(frozen=True)
class TritonImplementation:
    """An implementation in kernels, and the largest shapes it takes."""

    decode: Implementation
    """imports triton when it is called"""
    images: int
    hidden: int
    """H"""
    head_width: int
    """H/heads"""

    def takes(self, *, images: int, hidden: int, heads: int) -> bool:
        """Tell if the kernels run at B images, hidden width H and this number of heads."""
        return images <= self.images and hidden <= min(self.hidden, self.head_width * heads)


@dataclass(frozen=True)
class DecoderKind:
    """A kind of prompt decoder, declared once in its module."""

    name: str
    implementations: Mapping[str, Implementation]
    """name → implementation in torch, the one that `auto` takes first"""
    first_weight: str
    """published name of the weight (H,D) of a first layer, which says how wide the decoder is"""
    takes_branches: bool = False
    """its implementations read `branches`, factors of residual branches"""
    triton: TritonImplementation | None = None
