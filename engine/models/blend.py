"""Learned prompts and fixed templates blended, by how new a class name is: zero-shot that keeps the templates.

Learned prompts lose to the templates of the same CLIP on class types that they were never trained on (paper, table 1).
With the log-odds z of an image for class c under learned prompts and under the paper's templates,

    z_c = z_learned + w_c · (σ_learned / σ_template) · z_template

    fixed      w_c = a, the same for all classes
    novelty    w_c = a · ν_c,   ν_c = 1 − max over training classes t of f̃_c·f̃_t

f_c is the unit text feature of the plain name, μ the mean of f_t over the training classes, f̃ = unit(f − μ). A training
class has ν = 0: its scores stay as they are. σ is the root of the mean over training classes of the variance over
the images of the context bank: nothing here depends on the images that are scored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pspg.kernels.precision import no_autocast

from ..config import BlendName
from ..utils.errors import UserError
from .class_set import ClassSet
from .clip import ImageFeatures
from .novelty import novelty
from .pspg import PsPG
from .templates import template_texts

WEIGHTS = {"novelty": 4.0, "fixed": 1.0}
"""a where no setting says it"""


class Spread(NamedTuple):
    """Standard deviations over the bank's images, for the training classes."""

    learned: float
    template: float


@torch.inference_mode()
def make_blend(
    model: PsPG,
    class_set: ClassSet,
    bank: ImageFeatures | None,
    kind: BlendName,
    weight: float | None,
    *,
    source: object,
) -> Tensor | None:
    """Directions (C,D), float32, whose product with an image's unit global feature is added to the log-odds.

    None where nothing is to be added: kind none, or training classes alone under novelty.

    Args:
        model: where the images are scored, its towers frozen.
        class_set: C classes to score.
        bank: of the model; None: it has none.
        kind: see above.
        weight: a; None: 4 for novelty, 1 for fixed.
        source: folder of the model, for messages.

    Raises:
        UserError: the model keeps no features of the bank's images.
    """
    if kind == "none":
        return None
    a = WEIGHTS[kind] if weight is None else weight
    training = model.training_set
    weights = torch.full((len(class_set),), a, device=class_set.class_features.device)
    if kind == "novelty":
        weights = a * novelty(class_set.class_features, training.class_features)
    if not weights.any():
        return None
    if bank is None:
        raise UserError(
            f"blend: {source} keeps no features of its bank's images, which {kind} needs; "
            "set blend to none, or train again"
        )
    spread = spread_of(model, bank)
    directions = template_directions(model, class_set.names)
    return (weights.float() * spread.learned / spread.template)[:, None] * directions


def weight_of(kind: BlendName, weight: float | None) -> float | None:
    """The weight a that a setting means; None under `none`, which has no weight."""
    return None if kind == "none" else WEIGHTS[kind] if weight is None else weight


def template_directions(model: PsPG, names: list[str]) -> Tensor:
    """(C,D), float32: times an image's unit global feature, the log-odds of the paper's templates."""
    clip = model.clip
    texts = template_texts(clip, names, model.logit_scale.device)
    return clip.logit_scale.exp().float() * (texts.positive - texts.negative)


def spread_of(model: PsPG, bank: ImageFeatures) -> Spread:
    """σ of learned prompts and of templates for the training classes, over the bank's images."""
    training = model.training_set
    logits = model.head(bank, training, model.tower, context=bank.global_).logits.float()
    learned = logits[:, 0] - logits[:, 1]
    with no_autocast(learned):
        template = unit_global(bank.tokens) @ template_directions(model, training.names).T
    found = [float(z.var(dim=0, correction=0).mean().sqrt()) for z in (learned, template)]
    return Spread(found[0], max(found[1], torch.finfo(torch.float32).tiny))


def unit_global(tokens: Tensor) -> Tensor:
    """(B,D) unit global features, float32 or better, of tokens (B,S,D), the first of which they are."""
    return F.normalize(tokens[:, 0].to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1)


def blended(logits: Tensor, tokens: Tensor, blend: Tensor | None) -> Tensor:
    """Logits (B,2,C) with what a blend adds to the log-odds; those given where there is none.

    Args:
        logits: (B,2,C).
        tokens: (B,S,D), token 0 the unit global feature.
        blend: (C,D), of `make_blend`.
    """
    if blend is None:
        return logits
    with no_autocast(logits):
        added = unit_global(tokens).to(blend.dtype) @ blend.T
    return torch.stack([logits[:, 0] + added, logits[:, 1]], dim=1)
