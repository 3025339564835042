"""How (rows, channels) are cut into tiles, and what forward and backward compute alike."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import configuration, multiprocessors, pin

# Sums: PROGRAMS a multiprocessor, for which registers leave room, each of many tiles of BLOCK numbers, COLUMNS channels
# wide or fewer.
pin("batch_norm_moments", sm_80={"BLOCK": 4096, "COLUMNS": 64, "PROGRAMS": 4, "num_warps": 4})
pin("batch_norm_gradient_sums", sm_80={"BLOCK": 2048, "COLUMNS": 64, "PROGRAMS": 4, "num_warps": 4})
pin("batch_norm_pass", sm_80={"BLOCK": 4096, "COLUMNS": 64, "num_warps": 4})
# What sums leave is read at once, COLUMNS channels a program.
pin("batch_norm_finish", sm_80={"COLUMNS": 8, "num_warps": 4})
MOST_SPLITS = 512
"""programs that may share a channel"""


@triton.jit
def channels_of(BLOCK_C: tl.constexpr, channels, AXIS: tl.constexpr):
    """Channels of a program, and which of them there are."""
    column = tl.program_id(AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    return column, column < channels


@triton.jit
def tile(first, last, column, inside, channels, BLOCK_R: tl.constexpr):
    """Offsets of the rows from `first` (64 bits) up to `last`, and which of them there are."""
    row = first + tl.arange(0, BLOCK_R)
    return row[:, None] * channels + column[None, :], (row < last)[:, None] & inside[None, :]


@triton.jit
def normalised(value, statistics, column, inside, channels):
    """x̂ = (x − mean) / deviation: not as a scale and a shift, which lose a large mean's digits."""
    mean = tl.load(statistics + column, mask=inside, other=0)
    rstd = tl.load(statistics + channels + column, mask=inside, other=0)
    return (value - mean[None, :]) * rstd[None, :]


@triton.jit
def affine(normal, weight, bias, column, inside):
    """γ x̂ + β."""
    gamma = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    beta = tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    return normal * gamma[None, :] + beta[None, :]


def channels_last(x: Tensor) -> Tensor:
    """The tensor (B,C,H,W) in channels last, copied if it is not."""
    return x.contiguous(memory_format=torch.channels_last)


def rows_of(x: Tensor) -> Tensor:
    """The contiguous view (B,H,W,C) of channels last, which kernels read as rows B·H·W by channels."""
    return x.permute(0, 2, 3, 1)


def pass_grid(rows: int, channels: int, device: torch.device) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants of a kernel that a program does one tile of."""
    options = configuration("batch_norm_pass", device)
    sizes = _sizes(options, channels)
    return (triton.cdiv(rows, sizes["BLOCK_R"]), triton.cdiv(channels, sizes["BLOCK_C"])), {**sizes, **options}


def sums_grid(
    kernel: str, rows: int, channels: int, device: torch.device
) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Grid of a kernel that sums over rows, rows a program (the last may have fewer, none has none), and constants."""
    options = configuration(kernel, device)
    sizes, programs = _sizes(options, channels), options.pop("PROGRAMS") * multiprocessors(device)
    tiles, columns = triton.cdiv(rows, sizes["BLOCK_R"]), triton.cdiv(channels, sizes["BLOCK_C"])
    splits = min(max(programs // columns, 1), tiles, MOST_SPLITS)
    per_program = triton.cdiv(tiles, splits) * sizes["BLOCK_R"]
    return (triton.cdiv(rows, per_program), columns), per_program, {**sizes, **options}


def finish_grid(channels: int, splits: int, device: torch.device) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and constants of a kernel that adds up what `splits` programs left of each channel."""
    options = configuration("batch_norm_finish", device)
    columns = options.pop("COLUMNS")
    return (triton.cdiv(channels, columns),), {
        "SPLITS": triton.next_power_of_2(splits),
        "BLOCK_C": columns,
        **options,
    }


def _sizes(options: dict[str, int], channels: int) -> dict[str, int]:
    """Takes BLOCK and COLUMNS from the options."""
    block, columns = options.pop("BLOCK"), min(options.pop("COLUMNS"), triton.next_power_of_2(channels))
    return {"BLOCK_R": block // columns, "BLOCK_C": columns}
