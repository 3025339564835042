"""Prompt decoders of every kind behind one function."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import check_shapes, resolve, with_triton
from ..precision import compute_dtype
from . import gru, lstm, mlp, transformer
from .gru import MOST_IMAGES as MOST_IMAGES
from .inputs import Decoder, Inputs
from .kind import DecoderKind

KINDS: dict[str, DecoderKind] = {kind.name: kind for kind in (gru.KIND, lstm.KIND, transformer.KIND, mlp.KIND)}
"""name → kind; a kind that is added here can be decoded"""


def decode(
    decoders: Sequence[Decoder],
    class_features: Tensor,
    context: Tensor,
    *,
    prompt_length: int,
    heads: int,
    kind: str = "gru",
    branches: Tensor | None = None,
    present: Tensor | None = None,
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
        present: (B,) bool, images that count, one at least; the others are as if they were not there, and no value of
            it is read on the host but by reference. None: all.
        impl: triton (gru up to 128 images, H of up to 1024 and of up to 128 a head; chosen by auto on a GPU), eager
            (the same exact algebra), reference, or auto.

    Returns:
        What the output projection makes prompt vectors of, before dropout: gru and lstm (G,C,n,D), the outputs o_i;
        transformer (G,C,n,H); mlp (G,C,H), of which one projection makes all n vectors.

    Raises:
        ValueError: an unknown kind, shapes that do not fit, or an `impl` that cannot run.
    """
    if kind not in KINDS:
        raise ValueError(f"decode: kind {kind!r} is not known, choose from {', '.join(KINDS)}")
    chosen = KINDS[kind]
    check_shapes("decode", class_features=(class_features, "C D"), context=(context, "B D"))
    first_weights = [p[chosen.first_weight] for p in decoders]
    for weight in first_weights:
        if weight.shape[0] % heads:
            raise ValueError(f"decode: {heads} heads do not divide the hidden width {weight.shape[0]}")
        check_shapes("decode", context=(context, "B D"), first_layer=(weight, "H D"))
    available = chosen.implementations
    if branches is not None and not chosen.takes_branches:
        takers = ", ".join(name for name, other in KINDS.items() if other.takes_branches)
        raise ValueError(f"decode: branches are the {takers}'s, got kind {kind!r}")
    if present is not None:
        check_shapes("decode", context=(context, "B D"), present=(present, "B"))
    hidden = max(weight.shape[0] for weight in first_weights)
    if chosen.triton is not None and chosen.triton.takes(images=len(context), hidden=hidden, heads=heads):
        available = with_triton(available, chosen.triton.decode, class_features, compute_dtype(class_features))
    run = resolve(impl, available)
    return run(Inputs(decoders, class_features, context, prompt_length, heads, branches, present))
