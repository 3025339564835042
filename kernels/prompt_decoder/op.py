"""Public form of the prompt decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor

from ..dispatch import check_shapes, resolve, with_triton
from ..precision import compute_dtype
from . import eager, lstm, mlp, reference, transformer
from .reference import Decoder

Kind = Literal["gru", "lstm", "transformer", "mlp"]
_FORMS: dict[Kind, dict[str, Callable[..., Tensor]]] = {
    "gru": {"eager": eager.decode, "reference": reference.decode},
    "lstm": {"eager": lstm.eager, "reference": lstm.reference},
    "transformer": {"eager": transformer.eager, "reference": transformer.reference},
    "mlp": {"eager": mlp.decode, "reference": mlp.decode},
}
MOST_IMAGES, _MOST_HIDDEN, _MOST_HEAD_WIDTH = 128, 1024, 128  # of the kernels


def decode(
    decoders: Sequence[Decoder],
    class_features: Tensor,
    context: Tensor,
    *,
    prompt_length: int,
    heads: int,
    kind: Kind = "gru",
    branches: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Run G independent prompt decoders of one kind for n steps (paper eqs. 3 and 4; table 3).

    Args:
        decoders: parameters of each decoder under the published names: gru and lstm: `gru.*` or `lstm.*`,
            `encoder_proj.*`, `self_attention.*`, `encoder_attention.*`, `fc.*`; transformer: `encoder_proj.*`,
            `input_proj.*`, `resblocks.*`; mlp: `mlp.0.*`.
        class_features: (C,D), t_0: text features of the class names.
        context: (B,D), global image features that the classes attend to; mlp does not look at them.
        prompt_length: n.
        heads: attention heads; they divide H.
        kind: gru (the paper's), lstm, transformer or mlp.
        branches: transformer: (G,n,blocks,3,C), factors of the residual branches (self-attention, cross-attention,
            MLP) by step, block and class, for drop-path; None: all 1.
        impl: triton (gru up to 128 images, H of up to 1024 and of up to 128 a head; chosen by auto on a GPU), eager
            (the same exact algebra), reference, or auto.

    Returns:
        What the output projection makes prompt vectors of, before dropout: gru and lstm (G,C,n,D), the outputs o_i;
        transformer (G,C,n,H); mlp (G,C,H), of which one projection makes all n vectors.

    Raises:
        ValueError: shapes that do not fit, or an `impl` that cannot run.
    """
    check_shapes("decode", class_features=(class_features, "C D"), context=(context, "B D"))
    for p in decoders:
        first = p["mlp.0.weight" if kind == "mlp" else "encoder_proj.weight"]
        if first.shape[0] % heads:
            raise ValueError(f"decode: {heads} heads do not divide the hidden width {first.shape[0]}")
        check_shapes("decode", context=(context, "B D"), first_layer=(first, "H D"))
    forms = _FORMS[kind]
    if branches is not None:
        if kind != "transformer":
            raise ValueError(f"decode: branches are the transformer's, got kind {kind!r}")
        forms = {name: partial(form, branches=branches) for name, form in forms.items()}
    if kind == "gru" and _kernels_take(decoders, context, heads):
        forms = with_triton(forms, _fused, class_features, compute_dtype(class_features))
    run = resolve(impl, forms)
    return run(decoders, class_features, context, prompt_length=prompt_length, heads=heads)


def _kernels_take(decoders: Sequence[Decoder], context: Tensor, heads: int) -> bool:
    most = min(_MOST_HIDDEN, _MOST_HEAD_WIDTH * heads)
    return len(context) <= MOST_IMAGES and all(p["gru.weight_hh"].shape[-1] <= most for p in decoders)


def _fused(*arguments: Any, **options: Any) -> Tensor:
    from .triton import decode  # imports triton

    return decode(*arguments, **options)
