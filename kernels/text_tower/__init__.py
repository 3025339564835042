"""CLIP's text tower over prompt embeddings, and how prompts become its input sequences."""

from .op import EncodedPrompts, default_memory, encode, encode_prompts
from .packed import Packing, encode_packed, pack_texts
from .prefix_cache import PrefixCache, Prompts
from .reference import TextLayer, TextTower
from .sequences import PromptTemplate, pair_prompts, single_prompts

__all__ = [
    "EncodedPrompts",
    "Packing",
    "PrefixCache",
    "PromptTemplate",
    "Prompts",
    "TextLayer",
    "TextTower",
    "default_memory",
    "encode",
    "encode_packed",
    "encode_prompts",
    "pack_texts",
    "pair_prompts",
    "single_prompts",
]
