"""Triton's CPU interpreter, repaired and guarded, so that kernels can be tested without a GPU.

As it comes, the interpreter computes bf16 on the raw bits and accepts what corrupts memory or races on a GPU. After
`repair()` every bf16 operation is one fp32 operation and one rounding to nearest even, and every launch is checked:

- bounds: a load, store or atomic outside every tensor argument of the launch is an IndexError;
- poison: lanes that a load masks off without `other` hold NaN or huge integers, since a GPU leaves them undefined;
- conflicts: a program that writes what another reads or writes is a RuntimeError (atomics among themselves may meet);
- order: programs run in an order drawn anew for every launch.

What it does not see: an overrun that ends inside another argument, or in the gaps of a strided view; races between the
threads of one program (two lanes that store to one address, a store and a load without a barrier between them);
overflow of 32-bit index arithmetic that lands inside a tensor; tf32 (dots of float32 are exact); the rounding of every
partial sum when tl.sum adds bf16 (here fp32, rounded once); alignment, shared memory, registers, num_warps.
It knows no synchronisation: a kernel that hands data from program to program, guarded by an atomic, is refused, and so
are pointers that do not come from a tensor argument. atomic_add on bf16 fails, as it does without the repair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle

shuffle_seed = 0
"""Seed of the next launch's order; every launch adds one. Set it to repeat an order."""


def repair() -> None:
    """Patch the interpreter: bf16 arithmetic, bounds, poison, conflicts, order. A second call does nothing.

    Raises:
        RuntimeError: triton was imported without TRITON_INTERPRET=1.
    """
    if not isinstance(tl.standard._sum_combine, InterpretedFunction):
        raise RuntimeError("set TRITON_INTERPRET=1 before the first import of triton: its kernels compile now")
    if getattr(InterpreterBuilder, "repaired", False):
        return
    _repair_bf16()
    _install_guards()
    InterpreterBuilder.repaired = True


def program_order(programs: int, seed: int) -> NDArray[np.int64]:
    """Permutation in which the programs of a launch run."""
    return np.random.default_rng(seed).permutation(programs)


# bf16


def bf16_to_fp32(bits: Any) -> NDArray[np.float32]:
    """Values of bf16 numbers given as uint16."""
    return np.asarray(np.asarray(bits, np.uint16).astype(np.uint32) << 16, np.uint32).view(np.float32)


