"""Prompt decoders: class features and image context in, pseudo-prompt vectors out."""

from .inputs import Decoder, Inputs
from .kind import DecoderKind
from .op import KINDS, decode

__all__ = ["KINDS", "Decoder", "DecoderKind", "Inputs", "decode"]
