"""Prompt decoders: class features and image context in, pseudo-prompt vectors out."""

from .op import Kind, decode
from .reference import Decoder

__all__ = ["Decoder", "Kind", "decode"]
