"""Block operations as Triton kernels: what a frozen block does between its matrix products."""

from ..block_operations import BlockOperations
from . import add_norm, attention, gather, quick_gelu

TRITON = BlockOperations(
    add_norm.add_norm,
    quick_gelu.mlp,
    attention.attention,
    gather.gather_prefix,
    gather.gather_suffix,
    lambda t, x: None,
)

__all__ = ["TRITON"]
