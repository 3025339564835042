"""The GRU prompt decoder (paper 3.2, eqs. 3 and 4), the paper's: the one kind with kernels."""

from __future__ import annotations

from torch import Tensor

from . import eager, reference
from .inputs import Inputs
from .kind import DecoderKind, TritonImplementation

MOST_IMAGES = 128
"""context images that the kernels take"""


def parameter_shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Published name → shape of every parameter of a GRU decoder that `decode` reads."""
    shapes: dict[str, tuple[int, ...]] = {
        "gru.weight_ih": (3 * hidden, width),
        "gru.weight_hh": (3 * hidden, hidden),
        "gru.bias_ih": (3 * hidden,),
        "gru.bias_hh": (3 * hidden,),
        "encoder_proj.weight": (hidden, width),
        "encoder_proj.bias": (hidden,),
        "self_attention.fc.weight": (hidden, hidden),
        "self_attention.fc.bias": (hidden,),
        "self_attention.layer_norm.weight": (hidden,),
        "self_attention.layer_norm.bias": (hidden,),
        "fc.weight": (width, hidden),
        "fc.bias": (width,),
    }
    for name in ("self_attention.self_attention", "encoder_attention"):
        shapes[f"{name}.in_proj_weight"] = (3 * hidden, hidden)
        shapes[f"{name}.in_proj_bias"] = (3 * hidden,)
        shapes[f"{name}.out_proj.weight"] = (hidden, hidden)
        shapes[f"{name}.out_proj.bias"] = (hidden,)
    return shapes


def _triton(inputs: Inputs) -> Tensor:
    from .triton import decode  # imports triton

    return decode(inputs)


KIND = DecoderKind(
    name="gru",
    implementations={"eager": eager.decode, "reference": reference.decode},
    first_weight="encoder_proj.weight",
    triton=TritonImplementation(_triton, images=MOST_IMAGES, hidden=1024, head_width=128),
)
