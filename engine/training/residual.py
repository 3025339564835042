"""After phase 2: the residual of the text features alone, on prompts that are finished."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pspg.kernels.text_tower import Prompts, PromptTemplate, TextTower

from .tasks import PromptTask


class ResidualTask(PromptTask):
    """Trains `head.residual` and nothing else: the text side runs once, under the context bank, without gradients.

    A step costs the fusion and C dot products an image. Classes that were never trained on score as before, to the
    last bit. Arguments as `PromptTask`; the bank is required, and `head.residual` must be there.
    """

    def __init__(self, *args: Any, context: Tensor, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._context = context
        self._text: tuple[Tensor, Prompts] | None = None
        self.module.requires_grad_(False)
        assert self.module.residual is not None
        self.module.residual.requires_grad_(True)

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        return (*super().inputs(batch), self._context, self._encode)

    @torch.no_grad()
    def _encode(self, prompts: Tensor, template: PromptTemplate, tower: TextTower) -> tuple[Tensor, Prompts]:
        """Unit text features of the finished prompts in place of the given ones, on which dropout may have acted."""
        if self._text is None:
            model, training = self._model, self.module.training
            self.module.eval()
            finished = self.module.prompt_learner(model.class_set.class_features, self._context, impl=self.module.impl)
            self._text = self.module.encode(finished, template, tower, keep_cache=False)
            self.module.train(training)
        return self._text
