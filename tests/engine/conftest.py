"""Tiny random CLIPs, no download; a model folder and films to score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pspg.engine.checkpoints.model_folder import describe, write_model
from pspg.engine.config import ModelConfig
from pspg.engine.data.pixels import Pixels
from pspg.engine.models.clip import build_clip
from pspg.engine.models.pspg import PsPG

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


@pytest.fixture
def model_folder(make_clip: Callable[..., Any], names: list[str], tmp_path: Path) -> Callable[..., Path]:
    """Function (vit=False, resize="stretch", bank=True, **settings of the head) → folder of an untrained model whose
    scores differ from image to image."""

    def make(vit: bool = False, resize: Any = "stretch", bank: bool = True, **head: Any) -> Path:
        folder, clip = tmp_path / "model", make_clip(vit=vit).float()
        torch.manual_seed(1)
        config = ModelConfig(**{"prompt_length": 3, "hidden_size": 8, "decoder_heads": 2, **head})
        model = PsPG(clip, config, names)
        with torch.no_grad():
            for parameter in model.prompt_learner.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        pixels = Pixels(size=32, resize=resize, mean=0.4, std=0.2)
        tensors = {"clip": dict(clip.state_dict()), "model": dict(model.head.state_dict())}
        if bank:
            tensors["bank"] = {"bank": model.image_features(torch.randn(6, 3, 32, 32)).global_}
        described = describe("pspg", clip, pixels, head=config, class_names=names, training="trained on noise")
        write_model(folder, described, tensors)
        return folder

    return make


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """A folder of five grey PNGs of noise, two of them below it."""
    folder = tmp_path / "films"
    (folder / "b").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for name in ("a.png", "A_.png", "a?.png", "b/a.png", "b/c d.png"):
        Image.fromarray(noise.integers(0, 256, (50, 40), dtype=np.uint8)).save(folder / name)
    return folder
