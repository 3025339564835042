"""Fingerprint of a run: what makes two runs the same computation, so that one may continue the other."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from ..config import LossConfig
from ..data.loaders.choose import pixel_source
from ..data.manifest import Manifest
from ..utils.names import base_name
from .config import OptimConfig, TrainConfig

MUTABLE = {
    "output",
    "resume",
    "fork",
    "dry_run",
    "plugins",
    "timeout_s",
    "device",
    "zero_stage",
    "save_every",
    "log_every",
    "logger",
    "log_images",
    "profile.start",
    "profile.steps",
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


FORKABLE = {
    "seed",
    "data.augment",
    "data.augment_bicubic",
    "data.flip",
    *(f"loss.{field.name}" for field in fields(LossConfig)),
    *(f"optim.{field.name}" for field in fields(OptimConfig) if field.name not in ("name", "accumulate", "ema_decay")),
}
"""settings that a fork may change besides: how the same parameters are trained on the same data"""
FORK_CHANGES = "seed, data.augment, data.augment_bicubic, data.flip, loss.*, optim.* but name, accumulate and ema_decay"
"""the same for messages"""


def resume_fingerprint(config: TrainConfig, extra: dict[str, Any]) -> dict[str, Any]:
    """Flat `key → value` of the settings that make two runs the same computation."""
    flat: dict[str, Any] = {}
    for key, value in asdict(config).items():
        entries = {f"{key}.{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {key: value}
        flat.update({name: entry for name, entry in entries.items() if name not in MUTABLE})
    data = config.data
    source = pixel_source(data.loader, cached=data.cache is not None, augmented=data.augment or data.flip > 0)
    return {**flat, "data.loader": source, **extra}


def as_written(value: object) -> str:
    """A setting as YAML has it, on one line: true and null, not True and None."""
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def flat_settings(config: TrainConfig) -> dict[str, str | int | float | bool]:
    """Dotted key → value of all settings, for loggers: files and folders by their name alone."""
    flat: dict[str, str | int | float | bool] = {}

    def add(prefix: str, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                add(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = (
                    value if isinstance(value, int | float) else ", ".join(map(base_name, _items(value)))
                )

    add("", asdict(config))
    return flat


def _items(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else ["null" if value is None else str(value)]


def data_digest(manifest: Manifest, labels: np.ndarray | None = None) -> str:
    """Digest of what is trained on: ids in order, with the label matrix or the texts."""
    digest = hashlib.sha256()
    for sample in manifest.samples:
        digest.update(json.dumps([sample.id, sample.text if labels is None else None]).encode())
    if labels is not None:
        digest.update(np.ascontiguousarray(labels).tobytes())
    return digest.hexdigest()
