"""Fingerprint of a run: what makes two runs the same computation, so that one may continue the other."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import numpy as np

from ..data.loaders.choose import pixel_source
from ..data.manifest import Manifest
from .config import TrainConfig

MUTABLE = {
    "output",
    "resume",
    "dry_run",
    "timeout_s",
    "device",
    "zero_stage",
    "save_every",
    "log_every",
    "cuda_graphs",
    "images_ahead",
    "text_memory",
    "data.workers",
    "data.cache",
    "data.train",
    "data.val",
    "data.image_root",
    "data.label_names",
    "data.class_names",
    "optim.patience",
    "model.pretrained",
    "model.pretrained_head",
    "evaluation.blend",
    "evaluation.blend_weight",
    "evaluation.bootstrap",
    "evaluation.threshold",
}
"""settings that a run may change when it is resumed: where and how fast, not what is computed"""


def resume_fingerprint(config: TrainConfig, extra: dict[str, Any]) -> dict[str, Any]:
    """Flat `key → value` of the settings that make two runs the same computation."""
    flat: dict[str, Any] = {}
    for key, value in asdict(config).items():
        entries = {f"{key}.{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {key: value}
        flat.update({name: entry for name, entry in entries.items() if name not in MUTABLE})
    data = config.data
    source = pixel_source(data.loader, cached=data.cache is not None, augmented=data.augment or data.flip > 0)
    return {**flat, "data.loader": source, **extra}


def data_digest(manifest: Manifest, labels: np.ndarray | None = None) -> str:
    """Digest of what is trained on: ids in order, with the label matrix or the texts."""
    digest = hashlib.sha256()
    for sample in manifest.samples:
        digest.update(json.dumps([sample.id, sample.text if labels is None else None]).encode())
    if labels is not None:
        digest.update(np.ascontiguousarray(labels).tobytes())
    return digest.hexdigest()
