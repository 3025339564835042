"""Whole steps with the Triton kernels, in the interpreter, against the same steps in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pspg.engine.config import LossConfig, ModelConfig
from pspg.engine.data.batch import Batch
from pspg.engine.distributed.world import start
from pspg.engine.models.clip import tokenize
from pspg.engine.models.pspg import PsPG
from pspg.engine.training.losses import PromptLoss
from pspg.engine.training.tasks import ContrastiveTask
from tests.engine.recorder import CheckedRecorder
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


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run compiled here, not in Triton's interpreter")
def test_a_step_of_phase_1_is_that_of_torch_and_is_recorded(make_clip: Callable[..., Any]) -> None:
    """Twice the step of its batch, and nothing in it that a graph could not repeat."""
    interpreter.repair()
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = tokenize(["no effusion", "effusion of the left lung", "normal"])
    batch = Batch(["a", "b", "c"], torch.arange(3), pixels, None, tokens, mean=0.5, std=0.25)

    def step(impl: str) -> dict[str, Tensor]:
        task = ContrastiveTask(make_clip().float().train().requires_grad_(), start("cpu"), None, "fp32")
        task.module.impl = impl
        tensors = task.tensors(batch)
        assert tensors is not None
        replay, (loss, _, gradients) = CheckedRecorder()(lambda: task.outcome(batch, tensors, reduce=False))
        first = [loss, *gradients]
        kept = [None if tensor is None else tensor.clone() for tensor in first]
        replay()
        for one, again in zip(kept, first, strict=True):
            assert (one is None and again is None) or torch.equal(one, again)  # type: ignore[arg-type]
        names = ["loss", *(name for name, _ in task.module.named_parameters())]
        found = {name: tensor for name, tensor in zip(names, first, strict=True) if tensor is not None}
        return found | dict(task.module.named_buffers())

    kernels, eager = step("triton"), step("eager")
    largest = max(tensor.abs().max() for name, tensor in eager.items() if name.endswith("weight"))
    assert kernels.keys() == eager.keys()
    for name, right in eager.items():
        torch.testing.assert_close(
            kernels[name], right, rtol=1e-3, atol=1e-5 * largest.item(), msg=lambda m, name=name: f"{name}: {m}"
        )
