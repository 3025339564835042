"""Fixed templates on a CLIP, which the prompts are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .clip import tokenize

POSITIVE = "Findings suggesting {}."
NEGATIVE = "No evidence of {}."
PAIRED = "positive–negative"
"""the variant of the paper's Table 1"""


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
    tokenizer: Callable[[list[str]], Tensor] | None = None,
) -> TemplateTexts:
    """Text features of the paper's templates (footnote 3).

    Args:
        names: C class names.
        tokenizer: texts to token ids; None: CLIP's own.
    """

    def encode(texts: list[str]) -> Tensor:
        tokens = tokenize(texts, clip.context_length) if tokenizer is None else tokenizer(texts)
        parts = [clip.encode_text(part.to(device), normalize=True) for part in tokens.split(256)]
        return torch.cat(parts).float()

    sides = ([template.format(name) for name in names] for template in (POSITIVE, NEGATIVE, "{}"))
    return TemplateTexts(*map(encode, sides))


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
