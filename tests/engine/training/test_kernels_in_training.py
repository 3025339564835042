"""A whole phase-2 step with the Triton kernels, in the interpreter, against the same step in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pspg.engine.config import LossConfig, ModelConfig
from pspg.engine.models.pspg import PsPG
from pspg.engine.training.losses import PromptLoss
from tests.kernels import interpreter


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_training_on_gpu.py trains with compiled kernels")
@pytest.mark.parametrize(
    ("prefix", "prompts"), [(False, "dual"), (True, "dual"), (False, "shared"), (True, "positive")]
)
def test_a_step_is_that_of_torch(make_clip: Callable[..., Any], names: list[str], prefix: bool, prompts: Any) -> None:
    interpreter.repair()
    torch.manual_seed(0)
    small = ModelConfig(prompt_length=2, hidden_size=16, decoder_heads=2, prefix=prefix, prompts=prompts)
    model = PsPG(make_clip().float(), small, names[:3]).train().freeze()
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([[1, 1, 0], [0, -1, 1], [0, 1, 0]]).float()
    parameters = dict(model.head.named_parameters())

    def step(impl: str) -> list[Tensor]:
        model.head.impl = impl
        torch.manual_seed(1)  # dropout
        loss, parts = PromptLoss(LossConfig())(model(images), labels, model.tower, impl=impl)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        return [loss.detach(), *parts.values(), *gradients]

    kernels, eager = step("triton"), step("eager")
    largest = max(part.abs().max() for part in eager[3:])
    for name, got, other in zip(["loss", "classification", "pair", *parameters], kernels, eager, strict=True):
        torch.testing.assert_close(
            got, other, rtol=1e-4, atol=1e-6 * largest.item(), msg=lambda m, name=name: f"{name}: {m}"
        )
