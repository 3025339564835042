"""Reference results of the published code, put together from files that share a CLIP; see tests/golden/README.md."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "golden"
LENGTH = 77
LR, MOMENTUM, WEIGHT_DECAY = 1e-2, 0.9, 0.05
"""of the first step of SGD with Nesterov's momentum, whose buffer is the decayed gradient"""


def read_golden(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of one reference: those of `clip.safetensors`, then its own, then the SGD step."""
    content = _content(name)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    tensors = {**load(_content("clip")), **load(content)}
    for key in ("pos_embed", "neg_embed", "pair_embed"):
        rows = tensors[key]
        # Stored up to the first padding token, which all further ones equal.
        tensors[key] = torch.cat([rows, rows[:, -1:].expand(-1, LENGTH - rows.shape[1], -1)], dim=1)
    for key in [key for key in tensors if key.startswith("grad.")]:
        name = key.removeprefix("grad.")
        weight = tensors[f"state.{name}"].double()
        decayed = tensors[key] + WEIGHT_DECAY * weight
        tensors[f"after_step.{name}"] = weight - LR * (1 + MOMENTUM) * decayed
    return tensors, header["__metadata__"]


def _content(name: str) -> bytes:
    return lzma.decompress((FOLDER / f"{name}.safetensors.xz").read_bytes())


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published state dict among them."""
    return {key.removeprefix("state."): tensor for key, tensor in tensors.items() if key.startswith("state.")}
