"""SPCL called with tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pspg.kernels.spcl import ImageBatch, spcl
from pspg.kernels.text_tower import Prompts, PromptTemplate, TextTower


def loss_of(
    tower: TextTower,
    template: PromptTemplate,
    prompts: Tensor,
    vectors: Tensor,
    scale: Tensor,
    labels: Tensor,
    **options: Any,
) -> Tensor:
    """`spcl` of prompts without a cache, for tests that differentiate by plain tensors."""
    return spcl(tower, Prompts(prompts, template), ImageBatch(vectors, scale, labels), **options)
