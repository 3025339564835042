"""CLIP's text tower over prompt embeddings, and how prompts become its input sequences."""

from .op import PromptFeatures, default_memory, encode, encode_prompts
from .prefix_cache import Prefixes
from .reference import TextLayer, TextTower
from .sequences import Frame, number_of_pairs, pair_indices, pair_prompts, single_prompts

__all__ = [
    "Frame",
    "Prefixes",
    "PromptFeatures",
    "TextLayer",
    "TextTower",
    "default_memory",
    "encode",
    "encode_prompts",
    "number_of_pairs",
    "pair_indices",
    "pair_prompts",
    "single_prompts",
]
