"""Learned prompt vectors that no decoder writes: the contexts of DualCoOp (Sun et al. 2022), the paper's baseline."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..utils.errors import UserError
from .clip import tokenizer
from .templates import NEGATIVE, POSITIVE


class ContextLearner(nn.Module):
    """A positive and a negative sequence of vectors, the same for every class and image: 2·n·W parameters.

    They stand before the class name, which alone tells classes apart: a vocabulary for them is always made with
    `prefix`. They start random, normal of deviation 0.02.

    Args:
        text_width: W.
        prompt_length: n.
    """

    def __init__(self, text_width: int, prompt_length: int) -> None:
        super().__init__()
        self.contexts = nn.Parameter(torch.empty(2, prompt_length, text_width))
        nn.init.normal_(self.contexts, std=0.02)

    @torch.no_grad()
    def start_from_templates(self, token_embedding: Tensor) -> None:
        """Put the words of the paper's templates (footnote 3) right before the class name.

        The places before them stay random. The paper prints 0.02 M parameters with templates as without, so its n is 16
        in both; the templates have two or three tokens, and where they stand among 16 it does not say.

        Args:
            token_embedding: (vocabulary, W).

        Raises:
            UserError: n is too small for them.
        """
        for context, template in zip(self.contexts, (POSITIVE, NEGATIVE), strict=True):
            words = template.partition("{}")[0].strip()
            tokens = tokenizer().encode(words)
            if len(tokens) > len(context):
                raise UserError(
                    f"model.prompt_length: {len(context)} vectors do not hold the {len(tokens)} tokens of {words!r}; "
                    "raise it, or set model.context_init random"
                )
            context[-len(tokens) :] = token_embedding[tokens]

    def forward(self, class_features: Tensor, context: Tensor, *, impl: str = "auto") -> Tensor:
        """Positive and negative prompts (2,C,n,W), in the place of `PromptLearner`.

        Args:
            class_features: (C,D), of which only C matters.
            context, impl: not used; there is nothing that attends to images, and one form.
        """
        return self.contexts[:, None].expand(-1, len(class_features), -1, -1)
