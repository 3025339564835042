"""Prompt decoders, one file each: the file's name is a value of `model.decoder`.

A registered class says what the rest of the engine needs to know of it, see `PromptDecoder`. `PromptDecoder.learner`
makes the prompt learner, whose forward takes class features (C,D) and image context (B,D) and returns positive and, if
any, negative prompts (2,C,n,W) or (1,C,n,W).
"""

from ...utils.registry import Registry
from ._base import PromptDecoder

DECODERS: Registry[type[PromptDecoder]] = Registry("model.decoder", __name__, __file__)

__all__ = ["DECODERS", "PromptDecoder"]
