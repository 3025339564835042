"""CLIP's text tower over prompt embeddings, and how prompts become its input sequences."""

from .op import encode
from .reference import TextLayer, TextTower
from .sequences import Frame, pair_indices, pair_prompts, single_prompts

__all__ = ["Frame", "TextLayer", "TextTower", "encode", "pair_indices", "pair_prompts", "single_prompts"]
