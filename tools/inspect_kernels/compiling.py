"""Compile a recorded launch for an architecture, and read what the compiled kernel uses."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import struct
import subprocess
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from pspg.kernels.launch import Launch

TENSOR = r"[A-Z]MMA\b|[A-Z]GMMA\b|UTC\w*MMA\b"
"""instructions of tensor cores"""


@dataclass(frozen=True)
class Unit:
    """One compilation."""

    module: str
    kernel: str
    """qualified name in the module"""
    architecture: int
    signature: tuple[tuple[str, Any], ...]
    """parameter → type; of a named tuple, a named tuple of types"""
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    """parameter number, and number within a tuple → value"""
    attributes: tuple[tuple[tuple[int, ...], str], ...]
    """the same → what is known of its value, as Triton writes it ("D": divisible by 16)"""
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Resources:
    """Resources that a compiled kernel uses."""

    registers: int = 0
    spill_bytes: int = 0
    spills_in_products: int = 0
    """instructions that spill or fetch again within loops of products"""
    shared_bytes: int = 0
    tensor_instructions: int = 0
    wide_loads: int = 0
    """global loads of 128 bits or more, or by TMA"""
    loads: int = 0
    """all global loads"""
    instructions: int = 0
    """all that a warp runs through once"""
    loop: int = 0
    """those of its longest loop"""
    dots: tuple[str, ...] = ()
    """operand types of its products; of fp32 operands, the precision (ieee, tf32x3, …)"""
    seconds: float = 0.0
    error: str = ""
    """why there is no compiled kernel"""


def specialise(launch: Launch, architecture: int) -> Unit:
    """The compilation that a launch asks for: Triton's own binder says what is constant, aligned or divisible."""
    kernel = jit_function(launch.kernel)
    backend = make_backend(GPUTarget("cuda", architecture, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, known, _ = bind(**launch.arguments)
    types = [(name, kind[0]) for name, kind in zip(bound, known, strict=True)]
    parts = [
        part
        for number, (name, kind) in enumerate(zip(bound, known, strict=True))
        for part in _parts((number,), kind[0], kind[1], bound[name])
    ]
    return Unit(
        kernel.fn.__module__,
        kernel.fn.__qualname__,
        architecture,
        signature=tuple(types),
        constants=tuple((path, value) for path, kind, _, value in parts if kind == "constexpr"),
        attributes=tuple((path, known) for path, kind, known, _ in parts if kind != "constexpr" and known),
        options=tuple(sorted(launch.options.items())),
    )


def _parts(path: tuple[int, ...], kind: Any, known: Any, value: Any) -> Iterator[tuple[tuple[int, ...], str, Any, Any]]:
    """Path, type, what is known and value of a parameter, or of every entry of a tuple."""
    if isinstance(kind, tuple):
        for number, entry in enumerate(zip(kind, known, value, strict=True)):
            yield from _parts((*path, number), *entry)
    else:
        yield path, kind, known, value


def jit_function(kernel: Any) -> Any:
    """A kernel without autotuners and heuristics."""
    while not hasattr(kernel, "params"):
        kernel = kernel.fn
    return kernel


def compile_all(units: Sequence[Unit], jobs: int) -> dict[Unit, Resources]:
    """Compile in `jobs` processes, afresh: nothing is taken from Triton's cache or left there."""
    results: dict[Unit, Resources] = {}
    codes: dict[int, dict[Unit, bytes]] = {}
    # The server of all workers imports torch and triton once.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, *sorted({unit.module for unit in units})])
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(jobs, context, _set_up_compiler, (cache,)) as pool,
    ):
        futures: dict[Future[tuple[Resources, bytes]], Unit] = {pool.submit(_compile, unit): unit for unit in units}
        for future in tqdm(as_completed(futures), "compile", total=len(units), unit="kernel", disable=None):
            unit, error = futures[future], future.exception()
            if error is None:
                results[unit], code = future.result()
                if code:
                    codes.setdefault(unit.architecture, {})[unit] = code
            else:
                results[unit] = Resources(error=f"{error} (with --jobs 1 the first kernel that fails is the culprit)")
    for architecture, found in codes.items():
        for unit, listing in zip(found, disassemble(list(found.values()), architecture), strict=True):
            instructions = Counter(instruction.name for instruction in listing)
            results[unit] = replace(
                results[unit],
                instructions=len(listing) - instructions["NOP"],
                loop=longest_loop(listing),
                spills_in_products=spills_in_products(listing),
                tensor_instructions=_count(instructions, TENSOR),
                wide_loads=_count(instructions, r"LDG(STS)?\b.*\.(128|256)\b|UTMALDG\b"),
                loads=_count(instructions, r"LDG(STS)?\b|UTMALDG\b"),
            )
    return results


def _set_up_compiler(cache: str) -> None:
    triton.knobs.cache.dir = cache
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True


def _compile(unit: Unit) -> tuple[Resources, bytes]:
    """Resources without the counts of instructions, and the machine code."""
    start = time.perf_counter()
    log = io.StringIO()
    try:
        kernel: Any = importlib.import_module(unit.module)
        for name in unit.kernel.split("."):
            kernel = getattr(kernel, name)
        target = GPUTarget("cuda", unit.architecture, 32)
        attributes = {path: make_backend(target).parse_attr(known) for path, known in unit.attributes}
        source = ASTSource(jit_function(kernel), dict(unit.signature), dict(unit.constants), attributes)
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=target, options=dict(unit.options))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Resources(seconds=time.perf_counter() - start, error=reason[:500]), b""
    ptxas = log.getvalue()
    used = Resources(
        registers=max(map(int, re.findall(r"Used (\d+) registers", ptxas))),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", ptxas))),
        shared_bytes=compiled.metadata.shared + sum(map(int, re.findall(r"(\d+) bytes smem", ptxas))),
        dots=_dots(compiled.asm["ttir"]),
        seconds=time.perf_counter() - start,
    )
    return used, machine_code(compiled.asm["cubin"])


