"""The repaired interpreter: bf16 computes as torch does, and each guard catches what it is for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels import interpreter

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run compiled here, not in Triton's interpreter"
)


@triton.jit
def elementwise(x, y, out, N: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    b = tl.load(y + i)
    if OP == "add":
        c = a + b
    elif OP == "mul":
        c = a * b
    elif OP == "div":
        c = (a / b).to(tl.bfloat16)
    elif OP == "neg":
        c = -a
    elif OP == "abs":
        c = tl.abs(a)
    elif OP == "scale":
        c = a * 0.1
    elif OP == "max":
        c = tl.maximum(a, b)
    elif OP == "where":
        c = tl.where(a < b, a, b * 2)
    elif OP == "exp":
        c = tl.exp(a.to(tl.float32)).to(tl.bfloat16)
    elif OP == "full":
        c = tl.full((N,), 0.1, tl.bfloat16)
    elif OP == "int":
        c = a.to(tl.int32).to(tl.bfloat16)
    elif OP == "half":
        c = a.to(tl.float16).to(tl.bfloat16)
    tl.store(out + i, c)


@triton.jit
def cast(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def reduce(x, total, top, running, M: tl.constexpr, N: tl.constexpr):
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    a = tl.load(x + rows[:, None] * N + columns)
    tl.store(total + rows, tl.sum(a, 1))
    tl.store(top + rows, tl.max(a, 1))
    tl.store(running + rows[:, None] * N + columns, tl.cumsum(a, 1))


@triton.jit
def matmul(x, y, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    a = tl.load(x + m[:, None] * K + k)
    b = tl.load(y + k[:, None] * N + n)
    tl.store(out + m[:, None] * N + n, tl.dot(a, b, out_dtype=tl.float32))


@triton.jit
def copy(x, out, count, B: tl.constexpr):
    """Correct: every program copies B elements, the last fewer."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out + i, tl.load(x + i, mask=i < count), mask=i < count)


@triton.jit
def load_from(pointer):
    return tl.load(pointer)


@triton.jit
def overread(x, out, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out + i % 2, load_from(x + i))


@triton.jit
def overwrite(out, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out + i, i)


@triton.jit
def overadd(out, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.atomic_add(out + i, 1)


@triton.jit
def overswap(out):
    tl.atomic_cas(out + tl.program_id(0), 0, 1)


@triton.jit
def keep_masked(x, out, count, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out + i, tl.load(x + i, mask=i < count))


@triton.jit
def all_write(out):
    tl.store(out, tl.program_id(0))


@triton.jit
def shift(x, B: tl.constexpr):
    """Reads one element of the next program's."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(x + i, tl.load(x + i + 1))


@triton.jit
def read_counter(counter, out):
    tl.atomic_add(counter, 1)
    tl.store(out + tl.program_id(0), tl.load(counter))


@triton.jit
def write_bytes(out):
    """Program 0 writes a word, program 1 the third byte of it."""
    if tl.program_id(0) == 0:
        tl.store(out, 1)
    else:
        tl.store(out.to(tl.pointer_type(tl.int8), bitcast=True) + 2, 1)


@triton.jit
def arrive(counter, out, N: tl.constexpr):
    program = tl.program_id(0) * N + tl.program_id(1)
    tl.store(out + program, tl.atomic_add(counter, 1))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """bf16 of many exponents."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).exp()).bfloat16()


EXPECTED: dict[str, Any] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a, b: -a,
    "abs": lambda a, b: a.abs(),
    "scale": lambda a, b: a * torch.tensor(0.1).bfloat16(),
    "max": torch.maximum,
    "where": lambda a, b: torch.where(a < b, a, b * 2),
    "exp": lambda a, b: a.exp(),
    "full": lambda a, b: torch.full_like(a, 0.1),
    "int": lambda a, b: a.int().bfloat16(),
    "half": lambda a, b: a.half().bfloat16(),
}


@pytest.mark.parametrize("operation", EXPECTED)
def test_bf16_operations_equal_torch(operation: str) -> None:
    a, b = numbers(1024), numbers(1024, seed=1)
    out = torch.empty_like(a)
    elementwise[(1,)](a, b, out, N=1024, OP=operation)
    torch.testing.assert_close(out, EXPECTED[operation](a, b), rtol=0, atol=0)


