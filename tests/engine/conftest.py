"""Tiny random CLIPs, no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pspg.engine.models.clip import build_clip

NAMES = ["cardiomegaly", "pleural effusion", "edema", "no finding"]


def tiny_config(vit: bool = False, quick_gelu: bool = True) -> dict[str, Any]:
    """D = 24, W = 16, two text layers of two heads; 32×32 pixels, S = 2 (ResNet) or 5 (ViT)."""
    vision: dict[str, Any] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "head_width": 16}
    if vit:
        vision = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    return {"embed_dim": 24, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}


@pytest.fixture
def make_clip() -> Callable[..., Any]:
    """Function (vit=False, quick_gelu=True) → float64 CLIP in eval mode, every weight and statistic random."""

    def make(vit: bool = False, quick_gelu: bool = True) -> Any:
        torch.manual_seed(0)
        clip = build_clip(tiny_config(vit, quick_gelu)).double().eval()
        with torch.no_grad():
            for name, tensor in clip.state_dict().items():
                if tensor.is_floating_point() and tensor.ndim == 1:
                    offset = 1.0 if "var" in name or name.endswith("weight") else 0.0
                    tensor.copy_(offset + 0.1 * torch.randn_like(tensor).abs())
        return clip

    return make


@pytest.fixture
def names() -> list[str]:
    return list(NAMES)
