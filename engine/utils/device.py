"""Device and precision of a command."""

from __future__ import annotations

import resource

import torch

from .errors import UserError


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """Device for a `device` setting (auto, cpu or cuda) of the process `local_rank` on this machine.

    Raises:
        UserError: a GPU was asked for and there is none for this process.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"device: process {local_rank} of this machine has no GPU, torch sees {torch.cuda.device_count()}; "
            "start fewer processes or use device cpu"
        )
    return torch.device("cuda", local_rank)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Dtype of torch autocast for a `precision` setting; None: full precision."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in page-locked memory where there is a GPU, which copies it from there without waiting."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def give_back(device: torch.device) -> None:
    """Give the GPU what torch holds of it without need: free blocks, and pools of recordings that are no more."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reserved_bytes(device: torch.device) -> int | None:
    """Most memory of the GPU that torch has held so far, pools of recordings and free blocks included; None: no GPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: what tensors took of the GPU, or what the process took of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