def machine_code(cubin: bytes) -> bytes:
    """The code sections of a compiled kernel, an ELF file."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + size * i) for i in range(number)]
    name_table = sections[names][4]
    return b"".join(
        cubin[start : start + length]
        for name, _, _, _, start, length in sections
        if cubin[name_table + name :].startswith(b".text.")
    )


class Instruction(NamedTuple):
    """A line of a listing."""

    address: int
    name: str
    target: int | None
    """address that it branches to"""


def longest_loop(listing: Sequence[Instruction]) -> int:
    """Instructions of the longest loop: from where a branch leads back to, to the branch."""
    return max((end - start + 1 for start, end in _loops(listing)), default=0)


def spills_in_products(listing: Sequence[Instruction]) -> int:
    """Instructions on local memory in the innermost loops that have tensor-core instructions."""
    loops = _loops(listing)
    innermost = [
        listing[start : end + 1]
        for start, end in loops
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in loops)
    ]
    return sum(
        instruction.name.startswith(("LDL", "STL"))
        for loop in innermost
        if any(re.match(TENSOR, instruction.name) for instruction in loop)
        for instruction in loop
    )


def _loops(listing: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Numbers of the first and the last instruction of every loop."""
    addresses = [instruction.address for instruction in listing]
    return [
        (bisect_left(addresses, instruction.target), number)
        for number, instruction in enumerate(listing)
        if instruction.target is not None and addresses[0] <= instruction.target < instruction.address
    ]


def disassemble(codes: Sequence[bytes], architecture: int) -> list[list[Instruction]]:
    """The instructions of each code: one run of nvdisasm, whose start takes longer than its work."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    # Triton compiles for the variant of an architecture that has all its instructions.
    binary = f"SM{architecture}a" if architecture >= 90 else f"SM{architecture}"
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        listing = subprocess.run([program, "-b", binary, file.name], capture_output=True, text=True, check=True).stdout
    ends = list(accumulate(map(len, codes)))
    found: list[list[Instruction]] = [[] for _ in codes]
    line = r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;\n]*)"
    for address, name, operands in re.findall(line, listing, re.MULTILINE):
        target = re.search(r"0x[0-9a-f]+", operands) if name.partition(".")[0] == "BRA" else None
        instruction = Instruction(int(address, 16), name, int(target.group(), 16) if target else None)
        found[bisect_right(ends, instruction.address)].append(instruction)
    return found


def _count(instructions: Counter[str], pattern: str) -> int:
    return sum(number for name, number in instructions.items() if re.match(pattern, name))


def _dots(text: str) -> tuple[str, ...]:
    """Kinds of products in Triton's first intermediate representation."""
    kinds = set()
    for line in text.splitlines():
        if "= tt.dot_scaled " in line:
            kinds.add("scaled")
        elif "= tt.dot " in line:
            kind = re.findall(r"tensor<(?:\d+x)+(\w+)", line)[0]
            precision = re.search(r"inputPrecision = (\w+)", line)
            fp32 = precision.group(1) if precision else "ieee"
            kinds.add(fp32 if kind == "f32" else {"f16": "fp16", "f64": "ieee"}.get(kind, kind))
    return tuple(sorted(kinds))
