"""Prompt decoder: class features and image context in, pseudo-prompt vectors out."""

from .op import decode
from .reference import Decoder

__all__ = ["Decoder", "decode"]
