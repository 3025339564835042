"""Fixed templates on a CLIP, which the prompts are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..utils.errors import UserError
from .absence import absent
from .clip import tokenize

POSITIVE = "Findings suggesting {}."
NEGATIVE = "No evidence of {}."
PAIRED = "positive–negative"
"""the variant of the paper's Table 1"""
Absences = Literal["turned", "literal"]


def sentences(name: str, absences: Absences = "turned") -> tuple[str, str]:
    """The positive and the negative sentence about a class.

    A class that is an absence has the templates in each other's place, about what is absent: No Finding is "No evidence
    of abnormality.", not "Findings suggesting No Finding.", and its opposite is no "No evidence of No Finding.".

    Args:
        absences: literal: every name is put into the templates as it is, as in the paper.
    """
    missing = absent(name) if absences == "turned" else None
    if missing is not None:
        return NEGATIVE.format(missing), POSITIVE.format(missing)
    return POSITIVE.format(name), NEGATIVE.format(name)


class TemplateTexts(NamedTuple):
    """Unit text features (C,D), float32, of the sentences about each class."""

    positive: Tensor
    negative: Tensor
    plain: Tensor
    """features of the name alone"""


@torch.inference_mode()
def template_texts(
    clip: open_clip.CLIP,
    names: Sequence[str],
    device: torch.device,
    *,
    tokenizer: Callable[..., Tensor] | None = None,
    absences: Absences = "turned",
) -> TemplateTexts:
    """Text features of the paper's templates (footnote 3).

    Args:
        names: C class names.
        tokenizer: texts to token ids, of open_clip or `clip.tokenize`; None: CLIP's own.
        absences: see `sentences`.

    Raises:
        UserError: a name whose sentences are longer than the context.
    """
    tokenizer = tokenizer or partial(tokenize, context_length=clip.context_length)

    def encode(texts: list[str]) -> Tensor:
        tokens = _whole(tokenizer, texts, names)
        parts = [clip.encode_text(part.to(device), normalize=True) for part in tokens.split(256)]
        return torch.cat(parts).float()

    both = [sentences(name, absences) for name in names]
    positive, negative = ([pair[side] for pair in both] for side in (0, 1))
    return TemplateTexts(encode(positive), encode(negative), encode(list(names)))


def _whole(tokenizer: Callable[..., Tensor], texts: list[str], names: Sequence[str]) -> Tensor:
    """Token ids (N,L) of texts that are not cut: with room for one token more they would have one pad more."""
    tokens = tokenizer(texts)
    length = tokens.shape[1]
    longer = tokenizer(texts, context_length=length + 1)
    same = (longer[:, :length] == tokens).all(dim=1)
    if getattr(tokenizer, "tokenizer_mode", None) == "clips":  # its last token stands behind the padding
        pad = tokenizer(["a"], context_length=length + 1).mode().values
        same = longer[:, -2] == pad
    if not same.all():
        name = names[int(same.int().argmin())]
        raise UserError(
            f"class names: {name[:40]!r}… makes sentences of more tokens than the context of {length} holds; shorten it"
        )
    return tokens


@torch.inference_mode()
def template_probabilities(
    clip: open_clip.CLIP, image_globals: Tensor, texts: TemplateTexts
) -> dict[str, NDArray[np.float64]]:
    """Zero-shot probabilities (N,C) of a CLIP with fixed templates (paper 3.1, eq. 2).

    `positive–negative` is the softmax over both templates; `positive only` and `plain name` have no second prompt,
    so theirs is (1 + cosine) / 2: a ranking, not calibrated.

    Args:
        image_globals: (N,D) raw global image features.
        texts: of C classes.
    """
    images = nn.functional.normalize(image_globals.to(texts.plain.device).float(), dim=-1)
    scale = clip.logit_scale.exp().double()
    positive, negative, plain = ((images @ side.T).double() for side in texts)
    found = {
        PAIRED: torch.sigmoid(scale * (positive - negative)),
        "positive only": ((1 + positive) / 2).clamp(0, 1),
        "plain name": ((1 + plain) / 2).clamp(0, 1),
    }
    return {name: value.cpu().numpy() for name, value in found.items()}
