"""Learned prompt vectors that no decoder writes: the contexts of DualCoOp (Sun et al. 2022), the paper's baseline."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...config import ModelConfig
from ...utils.errors import UserError
from ..clip import tokenizer
from ..templates import NEGATIVE, POSITIVE
from . import DECODERS
from ._base import PromptDecoder


@DECODERS.register
class LearnedContext(PromptDecoder):
    """No decoder: its prompt learner is a `ContextLearner`."""

    name = "context"
    prompts = ("dual",)
    needs_prefix = True
    uses_context = False
    takes_present = True
    method = "DualCoOp"
    about = (
        "classifies radiographs into a list of named findings. A frozen CLIP encodes the image; two learned "
        "sequences of vectors stand before each class name as its positive and negative prompt; a class's "
        "probability is the softmax over the two prompts' similarities to the image."
    )

    @classmethod
    def learner(cls, width: int, text_width: int, config: ModelConfig) -> nn.Module:
        return ContextLearner(text_width, config.prompt_length, from_templates=config.context_init == "template")


class ContextLearner(nn.Module):
    """A positive and a negative sequence of vectors, the same for every class and image: 2·n·W parameters.

    They stand before the class name, which alone tells classes apart. They start random, normal of deviation 0.02.

    Args:
        text_width: W.
        prompt_length: n.
        from_templates: `start` puts the words of the paper's templates there.
    """

    def __init__(self, text_width: int, prompt_length: int, *, from_templates: bool = False) -> None:
        super().__init__()
        self._from_templates = from_templates
        self.contexts = nn.Parameter(torch.empty(2, prompt_length, text_width))
        nn.init.normal_(self.contexts, std=0.02)

    @torch.no_grad()
    def start(self, token_embedding: Tensor) -> None:
        """Put the words of the paper's templates (footnote 3) right before the class name, if that was asked for.

        The places before them stay random. The paper prints 0.02 M parameters with templates as without, so its n is 16
        in both; the templates have two or three tokens, and where they stand among 16 it does not say.

        Args:
            token_embedding: (vocabulary, W).

        Raises:
            UserError: n is too small for them.
        """
        if not self._from_templates:
            return
        for context, template in zip(self.contexts, (POSITIVE, NEGATIVE), strict=True):
            words = template.partition("{}")[0].strip()
            tokens = tokenizer().encode(words)
            if len(tokens) > len(context):
                raise UserError(
                    f"model.prompt_length: {len(context)} vectors do not hold the {len(tokens)} tokens of {words!r}; "
                    "raise it, or set model.context_init random"
                )
            context[-len(tokens) :] = token_embedding[tokens]

    def forward(
        self, class_features: Tensor, context: Tensor, *, present: Tensor | None = None, impl: str = "auto"
    ) -> Tensor:
        """Positive and negative prompts (2,C,n,W), in the place of `PromptLearner`.

        Args:
            class_features: (C,D), of which only C matters.
            context, present, impl: not used; nothing attends to images, and there is one implementation.
        """
        return self.contexts[:, None].expand(-1, len(class_features), -1, -1)
