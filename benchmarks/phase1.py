"""A phase-1 step of the full-size RN50 CLIP with random weights: image and report through both towers, all training.

reference  the modules of open_clip, as the published code calls them: 77 tokens a report, images as they come, AdamW as
           torch takes it by itself
eager      the engine's: images in channels_last, a pool of one query, reports packed up to their EOS, the last text
           block at the EOS alone, fused AdamW
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pspg.engine.models.clip import build_clip, clip_config
from pspg.engine.models.texts import pack_tokens
from pspg.engine.training.config import OptimConfig
from pspg.engine.training.losses import contrastive_loss
from pspg.engine.training.optimizer import make_optimizer, parameter_groups
from pspg.engine.training.tasks import ContrastiveModel

from .gate import excess
from .harness import flop_counter
from .steps import GradientStep

IMPLS = ("reference", "eager")
LENGTHS = (20, 35, 50, 77)
"""tokens of the reports, SOS and EOS included, in turns"""
CONFIG = OptimConfig(name="adamw", lr=1e-5)


class Literal(nn.Module):
    """A CLIP as open_clip runs it; called like the engine's `ContrastiveModel` of whole texts."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.clip.encode_image(images), self.clip.encode_text(tokens), self.clip.logit_scale


def contrastive_step(batch: int, impl: str, device: torch.device, dtype: torch.dtype = torch.float32) -> GradientStep:
    """A step of B random images and reports in an implementation; the same numbers in each.

    Args:
        impl: one of `IMPLS`.
        device: a CPU, or meta to count.
        dtype: float32, or float64 for the gate.
    """
    torch.manual_seed(0)
    config = {**clip_config("RN50"), "quick_gelu": True}
    with device:
        clip = build_clip(config).train().to(dtype)
    side = config["vision_cfg"]["image_size"]
    images, tokens = torch.randn(batch, 3, side, side), torch.zeros(batch, 77, dtype=torch.int64)
    for number, row in enumerate(tokens):
        length = LENGTHS[number % len(LENGTHS)]
        row[:length] = torch.randint(1, 49000, (length,))
        row[length - 1] = 49407
    images = images.to(device, dtype)
    if impl == "reference":
        module: nn.Module = Literal(clip)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameter_groups(module, CONFIG))
    else:
        module = ContrastiveModel(clip)
        optimizer = make_optimizer(module, CONFIG)

    def loss() -> Tensor:
        # The engine packs every batch on the CPU, so that counts as a part of its step.
        texts = (tokens,) if impl == "reference" else tuple(pack_tokens(tokens))
        return contrastive_loss(*module(images, *(text.to(device) for text in texts)))

    return GradientStep(loss, module, device, None if device.type == "meta" else optimizer)


def wrong(impl: str) -> str | None:
    """Why an implementation is not to be timed: of two images it computes what open_clip does not; None: it does.

    In float64: batch norms of two images and a few places make more of rounding in float32 than a gate can let pass.
    """
    if impl == "reference":
        return None
    steps = (contrastive_step(2, name, torch.device("cpu"), torch.float64) for name in (impl, "reference"))
    found, expected = (dict(step.first()) for step in steps)
    for outcome in (found, expected):
        # The bias of keys shifts all scores alike: its gradient is 0, and what is left of it is rounding.
        outcome["gradients"] = {k: g for k, g in outcome["gradients"].items() if not k.endswith("k_proj.bias")}
    error, what = excess(found, expected, torch.float64)
    return None if error <= 1 else f"wrong: error is {error:.3g} times what is allowed; {what}"


def flops(batch: int) -> int:
    """FLOPs of the engine's step, counted on tensors without storage."""
    step = contrastive_step(batch, "eager", torch.device("meta"))
    with flop_counter() as counter:
        step.loss().backward()
    return counter.get_total_flops()
