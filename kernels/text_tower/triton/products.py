"""Launches of the products with an epilogue, and the one place that chooses between them and the library's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...launch import architecture, configuration, launch, multiprocessors, pin, recording
from . import product_kernels

Choice = Literal["library", "activation", "folded"]
"""library: the library's products, with LayerNorm and QuickGELU as passes between them; activation: QuickGELU and its
derivative in the epilogues of the MLP's two products; folded: both LayerNorms and the residual as well"""
CHOICE_NAMES: tuple[Choice, ...] = ("library", "activation", "folded")

CHOICES: dict[int, tuple[tuple[int, Choice], ...]] = {80: ((0, "library"),), 90: ((0, "library"), (256, "folded"))}
"""architecture → (fewest rows, choice), ascending. Nobody has measured them yet: `use` and a GPU can say better"""

Tiles = Literal["by_shape", "narrow", "wide", "small"]
"""narrow: 128 × 128, two programs a multiprocessor, of which one multiplies while the other is in its epilogue; wide:
128 × 256, a quarter fewer operands to load, one program a multiprocessor, and on sm_80 narrow; small: 64 × 64, for few
rows, which give all multiprocessors a tile only where tiles are small; by_shape: as `_size` says"""
TILE_NAMES: tuple[Tiles, ...] = ("by_shape", "narrow", "wide", "small")

_SM_80 = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "PARTS": 2, "num_warps": 8, "num_stages": 4}
_SM_90 = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "PARTS": 4, "num_warps": 4, "num_stages": 3}
_SM_100 = {**_SM_90, "num_warps": 8}
# A thread holds as much of the result as of a narrow tile; parts are as wide, since moments are of parts.
_WIDE = {**_SM_90, "BLOCK_N": 256, "PARTS": 8, "num_warps": 8, "num_stages": 4}
_SMALL_80 = {**_SM_80, "BLOCK_M": 64, "BLOCK_N": 64, "PARTS": 1, "num_warps": 4}
_SMALL = {**_SM_90, "BLOCK_M": 64, "BLOCK_N": 64, "PARTS": 2, "num_stages": 4}
_SMALL_100 = {**_SMALL, "num_warps": 8}
for _name in ("linear", "add_linear", "norm_backward"):
    pin(_name, sm_80=_SM_80, sm_90=_SM_90, sm_100=_SM_100)
    pin(f"{_name}_wide", sm_80=_SM_80, sm_90=_WIDE, sm_100=_WIDE)
    pin(f"{_name}_small", sm_80=_SMALL_80, sm_90=_SMALL, sm_100=_SMALL_100)
pin("activation_backward", sm_80=_SM_80, sm_90={**_SM_90, "PARTS": 8}, sm_100={**_SM_100, "BLOCK_N": 64, "PARTS": 2})
pin("activation_backward_wide", sm_80=_SM_80, sm_90={**_WIDE, "PARTS": 16}, sm_100={**_WIDE, "PARTS": 16})
pin("activation_backward_small", sm_80=_SMALL_80, sm_90={**_SMALL, "PARTS": 4}, sm_100={**_SMALL_100, "PARTS": 4})
pin("product", sm_80={"DESCRIPTORS": 0, "PROGRAMS": 1}, sm_90={"DESCRIPTORS": 1, "PROGRAMS": 2})
pin("product_small", sm_80={"DESCRIPTORS": 0, "PROGRAMS": 2}, sm_90={"DESCRIPTORS": 1, "PROGRAMS": 2})
pin("product_wide", sm_80={"DESCRIPTORS": 0, "PROGRAMS": 1}, sm_90={"DESCRIPTORS": 1, "PROGRAMS": 1})
"""of all four: whether operands are tensor descriptors, and programs a multiprocessor"""
_LONG = 1024
"""inner length from which on a wide tile pays: nothing runs beside its epilogue"""

_forced: Choice | None = None
_tiles: Tiles = "by_shape"


@contextmanager
def use(choice: Choice | None = None, tiles: Tiles | None = None) -> Iterator[None]:
    """Within this context all products are of one choice, and their tiles of one size; None leaves it as it is.

    To compare them, and for tests.
    """
    global _forced, _tiles
    before = _forced, _tiles
    _forced, _tiles = choice or _forced, tiles or _tiles
    try:
        yield
    finally:
        _forced, _tiles = before


def tiles() -> Tiles:
    """What `use` says of tiles here, for a backward that runs elsewhere."""
    return _tiles


def choose(x: Tensor) -> Choice:
    """The products of a block on x (…,W)."""
    if _forced is not None:
        return _forced
    if x.dtype == torch.float32:  # its products are three of TF32 each, which spill registers here
        return "library"
    rows, here = x.numel() // x.shape[-1], architecture(x.device)
    known = CHOICES[max((number for number in CHOICES if number <= here), default=min(CHOICES))]
    return [choice for fewest, choice in known if fewest <= rows][-1]


