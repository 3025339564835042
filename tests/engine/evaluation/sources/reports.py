"""What an evaluation wrote, and the same computed by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pspg.engine.models.clip import tokenize

ROOT = Path(__file__).parents[4]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
VIT = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def table(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def probabilities(folder: Path) -> np.ndarray:
    return np.array([row[1:] for row in table(folder / "predictions.csv")[1:]], dtype=float)


def images_of(phantoms: Path, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """The test images (40,3,size,size), which are square, resized and normalised by hand."""
    lines = [json.loads(line) for line in (phantoms / "test.jsonl").read_text().splitlines()]
    images = [Image.open(phantoms / line["filepath"]).convert("L").convert("RGB") for line in lines]
    assert all(image.width == image.height for image in images)
    values = np.stack([np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in images])
    pixels = torch.from_numpy(values).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@torch.no_grad()
def by_hand(clip: Any, images: torch.Tensor, names: list[str], context: int) -> np.ndarray:
    """Softmax over the paper's two templates (footnote 3)."""
    image = clip.eval().encode_image(images, normalize=True)
    sides = [
        clip.encode_text(tokenize([template.format(name) for name in names], context), normalize=True)
        for template in ("Findings suggesting {}.", "No evidence of {}.")
    ]
    logits = clip.logit_scale.exp() * torch.stack([image @ side.T for side in sides])
    return logits.double().softmax(0)[0].numpy()


def write_clip(folder: Path, config: dict[str, Any], preprocess: dict[str, Any], layout: str) -> tuple[Any, Path]:
    """A random CLIP, its JSON file beside its weights."""
    torch.manual_seed(1)
    custom = layout == "custom text"
    clip = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    if layout == "openai":  # half precision, with settings among the weights
        clip = clip.half().float()
        sizes = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
        torch.save({**{name: value.half() for name, value in clip.state_dict().items()}, **sizes}, folder / "clip.pt")
    elif layout == "parallel":
        torch.save({"state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, folder / "clip.pt")
    else:
        save_file(clip.state_dict(), folder / "clip.safetensors")
    architecture = {**config, "custom_text": True} if custom or layout == "parallel" else config
    (folder / "net.json").write_text(json.dumps({"model_cfg": architecture, "preprocess_cfg": preprocess}))
    return clip, folder / ("clip.safetensors" if (folder / "clip.safetensors").exists() else "clip.pt")


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("pspg-engine evaluate: error: ")
    assert error.count("\n") == 1
    return error
