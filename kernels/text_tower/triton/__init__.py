"""Block operations as Triton kernels: what a frozen block does between its matrix products."""

from ..block_operations import BlockOperations
from . import add_norm, attention, fused_block, gather

TRITON = BlockOperations(
    add_norm.add_norm,
    fused_block.mlp,
    attention.attention,
    gather.gather_prefix,
    gather.gather_suffix,
    fused_block.block_products,
)

__all__ = ["TRITON"]