def fp32_to_bf16(values: Any) -> NDArray[np.uint16]:
    """Nearest bf16 numbers, ties to even, as uint16; NaN becomes the canonical one."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _is_bf16(value: Any) -> bool:
    # Comparisons leave handles of a float type that hold bools.
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16 and value.data.dtype == np.uint16


def _up(value: Any) -> Any:
    return TensorHandle(bf16_to_fp32(value.data), tl.float32) if _is_bf16(value) else value


def _down(handle: TensorHandle) -> TensorHandle:
    return handle if handle.data.dtype == np.bool_ else TensorHandle(fp32_to_bf16(handle.data), tl.bfloat16)


def _repair_bf16() -> None:
    for name in ("binary_op", "unary_op", "create_fma", "create_erf", "create_rsqrt", "create_clampf"):
        _replace(InterpreterBuilder, name, _through_fp32)
    _replace(InterpreterBuilder, "create_dot", _repaired_dot)
    # All conversions between types end in cast_impl, those to and from fp8 excepted, which know bf16.
    _replace(InterpreterBuilder, "cast_impl", _repaired_cast)
    # Releases before 3.9 lack it.
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(fp32_to_bf16([value]), tl.bfloat16)
    for operations, names in (
        (triton_interpreter.ReduceOps, ("sum", "min_max")),
        (triton_interpreter.ScanOps, ("cumsum", "cumprod")),
    ):
        for name in names:
            _replace(operations, name, _reduced_in_fp32)


def _replace(owner: type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    if hasattr(owner, name):
        setattr(owner, name, wrap(getattr(owner, name)))


def _through_fp32(original: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if not any(map(_is_bf16, arguments)):
            return original(self, *arguments, **keywords)
        return _down(original(self, *map(_up, arguments), **keywords))

    return operation


def _repaired_dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        product = original(self, _up(a), _up(b), _up(accumulator), *options)
        return _down(product) if _is_bf16(accumulator) else product

    return create_dot


def _repaired_cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar != tl.bfloat16:
            return original(self, _up(source), target)
        return TensorHandle(fp32_to_bf16(_up(source).data.astype(np.float32)), tl.bfloat16)

    return cast_impl


def _reduced_in_fp32(original: Callable[..., Any]) -> Callable[..., Any]:
    def down(result: Any) -> Any:
        if result.dtype != tl.float32:  # the index of an argmax
            return result
        shape = list(result.shape)
        return tl.core.tensor(_down(result.handle), tl.block_type(tl.bfloat16, shape) if shape else tl.bfloat16)

    def operation(self: Any, values: Any, *arguments: Any, **keywords: Any) -> Any:
        first = values[0] if isinstance(values, tuple) else values
        if not _is_bf16(first.handle):
            return original(self, values, *arguments, **keywords)
        widened = tl.core.tensor(_up(first.handle), tl.block_type(tl.float32, list(first.handle.data.shape)))
        result = original(self, widened, *arguments, **keywords)
        return type(result)(map(down, result)) if isinstance(result, (list, tuple)) else down(result)

    return operation


# Guards

READ, WRITE, ATOMIC = range(3)
_VERBS = ("reads", "writes", "updates atomically")
_EXCLUSIVE = {READ: (WRITE, ATOMIC), WRITE: (WRITE, READ, ATOMIC), ATOMIC: (WRITE, READ)}
"""kind of access → kinds that no other program may have made at the same address"""


class _Launch:
    """Memory that a launch may touch, who touched it, and the order of its programs."""

    MANY = -1

    def __init__(self, kernel: str, seed: int) -> None:
        self.kernel = kernel
        self.seed = seed
        self.error: Exception | None = None
        self.atomic = False
        """plain accesses are parts of an atomic one"""
        self.dims: tuple[int, ...] = (1, 1, 1)
        self.order = np.zeros(1, np.int64)
        self.program = 0
        self.allow(())

    def allow(self, tensors: Iterable[Any]) -> None:
        """Set the memory that may be touched: the extents of tensors, joined where they overlap."""
        # The empty segment at 0 is there so that every address has a segment that starts before it.
        segments = [(0, 0)]
        self.unit = 8
        for low, high, size in sorted(_extent(tensor) for tensor in tensors):
            self.unit = min(self.unit, size)
            if low < segments[-1][1]:
                segments[-1] = (segments[-1][0], max(segments[-1][1], high))
            else:
                segments.append((low, high))
        self.starts, self.ends = np.array(segments, np.uint64).T
        # One column per unit of memory, so that accesses of different widths meet: who touched it, from 1, by kind.
        columns = [0, *(-((low - high) // self.unit) for low, high in segments)]
        self.offsets = np.cumsum(columns, dtype=np.int64)[:-1]
        self.touched = np.zeros((3, sum(columns)), np.int32)

    def set_grid(self, *dims: int) -> None:
        """Draw the order of a grid's programs."""
        self.dims = dims
        self.order = program_order(int(np.prod(dims)), self.seed)

    def enter(self, *index: int) -> tuple[int, ...]:
        """Start the program whose turn it is at a place in the interpreter's order; returns its index."""
        self.program = int(self.order[np.ravel_multi_index(index, self.dims)])
        return self._index(self.program)

    def access(self, kind: int, name: str, pointers: TensorHandle, mask: NDArray[np.bool_] | None = None) -> None:
        """Check the addresses of one access, and keep them.

        Raises:
            IndexError: some lie outside every tensor argument.
            RuntimeError: another program made an access that this one conflicts with.
        """
        addresses = np.asarray(pointers.data).astype(np.uint64, copy=False)
        addresses = addresses.ravel() if mask is None else addresses[mask]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        segment = np.searchsorted(self.starts, addresses, side="right") - 1
        ends = self.ends[segment]
        # The difference is unsigned, and wraps where the address is behind the end.
        outside = int(((addresses >= ends) | (ends - addresses < size)).sum())
        if outside:
            where = f"outside every tensor argument in program {self._index(self.program)}"
            self._fail(IndexError(f"{self.kernel}: {name}: {outside} of {addresses.size} addresses {where}"))
        offsets = (addresses - self.starts[segment]).astype(np.int64)
        if self.unit > 1 and (size % self.unit or (offsets % self.unit).any()):
            # A pointer was cast to a narrower type than that of any tensor.
            self.touched = np.repeat(self.touched, self.unit, axis=1)
            self.offsets, self.unit = self.offsets * self.unit, 1
        units = (self.offsets[segment] + offsets // self.unit)[:, None] + np.arange(size // self.unit)
        self._meet(ATOMIC if self.atomic else kind, units)

    def _meet(self, kind: int, units: NDArray[np.int64]) -> None:
        me = self.program + 1
        for other in _EXCLUSIVE[kind]:
            owners = self.touched[other, units]
            conflicts = (owners != 0) & (owners != me)
            if conflicts.any():
                owner = int(owners[conflicts][0])
                who = "several programs" if owner == self.MANY else f"program {self._index(owner - 1)}"
                count = int(conflicts.any(axis=1).sum())
                does = f"{_VERBS[kind]} {count} addresses that {who} {_VERBS[other]}"
                self._fail(RuntimeError(f"{self.kernel}: conflict: program {self._index(self.program)} {does}"))
        before = self.touched[kind, units]
        self.touched[kind, units] = np.where((before == 0) | (before == me), me, self.MANY)

    def _index(self, program: int) -> tuple[int, ...]:
        return tuple(map(int, np.unravel_index(program, self.dims)))

    def _fail(self, error: Exception) -> None:
        self.error = error
        raise error


_launch: _Launch | None = None


def _extent(tensor: Any) -> tuple[int, int, int]:
    """First byte, the byte behind the last, and bytes of an element."""
    size, low = tensor.element_size(), tensor.data_ptr()
    if 0 in tensor.shape:
        return low, low, size
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return low, low + size * (1 + last), size


def _tensors(argument: Any) -> Iterator[Any]:
    if hasattr(argument, "data_ptr"):
        yield argument
    elif isinstance(argument, (tuple, list)):
        for part in argument:
            yield from _tensors(part)
    elif hasattr(argument, "base"):  # a tensor descriptor
        yield from _tensors(argument.base)


def _mask(mask: Any, pointers: TensorHandle) -> NDArray[np.bool_]:
    # Descriptors bring a bare array before 3.9.
    values = mask.data if isinstance(mask, TensorHandle) else mask
    return np.broadcast_to(np.asarray(values, np.bool_), np.shape(pointers.data))


def _poison(dtype: Any, like: NDArray[Any]) -> Any:
    if dtype == tl.bfloat16:
        return 0x7FC0
    if like.dtype.kind == "f":
        return np.nan
    # 0x7F is NaN in fp8. 0x5A… stays far from zero when it is multiplied by a power of two and wraps.
    byte = 0x7F if dtype.is_floating() else 0x5A
    return True if like.dtype.kind == "b" else int.from_bytes([byte] * like.dtype.itemsize, "little")


def _install_guards() -> None:
    for name, wrap in (
        ("create_masked_load", _guarded_load),
        ("create_masked_store", _guarded_store),
        ("create_atomic_rmw", _guarded_rmw),
        ("create_atomic_cas", _guarded_cas),
        # Releases since 3.9 build these from plain loads and stores.
        ("create_atomic_load", _atomically),
        ("create_atomic_store", _atomically),
        ("create_atomic_poll", _atomically),
        ("set_grid_dim", _shuffled_grid),
        ("set_grid_idx", _shuffled_index),
    ):
        _replace(InterpreterBuilder, name, wrap)
    _replace(GridExecutor, "_init_args_hst", _observed_arguments)
    _replace(GridExecutor, "__call__", _guarded_launch)


def _guarded_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *options: Any, **keywords: Any) -> Any:
        active = _mask(mask, ptrs)
        if _launch is not None:
            _launch.access(READ, "load", ptrs, active)
        loaded = original(self, ptrs, mask, other, *options, **keywords)
        if other is None and not active.all():
            loaded.data = np.where(active, loaded.data, _poison(loaded.dtype, loaded.data)).astype(loaded.data.dtype)
        return loaded

    return create_masked_load


