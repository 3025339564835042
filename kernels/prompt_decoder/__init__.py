"""Prompt decoders: class features and image context in, pseudo-prompt vectors out."""

from .kind import DecoderKind
from .op import KINDS, Kind, decode
from .reference import Decoder

__all__ = ["KINDS", "Decoder", "DecoderKind", "Kind", "decode"]
