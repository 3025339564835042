"""Names of files and folders without their places, for what leaves the machine: models, reports, metrics."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HUB = "hf-hub:"
"""what the name of a folder on the Hugging Face Hub begins with"""
FAMILIES = ("ViT-", "RN", HUB, "EVA", "coca_")
"""how names of models begin that hold a slash and are no paths"""


def base_name(path: str | Path) -> str:
    """The last part of a path; a model name such as ViT-B/32 or hf-hub:owner/name as it is."""
    text = str(path)
    known = text.startswith(FAMILIES) and not text.endswith(".json") and not Path(text).exists()
    return text if known or "/" not in text else Path(text).name or text


def data_name(path: str | Path) -> str:
    """Base name of a data file and the first 16 digits of its SHA-256, which tell whether two are the same."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError:
        return base_name(path)
    return f"{base_name(path)} (sha256 {digest})"


def named(value: Any) -> Any:
    """A value with every path in it by name alone: files as `data_name`, folders and absolute paths as `base_name`."""
    if isinstance(value, Mapping):
        return {key: named(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [named(one) for one in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    if os.path.isfile(value):
        return data_name(value)
    return base_name(value) if os.path.isabs(value) or os.path.exists(value) else value