def _guarded_store(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *options: Any, **keywords: Any) -> Any:
        if _launch is not None:
            _launch.access(WRITE, "store", ptrs, _mask(mask, ptrs))
        return original(self, ptrs, value, mask, *options, **keywords)

    return create_masked_store


def _guarded_rmw(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_atomic_rmw(self: Any, operation: Any, ptr: Any, value: Any, mask: Any, *options: Any) -> Any:
        if _launch is not None:
            _launch.access(ATOMIC, "atomic", ptr, _mask(mask, ptr))
        return original(self, operation, ptr, value, mask, *options)

    return create_atomic_rmw


def _guarded_cas(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_atomic_cas(self: Any, ptr: Any, *arguments: Any) -> Any:
        if _launch is not None:
            _launch.access(ATOMIC, "atomic", ptr)
        return original(self, ptr, *arguments)

    return create_atomic_cas


def _atomically(original: Callable[..., Any]) -> Callable[..., Any]:
    def operation(self: Any, *arguments: Any) -> Any:
        if _launch is None:
            return original(self, *arguments)
        _launch.atomic = True
        try:
            return original(self, *arguments)
        finally:
            _launch.atomic = False

    return operation


def _shuffled_grid(original: Callable[..., Any]) -> Callable[..., Any]:
    def set_grid_dim(self: Any, *dims: int) -> None:
        original(self, *dims)
        if _launch is not None:
            _launch.set_grid(*dims)

    return set_grid_dim


def _shuffled_index(original: Callable[..., Any]) -> Callable[..., Any]:
    def set_grid_idx(self: Any, *index: int) -> None:
        original(self, *(_launch.enter(*index) if _launch is not None else index))

    return set_grid_idx


def _observed_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_args_hst(self: Any, arguments: Any, keywords: Any) -> Any:
        # Copies on the host where the tensors are on a device: the addresses that the kernel gets.
        arguments, keywords = original(self, arguments, keywords)
        if _launch is not None:
            _launch.allow(_tensors([*arguments, *keywords.values()]))
        return arguments, keywords

    return init_args_hst


def _guarded_launch(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        global _launch, shuffle_seed
        before, launch = _launch, _Launch(self.fn.__name__, shuffle_seed)
        _launch = launch
        shuffle_seed += 1
        try:
            return original(self, *arguments, **keywords)
        except Exception:
            # The interpreter wraps what a kernel raises.
            if launch.error is not None:
                raise launch.error from None
            raise
        finally:
            _launch = before

    return call
