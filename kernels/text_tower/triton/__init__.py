"""Block operations as Triton kernels: what a frozen block does between its matrix products."""

from ..block_operations import BlockOperations
from . import add_norm, attention, fused_block, gather, pooled_attention, pooled_norm

# Two inputs of LayerNorms, and the token's queries, keys and values.
TRITON = BlockOperations(
    5,
    add_norm.add_norm,
    fused_block.mlp,
    attention.attention,
    pooled_norm.pooled_norm,
    pooled_attention.pooled_attention,
    gather.gather_suffix,
    fused_block.block_products,
)

__all__ = ["TRITON"]
