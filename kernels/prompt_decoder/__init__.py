"""Prompt decoders: class features and image context in, pseudo-prompt vectors out."""

from .kind import DecoderKind
from .op import KINDS, decode
from .reference import Decoder

__all__ = ["KINDS", "Decoder", "DecoderKind", "decode"]
