"""SPCL's public functions."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor

from ..dispatch import check_shapes, resolve
from ..pair_loss.op import pair_loss, stand_ins
from ..pairs import PairSelection, pair_indices
from ..text_tower import Prompts, TextTower, default_memory
from ..text_tower.op import implementations
from . import chunked_loss, reference

Target = Literal["batch", "sample"]
Reduction = Literal["sum", "mean"]


class ImageBatch(NamedTuple):
    """B images as a pair loss sees them."""

    vectors: Tensor
    """(B,D) fused image vectors"""
    logit_scale: Tensor
    """scalar, log of the inverse temperature"""
    labels: Tensor
    """(B,C) in {1, 0, -1}; -1 counts as 0"""
    present: Tensor | None = None
    """(B,) bool, images that count; None: all"""


def spcl(
    tower: TextTower,
    prompts: Prompts,
    images: ImageBatch,
    *,
    target: Target = "batch",
    reduction: Reduction = "sum",
    pairs: PairSelection | None = None,
    memory: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """SPCL or PCL of generated prompts (paper eqs. 5 to 8): pair prompts, text tower, pair loss.

    Eager and triton take the pairs in chunks, forward, loss and backward, and keep their gradients only: what they hold
    of activations does not grow with the number of pairs (32 bytes of indices a pair do, 48 with kernels).

    Args:
        tower: frozen text tower.
        prompts: positive prompts of C classes, with their prefix cache from `encode_prompts`, or without: prefixes are
            encoded here then.
        images: B images.
        target: batch (SPCL) or sample (PCL).
        reduction: sum, or mean over all P pairs (PCL: B·P). No pairs (C < 2): 0, with zero gradients.
        pairs: the pairs to take; None: all. Losses and gradients of parts add up to the whole; an empty part gives 0,
            with zero gradients.
        memory: bytes of activations to hold at a time; None: `default_memory`. A chunk has at least one pair.
        impl: triton (exact algebra with kernels, first on a GPU; PCL's loss itself stays in torch), eager (exact
            algebra in torch; both need frozen weights), reference, or auto, the first that can run.

    Returns:
        Scalar, float32 or better.

    Raises:
        ValueError: shapes that do not fit, or an `impl` that cannot run.
    """
    vectors, (image_vectors, logit_scale, labels, present) = prompts.vectors, images
    sizes = check_shapes(
        "spcl",
        prompts=(vectors, "C n W"),
        token_suffix=(prompts.template.token_suffix, "C K W"),
        projection=(tower.projection, "W D"),
        image_vectors=(image_vectors, "B D"),
        labels=(labels, "B C"),
    )
    if present is not None and target == "batch":  # once, not in every chunk
        (image_vectors, labels), present = stand_ins(image_vectors, labels, present), None
    run = resolve(impl, implementations(tower, impl, vectors, chunked_loss.chunked_loss, reference.whole_loss))
    if pairs is None:
        pairs = PairSelection(sizes["C"])
    if pairs.classes != sizes["C"]:
        raise ValueError(f"spcl: pairs of {pairs.classes} classes, the prompts are of {sizes['C']}")

    def loss(features: Tensor, vectors: Tensor, scale: Tensor, *, impl: str, **options: Any) -> Tensor:
        best = "triton" if impl == "triton" and target == "batch" else "reference"
        about: dict[str, Any] = {"present": present, "target": target, "reduction": reduction}
        return pair_loss(features, vectors, scale, labels, impl=best, **about, **options)

    return run(tower, prompts, image_vectors, logit_scale, loss, pairs, memory or default_memory(vectors.device))


def pair_features(tower: TextTower, prompts: Prompts, *, impl: str = "auto") -> Tensor:
    """(P,D) text features, not normalised, of all pair prompts, pairs i < j row-major.

    Args:
        tower: the tower.
        prompts: prompts of C classes; a cache is not used.
        impl: triton, eager (prefix cache; both need frozen weights), reference, or auto, the first that can run.

    Raises:
        ValueError: an `impl` that cannot run.
    """
    run = resolve(impl, implementations(tower, impl, prompts.vectors, chunked_loss.pair_features, _literal_features))
    return run(tower, prompts)


def _literal_features(tower: TextTower, prompts: Prompts) -> Tensor:
    first, second = pair_indices(len(prompts.vectors), prompts.vectors.device)
    return reference.pair_features(tower, prompts.template, prompts.vectors, first, second)