def run_linear(
    a: Tensor, weight: Tensor, moments: Tensor | None, sums: Tensor | None, bias: Tensor, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """a·weightᵀ + bias; with moments that of the LayerNorm of a, whose affine part is folded into weight and bias.

    Args:
        a: (rows,depth).
        weight: (columns,depth).
        moments: (2,tiles,rows) float32 of a, from `run_add_linear`; None: a is multiplied as it is.
        sums: (columns,) float32 sums of the rows of weight, with moments.
        bias: (columns,).
        eps: of the LayerNorm.
        kind: "out", "activated" (QuickGELU of it) or "both".

    Returns:
        The result and its QuickGELU (rows,columns), and (2,rows) float32 mean and reciprocal standard deviation of a.
        What was not asked for is empty.
    """
    (rows, depth), columns = a.shape, len(weight)
    out, activated, statistics = _linear_results(a, weight, moments, None, bias, eps, kind)
    wanted = [x if kind in (name, "both") else None for name, x in (("out", out), ("activated", activated))]
    tile = _Tile("linear", a, columns, weight, *wanted)
    tiles = 1 if moments is None else moments.shape[1]
    launch(
        product_kernels._linear_kernel,
        tile.grid(rows, columns),
        *(tile.left(a), tile.right(weight, transposed=True), moments, sums, bias),
        *(None if x is None else tile.part(x) for x in wanted),
        None if moments is None else statistics,
        *(rows, columns, depth, eps, tiles),
        MOMENT_BLOCK=_moment_block(a),
        MOMENT_TILES=triton.next_power_of_2(tiles),
        **tile.options,
    )
    return out, activated, statistics


def run_add_linear(a: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """residual + a·weightᵀ + bias, and the moments that a LayerNorm of it needs.

    Args:
        a: (rows,depth).
        weight: (columns,depth).
        bias: (columns,).
        residual: (rows,columns).

    Returns:
        (rows,columns), and (2,tiles,rows) float32: mean of a row over each part of the columns, and sum of squares
        about it.
    """
    (rows, depth), columns = a.shape, len(weight)
    out, moments = _add_linear_results(a, weight, bias, residual)
    tile = _Tile("add_linear", a, columns, weight, residual)
    launch(
        product_kernels._add_linear_kernel,
        tile.grid(rows, columns),
        *(tile.left(a), tile.right(weight, transposed=True), bias, tile.part(residual), tile.part(out), moments),
        *(rows, columns, depth),
        **tile.options,
    )
    return out, moments


def run_activation_backward(
    gradient: Tensor, weight: Tensor, hidden: Tensor, sums: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """gradient·weight ⊙ QuickGELU'(hidden), and the row sums that LayerNorm's backward needs of it.

    Args:
        gradient: (rows,depth).
        weight: (depth,columns).
        hidden: (rows,columns).
        sums, bias: (columns,) float32 of the folded linear layer that made `hidden`; None: no row sums.

    Returns:
        d (rows,columns), and (2,tiles,rows) float32 Σ d·sums and Σ d·(hidden - bias) over tiles of columns; or empty.
    """
    (rows, depth), columns = gradient.shape, weight.shape[1]
    d_hidden, row_sums = _activation_backward_results(gradient, weight, hidden, sums, bias)
    tile = _Tile("activation_backward", gradient, columns, weight, hidden)
    launch(
        product_kernels._activation_backward_kernel,
        tile.grid(rows, columns),
        *(tile.left(gradient), tile.right(weight, transposed=False), tile.part(hidden), sums, bias),
        *(tile.part(d_hidden), None if sums is None else row_sums, rows, columns, depth),
        **tile.options,
    )
    return d_hidden, row_sums


def run_norm_backward(
    d: Tensor, weight: Tensor, row_sums: Tensor, statistics: Tensor, x: Tensor, residual: Tensor
) -> Tensor:
    """residual + the gradient by x of a folded linear layer on its LayerNorm.

    Args:
        d: (rows,depth) gradient of the layer's result.
        weight: (depth,columns), γ folded in.
        row_sums: (2,tiles,rows) float32 of d, from `run_activation_backward`.
        statistics: (2,rows) float32 of x, from `run_linear`.
        x, residual: (rows,columns).

    Returns:
        (rows,columns).
    """
    (rows, depth), columns = d.shape, weight.shape[1]
    d_x = torch.empty_like(x)
    tile = _Tile("norm_backward", d, columns, weight, x, residual)
    launch(
        product_kernels._norm_backward_kernel,
        tile.grid(rows, columns),
        *(tile.left(d), tile.right(weight, transposed=False), row_sums, statistics),
        *(tile.part(x), tile.part(residual), tile.part(d_x)),
        *(rows, columns, depth, row_sums.shape[1]),
        SUM_TILES=triton.next_power_of_2(row_sums.shape[1]),
        **tile.options,
    )
    return d_x


def _linear_results(
    a: Tensor, weight: Tensor, moments: Tensor | None, sums: Tensor | None, bias: Tensor, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = len(a), len(weight)
    out, activated = (a.new_empty((rows, columns) if kind in (name, "both") else (0,)) for name in ("out", "activated"))
    return out, activated, a.new_empty((0,) if moments is None else (2, rows), dtype=torch.float32)


def _add_linear_results(a: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    tiles = triton.cdiv(len(weight), _moment_block(a))
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    return out, a.new_empty((2, tiles, len(a)), dtype=torch.float32)


def _activation_backward_results(
    gradient: Tensor, weight: Tensor, hidden: Tensor, sums: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    columns = weight.shape[1]
    tiles = triton.cdiv(columns, _options("activation_backward", gradient, columns)["BLOCK_N"])
    row_sums = gradient.new_empty((0,) if sums is None else (2, tiles, len(gradient)), dtype=torch.float32)
    return torch.empty_like(hidden, memory_format=torch.contiguous_format), row_sums


def _moment_block(a: Tensor) -> int:
    """Columns that a pair of moments is of: those of a part of a tile of any size."""
    options = configuration("add_linear", a.device)
    return options["BLOCK_N"] // options["PARTS"]


def _options(kernel: str, a: Tensor, columns: int) -> dict[str, int]:
    """Configuration of a kernel that makes (rows,columns) of a (rows,depth), and of its programs."""
    size = _size(a, columns) if _tiles == "by_shape" else _tiles
    suffix = "" if size == "narrow" else f"_{size}"
    return {**configuration(f"product{suffix}", a.device), **configuration(f"{kernel}{suffix}", a.device)}


def _size(a: Tensor, columns: int) -> Tiles:
    """Small where narrow tiles leave half of the multiprocessors idle; wide where the inner length is long, and wide
    tiles need at most half as many rounds of the multiprocessors."""
    (rows, depth), processors = a.shape, multiprocessors(a.device)
    narrow, wide = (triton.cdiv(rows, 128) * triton.cdiv(columns, width) for width in (128, 256))
    if 2 * narrow <= processors:
        return "small"
    rounds = triton.cdiv(narrow, processors)
    return "wide" if depth >= _LONG and 2 * triton.cdiv(wide, processors) <= rounds else "narrow"


def _aligned(x: Tensor) -> bool:
    """A tensor's memory begins at a multiple of 16 bytes; one that has none counts as freshly allocated."""
    return recording() or x.data_ptr() % 16 == 0


class _Tile:
    """Blocks of a kernel, and matrices as it reads them: tensor descriptors where the layout of all allows it."""

    def __init__(self, kernel: str, a: Tensor, columns: int, *matrices: Tensor | None) -> None:
        own = _options(kernel, a, columns)
        self._programs = own.pop("PROGRAMS") * multiprocessors(a.device)
        self._m, self._n, self._k = own["BLOCK_M"], own["BLOCK_N"], own["BLOCK_K"]
        self._width = self._n // own["PARTS"]
        self._descriptors = bool(own.pop("DESCRIPTORS")) and all(
            x is None or (x.shape[1] * x.element_size() % 16 == 0 and _aligned(x)) for x in (a, *matrices)
        )
        precision = "tf32x3" if a.dtype == torch.float32 else "tf32"  # of float32 products only
        self.options: dict[str, Any] = {**own, "DESCRIPTORS": self._descriptors, "PRECISION": precision}

    def grid(self, rows: int, columns: int) -> tuple[int]:
        """At most the programs that run at a time: each goes on to the next tile."""
        return (min(triton.cdiv(rows, self._m) * triton.cdiv(columns, self._n), self._programs),)

    def left(self, x: Tensor) -> Any:
        """(rows,depth), multiplied."""
        return self._blocks(x, self._m, self._k)

    def right(self, x: Tensor, *, transposed: bool) -> Any:
        """(columns,depth) if transposed, else (depth,columns), multiplied."""
        return self._blocks(x, self._n, self._k) if transposed else self._blocks(x, self._k, self._n)

    def part(self, x: Tensor) -> Any:
        """(rows,columns), read or written in the epilogue."""
        return self._blocks(x, self._m, self._width)

    def _blocks(self, x: Tensor, rows: int, columns: int) -> Any:
        return TensorDescriptor.from_tensor(x, [rows, columns]) if self._descriptors else x


linear = torch.library.custom_op("pspg::linear", run_linear, mutates_args=())
add_linear = torch.library.custom_op("pspg::add_linear", run_add_linear, mutates_args=())
activation_backward = torch.library.custom_op("pspg::activation_backward", run_activation_backward, mutates_args=())
norm_backward = torch.library.custom_op("pspg::norm_backward", run_norm_backward, mutates_args=())

linear.register_fake(_linear_results)
add_linear.register_fake(_add_linear_results)
activation_backward.register_fake(_activation_backward_results)


@norm_backward.register_fake
def _(d: Tensor, weight: Tensor, row_sums: Tensor, statistics: Tensor, x: Tensor, residual: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
