"""Public form of the prompt decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..dispatch import check_shapes, resolve, with_triton
from ..precision import compute_dtype
from . import folded, reference
from .reference import Decoder

_MOST_IMAGES, _MOST_HIDDEN, _MOST_HEAD_WIDTH = 128, 1024, 128  # of the kernels


def decode(
    decoders: Sequence[Decoder],
    class_features: Tensor,
    context: Tensor,
    *,
    prompt_length: int,
    heads: int,
    impl: str = "auto",
) -> Tensor:
    """Run G independent prompt decoders for n steps (paper eqs. 3 and 4).

    Args:
        decoders: parameters of each decoder under the published names: `gru.*`, `encoder_proj.*`,
            `self_attention.*`, `encoder_attention.*`, `fc.*`.
        class_features: (C,D), t_0: text features of the class names.
        context: (B,D), global image features that the classes attend to.
        prompt_length: n.
        heads: attention heads; they divide H.
        impl: triton (up to 128 images, H of up to 1024 and of up to 128 a head; chosen by auto on a GPU), eager (the
            same exact algebra), reference, or auto.

    Returns:
        (G,C,n,D), the outputs o_i before dropout and `output_proj`.

    Raises:
        ValueError: shapes that do not fit, or an `impl` that cannot run.
    """
    check_shapes("decode", class_features=(class_features, "C D"), context=(context, "B D"))
    runs = len(context) <= _MOST_IMAGES
    for p in decoders:
        hidden = p["gru.weight_hh"].shape[-1]
        if hidden % heads:
            raise ValueError(f"decode: {heads} heads do not divide the hidden width {hidden}")
        check_shapes("decode", context=(context, "B D"), encoder_proj=(p["encoder_proj.weight"], "H D"))
        runs = runs and hidden <= min(_MOST_HIDDEN, _MOST_HEAD_WIDTH * heads)
    forms = {"eager": folded.decode, "reference": reference.decode}
    if runs:
        forms = with_triton(forms, _fused, class_features, compute_dtype(class_features))
    run = resolve(impl, forms)
    return run(decoders, class_features, context, prompt_length=prompt_length, heads=heads)


def _fused(*arguments: Any, **options: Any) -> Tensor:
    from .fused import decode  # imports triton

    return decode(*arguments, **options)