def test_every_bf16_widens_and_fp32_rounds_to_nearest_even() -> None:
    every = torch.arange(-(2**15), 2**15).short().view(torch.bfloat16)
    wide = torch.empty(2**16)
    cast[(1,)](every, wide, N=2**16)
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)

    # The tie behind every bf16, and its neighbours.
    between = (wide.view(torch.int32)[:, None] + torch.tensor([0x7FFF, 0x8000, 0x8001, 0], dtype=torch.int32)).flatten()
    between = between.view(torch.float32)
    narrow = torch.empty(2**18, dtype=torch.bfloat16)
    cast[(1,)](between, narrow, N=2**18)
    torch.testing.assert_close(narrow, between.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_bf16_reductions_accumulate_in_fp32() -> None:
    x = numbers(16, 64)
    total, top, running = torch.empty_like(x[:, 0]), torch.empty_like(x[:, 0]), torch.empty_like(x)
    reduce[(1,)](x, total, top, running, M=16, N=64)
    assert torch.equal(top, x.amax(1))
    # One bf16 step, should the order of the fp32 sums decide a rounding.
    torch.testing.assert_close(total, x.double().sum(1).bfloat16(), rtol=2**-7, atol=0)
    torch.testing.assert_close(running, x.double().cumsum(1).bfloat16(), rtol=2**-7, atol=1e-5)


def test_bf16_dot_accumulates_in_fp32() -> None:
    a, b, out = numbers(16, 64), numbers(64, 32, seed=1), torch.empty(16, 32)
    matmul[(1,)](a, b, out, M=16, K=64, N=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-4)


def test_correct_kernel_passes() -> None:
    x = torch.randn(100)
    out = torch.zeros(101)
    copy[(7,)](x, out[:100], 100, B=16)
    assert torch.equal(out[:100], x)
    assert out[100] == 0


def test_strided_and_overlapping_views_are_in_bounds() -> None:
    base = torch.arange(64.0)
    out = torch.empty(32)
    copy[(2,)](base[16:48], out, 32, B=16)
    assert torch.equal(out, base[16:48])
    copy[(1,)](base[:40].view(8, 5)[:, :4], base[48:], 16, B=16)
    assert torch.equal(base[48:], base[:16])


def test_load_outside_a_view_is_caught() -> None:
    with pytest.raises(IndexError, match=r"overread: load: 6 of 16 addresses .* program \(0, 0, 0\)"):
        overread[(1,)](torch.zeros(64)[:10], torch.zeros(2), B=16)


def test_store_outside_a_view_is_caught_before_it_happens() -> None:
    storage = torch.full((64,), -1)
    with pytest.raises(IndexError, match="overwrite: store: 6 of 16 addresses"):
        overwrite[(1,)](storage[:10], B=16)
    assert (storage == -1).all()


def test_atomic_outside_is_caught() -> None:
    with pytest.raises(IndexError, match="overadd: atomic: 1 of 8 addresses"):
        overadd[(1,)](torch.zeros(64)[:7], B=8)
    with pytest.raises(IndexError, match=r"overswap: atomic: 1 of 1 addresses .* program \(3, 0, 0\)"):
        overswap[(4,)](torch.zeros(64, dtype=torch.int32)[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64])
def test_masked_lanes_without_other_are_poisoned(dtype: torch.dtype) -> None:
    out = torch.zeros(8, dtype=dtype)
    keep_masked[(1,)](torch.ones(5, dtype=dtype), out, 5, B=8)
    assert (out[:5] == 1).all()
    assert (out[5:].isnan() if dtype.is_floating_point else out[5:] > 2**30).all()


def test_two_writers_are_a_conflict() -> None:
    with pytest.raises(RuntimeError, match=r"all_write: conflict: program \(\d, 0, 0\) writes 1 addresses .* writes"):
        all_write[(2,)](torch.zeros(1))
    all_write[(1,)](torch.zeros(1))


def test_reader_and_writer_are_a_conflict_in_either_order() -> None:
    messages = set()
    for seed in range(8):
        interpreter.shuffle_seed = seed
        with pytest.raises(RuntimeError, match="shift: conflict") as caught:
            shift[(2,)](torch.zeros(17), B=8)
        messages.add(str(caught.value))
    assert messages == {
        "shift: conflict: program (0, 0, 0) reads 1 addresses that program (1, 0, 0) writes",
        "shift: conflict: program (1, 0, 0) writes 1 addresses that program (0, 0, 0) reads",
    }


def test_plain_load_of_an_atomic_counter_is_a_conflict() -> None:
    with pytest.raises(RuntimeError, match="read_counter: conflict"):
        read_counter[(2,)](torch.zeros(1), torch.zeros(2))


def test_accesses_of_different_widths_meet() -> None:
    with pytest.raises(RuntimeError, match="write_bytes: conflict"):
        write_bytes[(2,)](torch.zeros(4, dtype=torch.int32))


def test_programs_run_shuffled_and_differently_every_time() -> None:
    orders = []
    for _ in range(2):
        out = torch.empty(64, dtype=torch.int32)
        arrive[(8, 8)](torch.zeros(1, dtype=torch.int32), out, N=8)
        assert sorted(out.tolist()) == list(range(64))
        orders.append(out)
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], torch.arange(64, dtype=torch.int32))

    # A seed repeats its order.
    interpreter.shuffle_seed -= 1
    again = torch.empty_like(out)
    arrive[(8, 8)](torch.zeros(1, dtype=torch.int32), again, N=8)
    assert torch.equal(again, orders[1])
    assert torch.equal(again.argsort(), torch.from_numpy(interpreter.program_order(64, interpreter.shuffle_seed - 1)))


def test_repair_is_idempotent_and_needs_the_interpreter() -> None:
    before = triton.runtime.interpreter.InterpreterBuilder.binary_op
    interpreter.repair()
    assert triton.runtime.interpreter.InterpreterBuilder.binary_op is before

    compiled = subprocess.run(
        [sys.executable, "-c", "from tests.kernels.interpreter import repair; repair()"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 1
    assert compiled.stderr.splitlines()[-1].startswith("RuntimeError: set TRITON_INTERPRET=1")
