"""CLIP's text tower over prompt embeddings, and how prompts become its input sequences."""

from .op import encode
from .reference import TextLayer, TextTower
from .sequences import Frame, pair_indices, pair_prompts, single_prompts
from .shared_prefix import encode_pairs

__all__ = [
    "Frame",
    "TextLayer",
    "TextTower",
    "encode",
    "encode_pairs",
    "pair_indices",
    "pair_prompts",
    "single_prompts",
]
