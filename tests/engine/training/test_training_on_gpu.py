"""Training with the kernels against training in torch, on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pspg.engine.config import LossConfig, ModelConfig
from pspg.engine.models.pspg import PsPG
from pspg.engine.training.config import OptimConfig
from pspg.engine.training.losses import PromptLoss
from pspg.engine.training.optimizer import make_optimizer


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loss_curves_of_200_steps_agree(make_clip: Callable[..., Any], names: list[str]) -> None:
    """bf16: kernels and torch drift apart no further than twice what torch in bf16 drifts from torch in float32."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(200, 6, 3, 32, 32, generator=generator).cuda()
    labels = torch.randint(-1, 2, (200, 6, len(names)), generator=generator).float().cuda()

    def curve(impl: str, dtype: torch.dtype) -> torch.Tensor:
        torch.manual_seed(0)
        small = ModelConfig(prompt_length=4, hidden_size=32, decoder_heads=2)
        model = PsPG(make_clip().float(), small, names).cuda().train().freeze(dtype)
        model.head.impl = impl
        optimizer = make_optimizer(model.head, OptimConfig(lr=1e-3))
        losses = []
        for step in range(200):
            torch.manual_seed(step)
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                output = model(images[step])
                loss, _ = PromptLoss(LossConfig())(output, labels[step], model.tower, impl=impl)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).double()

    kernels, eager = curve("triton", torch.bfloat16), curve("eager", torch.bfloat16)
    exact = curve("eager", torch.float32)
    smooth = [part.view(10, 20).mean(1) for part in (kernels, eager, exact)]
    noise = (smooth[1] - smooth[2]).abs().max()
    assert (smooth[0] - smooth[2]).abs().max() <= 2 * noise + 0.01 * smooth[2].abs().max()
    assert torch.isfinite(kernels).all()
