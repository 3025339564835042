"""A phase-2 step of ranks that share a batch: means of the prompts' gradients, begun while the pairs still run.

All ranks decode the same prompts, so it is enough to average the gradients of the prompts, and each rank's backward
through the decoders gives the mean gradient of every weight. Negative prompts are in no pair: their mean is under way
while the pairs run. Where the prompts are more than the decoders' weights, the weights' gradients are averaged instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pspg.kernels.text_tower import Prompts, PromptTemplate, TextTower

from ..distributed.collectives import all_reduce_mean, start_mean
from ..models.pspg import Encode, PromptHead
from .cuda_graph import trained

Part = Callable[[], Tensor | None]
"""a rank's part of a loss times the number of ranks; None: there is none"""


class Cut:
    """Encodes prompts that know nothing of the decoders they come from.

    Args:
        encode: encodes them.

    Attributes:
        prompts: (G,C,n,W) of the decoders.
        leaf: the same, where a backward ends.
    """

    prompts: Tensor
    leaf: Tensor

    def __init__(self, encode: Encode) -> None:
        self._encode = encode

    def __call__(self, prompts: Tensor, template: PromptTemplate, tower: TextTower) -> tuple[Tensor, Prompts]:
        self.prompts, self.leaf = prompts, prompts.detach().requires_grad_()
        return self._encode(self.leaf, template, tower)


def mean_gradients(head: PromptHead, cut: Cut, first: Tensor, pairs: Part | None = None) -> list[Tensor | None]:
    """Means over the ranks of the gradients of `first` and `pairs()`, by the parameters of the head that train.

    Args:
        head: what trains; its forward has gone through `cut`.
        cut: holds the prompts.
        first: this rank's part of what is known.
        pairs: the part that reaches positive prompts only, called when the means of the others are under way; None:
            there is none.
    """
    learner = trained(head.prompt_learner)
    others = [parameter for parameter in trained(head) if not any(parameter is known for known in learner)]
    by_prompts = prompts_are_fewer(cut.prompts, head.prompt_learner)
    d_prompts, *d_others = _gradients(first, [cut.leaf, *others], keep=pairs is not None)
    assert d_prompts is not None
    finish = None
    if by_prompts and len(d_prompts) > 1:
        finish = start_mean(d_prompts[1:].contiguous())
    second = None if pairs is None else pairs()
    if second is not None:
        d_positive, *more = _gradients(second, [cut.leaf, *others])
        d_others = [_sum(one, other) for one, other in zip(d_others, more, strict=True)]
        if d_positive is not None:
            d_prompts = torch.cat([d_prompts[:1] + d_positive[:1], d_prompts[1:]])
    if by_prompts:
        positive, *d_others = all_reduce_mean([d_prompts[:1], *d_others])
        assert positive is not None
        d_prompts = positive if finish is None else torch.cat([positive, finish()])
    d_learner: list[Tensor | None] = [
        *torch.autograd.grad(cut.prompts, learner, d_prompts.to(cut.prompts.dtype), allow_unused=True)
    ]
    if not by_prompts:
        means = all_reduce_mean([*d_learner, *d_others])
        d_learner, d_others = means[: len(learner)], means[len(learner) :]
    found = {id(parameter): mean for parameter, mean in zip([*learner, *others], [*d_learner, *d_others], strict=True)}
    return [found[id(parameter)] for parameter in trained(head)]


def prompts_are_fewer(prompts: Tensor, learner: nn.Module) -> bool:
    """Whether there are fewer numbers in the prompts than in the weights that made them."""
    return prompts.numel() < sum(parameter.numel() for parameter in trained(learner))


def _gradients(loss: Tensor, inputs: Sequence[Tensor], *, keep: bool = False) -> list[Tensor | None]:
    found: Any = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=keep)
    return list(found)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other
