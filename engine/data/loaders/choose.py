"""The loader of a run, and whose pixels it sees."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch

from ...utils.errors import UserError
from .torch_loader import Load, TorchBatches

Loader = Literal["auto", "dali", "torch"]


def pick_loader(key: str, loader: Loader, device: torch.device, *, torch_only: str | None = None) -> Loader:
    """The loader of a run; `auto` means dali where pixels go to a GPU and DALI is installed, else torch.

    Args:
        key: of the setting, for messages.
        loader, device: of the settings.
        torch_only: the setting that DALI cannot follow; None: there is none.

    Raises:
        UserError: DALI was asked for and is not installed, or cannot do it; names `key`.
    """
    if torch_only is not None:
        if loader == "dali":
            raise UserError(f"{key}: dali does not go with {torch_only}; use torch")
        return "torch"
    if loader == "torch" or (loader == "auto" and device.type != "cuda"):
        return "torch"
    if find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None:
        return "dali"
    if loader == "auto":
        return "torch"
    raise UserError(
        f"{key}: dali is not installed: pip install 'pspg-engine[dali-cuda13]' (or dali-cuda12, by the GPU's driver)"
    )


def load_with(loader: Loader, device: torch.device) -> Load:
    """The way in which a picked loader makes batches; DALI brings their pixels to `device`.

    Raises:
        UserError: DALI is installed and broken.
    """
    if loader == "torch":
        return TorchBatches
    try:
        from .dali_loader import dali_batches
    except (ImportError, OSError) as error:
        raise UserError(f"loader: dali cannot be loaded ({error}); reinstall it, or use torch") from None
    return partial(dali_batches, device=device)


def pixel_source(loader: Loader, *, cached: bool, augmented: bool) -> str:
    """The loader whose pixels a run sees: those of DALI differ by their rounding, and a cache holds Pillow's.

    Args:
        loader: picked.
        cached: pixels come from a cache.
        augmented: training changes them.
    """
    if loader == "dali" and cached:
        return "dali, from a cache" if augmented else "torch"
    return loader
