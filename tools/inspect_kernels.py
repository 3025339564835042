"""Compile the Triton kernels of a training step for several GPUs, without one, and list what each compiled kernel uses.

Host code runs on meta tensors at production shapes, so what is compiled is exactly what would be launched.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from pspg.engine.models.decoders._base import DecoderSizes
from pspg.engine.models.decoders.gru import GRUDecoder
from pspg.engine.utils.errors import UserError
from pspg.engine.utils.files import check_output, write_text
from pspg.kernels.asymmetric_loss import triton as asymmetric_loss
from pspg.kernels.launch import Launch, record
from pspg.kernels.pair_loss import triton as pair_loss
from pspg.kernels.prompt_decoder import triton as prompt_decoder
from pspg.kernels.text_tower.triton import add_norm, attention, gather, quick_gelu

SHARED_LIMITS = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""architecture → bytes of shared memory that one program can have"""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

BANDWIDTH, TENSOR_RATE, LAUNCH_SECONDS = 4.8e12, 790e12, 2e-6
"""of the model: bytes/s, FLOP/s, s"""
ASSUMPTIONS = (
    "Time on one H200: a model, not measured. Every distinct tensor that a launch is given moves once, whole, at "
    "4.8 TB/s (gathers, partial reads and second reads are not seen); products run at 790 TFLOP/s (dense bf16; tf32x3, "
    "three products at half the rate, counts six-fold; `-` where the case states none); the slower of the two counts, "
    "and 2 µs for each launch."
)
REFRESH = "make inspect-kernels"


# What is inspected.


@dataclass(frozen=True)
class Case:
    """Host code that launches kernels."""

    name: str
    run: Callable[[torch.dtype], object]
    """on meta tensors of a dtype"""
    dtypes: tuple[str, ...] = ("bf16",)
    """names in DTYPES"""
    flops: Mapping[str, Callable[[Mapping[str, Any]], float]] = field(default_factory=dict)
    """kernel → FLOPs of a launch with the given arguments"""


B, C, N, D = 64, 108, 16, 1024
"""images, classes, prompt vectors, width of features"""
G, H = 2, 512
"""decoders, their hidden size"""
W, LAYERS = 512, 12
"""width and layers of the text tower"""
HEADS = 8
"""of the tower and of the decoders"""
R, FIRST = 367, 4
"""pairs of a chunk, and how many prefixes the first chunk's pairs continue"""
NAME = 8
"""tokens of the longest class name, in prefix mode"""


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _asymmetric_loss(dtype: torch.dtype) -> None:
    asymmetric_loss.run(_empty(B, 2, C, dtype=dtype), _empty(B, C), 1.0, 2.0, 0.05, 1e-6)


def _pair_loss(dtype: torch.dtype) -> None:
    labels, pairs = _empty(B, C), _empty(R, dtype=torch.int64)
    features, vectors = _empty(R, D, dtype=dtype), _empty(B, D, dtype=dtype)
    pair_loss.run(features, vectors, _empty(), labels, pairs, pairs.clone(), None, 1.0)


def _decoder(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        weights = [GRUDecoder(DecoderSizes(D, H, W, HEADS, N)).to(dtype).weights() for _ in range(G)]
    features, context = _empty(C, D, dtype=dtype), _empty(B, D, dtype=dtype)
    outputs = prompt_decoder.decode(weights, features, context, prompt_length=N, heads=HEADS)
    parameters = [parameter for part in weights for parameter in part.values()]
    torch.autograd.grad(outputs, parameters, torch.empty_like(outputs), allow_unused=True)


def _prefixes(dtype: torch.dtype) -> None:
    """The single prompts' prefixes: G·C sequences of n vectors after SOS, which is a prefix of one token."""
    rows = 1 + G * C * N
    for _ in range(LAYERS - 1):
        _attention(dtype, prefixes=1, seen=1, tails=G * C, tokens=N, by_prefix=False)
        _mlp(dtype, rows)
    for _ in range(2 * (LAYERS - 1)):
        _add_norm(dtype, rows)


def _tails(dtype: torch.dtype, prefixes: int, tails: int, tokens: int, sequences: int) -> None:
    """`sequences` of `tokens` after prefixes of SOS and n vectors; the last block is for one token each."""
    for _ in range(LAYERS - 1):
        _attention(dtype, prefixes, 1 + N, sequences, tokens, by_prefix=True)
        _mlp(dtype, sequences * tokens)
    _mlp(dtype, sequences)
    for _ in range(2 * (LAYERS - 1)):
        _add_norm(dtype, sequences * tokens)
    for _ in range(2):
        _add_norm(dtype, sequences)
    order, starts = (_empty(count, dtype=torch.int64) for count in (sequences, tails + 1))
    for width in (W, 3 * W):
        gather.run_gather_backward(_empty(sequences, tokens, width, dtype=dtype), order, starts)
    starts = _empty(prefixes + 1, dtype=torch.int64)
    gather.run_gather_backward(_empty(sequences, 1 + N, W, dtype=dtype), None, starts)


def _named_pairs(dtype: torch.dtype) -> None:
    """What prefix mode changes: names lengthen prefixes and tails, and prefixes are padded."""
    for _ in range(LAYERS - 1):
        _attention(dtype, FIRST, 1 + N + NAME, R, N + NAME + 1, by_prefix=True, padded=True)


def _attention(
    dtype: torch.dtype, prefixes: int, seen: int, tails: int, tokens: int, *, by_prefix: bool, padded: bool = False
) -> None:
    projected, prefix = _empty(tails, tokens, 3 * W, dtype=dtype), _empty(prefixes, seen, 2 * W, dtype=dtype)
    starts, lengths = (_empty(count, dtype=torch.int64) for count in (prefixes + 1, tails))
    who = (starts, lengths if padded else None)
    out, denominators = attention.run_attention(projected, prefix, *who, HEADS)
    attention.run_attention_backward(torch.empty_like(out), projected, prefix, *who, denominators, HEADS, by_prefix)


def _mlp(dtype: torch.dtype, rows: int) -> None:
    x = _empty(rows, 4 * W, dtype=dtype)
    quick_gelu.run_quick_gelu(x)
    quick_gelu.run_quick_gelu_backward(torch.empty_like(x), x)


def _add_norm(dtype: torch.dtype, rows: int) -> None:
    x, delta, weight, bias = (_empty(*shape, dtype=dtype) for shape in ((rows, W), (rows, W), (W,), (W,)))
    total, normal, statistics = add_norm.run_add_norm(x, delta, weight, bias, 1e-5)
    add_norm.run_add_norm_backward(torch.empty_like(total), torch.empty_like(normal), total, statistics, weight)


def _tower_flops(products: int) -> Callable[[Mapping[str, Any]], float]:
    def flops(a: Mapping[str, Any]) -> float:
        width, seen = a["heads"] * a["WIDTH"], a["prefix_tokens"] + a["suffix_tokens"]
        return products * 2.0 * a["qkv"].shape[0] * a["suffix_tokens"] * seen * width

    return flops


def _decoder_flops(inputs: int, outputs: int) -> Callable[[Mapping[str, Any]], float]:
    return lambda a: 2.0 * G * a["classes"] * inputs * outputs


_TOWER = {"_attention_kernel": _tower_flops(2), "_attention_backward_kernel": _tower_flops(5)}
CASES = (
    Case("asymmetric loss", _asymmetric_loss, ("fp32", "bf16")),
    Case(
        "SPCL of a chunk",
        _pair_loss,
        ("fp32", "bf16"),
        {
            kernel: lambda a: 6 * 2.0 * a["pairs"] * a["images"] * a["width"]
            for kernel in ("_pairs_kernel", "_vectors_kernel")
        },
    ),
    Case(
        "prompt decoder",
        _decoder,
        flops={
            "_gru_kernel": lambda a: 2.0 * G * C * H * (0 if a["FIRST"] else 6 * H),
            "_linear_kernel": lambda a: 2.0 * G * C * a["inputs"] * a["columns_number"],
            "_attention_kernel": lambda a: 2 * 2.0 * len(a["qkv"]) * C * C * H,
            "_images_kernel": _decoder_flops(H, HEADS * B),
            "_images_backward_kernel": _decoder_flops(H, HEADS * B),
            "_norm_backward_kernel": _decoder_flops(H, H),
            "_attention_backward_kernel": _decoder_flops(7 * C, H),
            "_gru_backward_kernel": _decoder_flops(3 * H, H),
            "_step_backward_kernel": _decoder_flops(6 * H, H),
        },
    ),
    Case("text tower: prefixes", _prefixes, flops=_TOWER),
    Case("text tower: ends of single prompts", lambda dtype: _tails(dtype, G * C, C, 1, G * C), flops=_TOWER),
    Case("text tower: pairs of a chunk", lambda dtype: _tails(dtype, FIRST, C, N + 1, R), flops=_TOWER),
    Case("text tower: pairs with class names, attention", _named_pairs, flops=_TOWER),
)


@dataclass(frozen=True)
class Unit:
    """One compilation."""

    module: str
    kernel: str
    """qualified name in the module"""
    architecture: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    attributes: tuple[tuple[int, str], ...]
    """parameter number → what is known of its value, as Triton writes it ("D": divisible by 16)"""
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses."""

    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    tensor_instructions: int = 0
    wide_loads: int = 0
    """global loads of 128 bits or more, or by TMA"""
    loads: int = 0
    """all global loads"""
    dots: tuple[str, ...] = ()
    """operand types of its products; of fp32 operands, the precision (ieee, tf32x3, …)"""
    seconds: float = 0.0
    error: str = ""
    """why there is no compiled kernel"""


@dataclass(frozen=True)
class Row:
    """A compiled kernel in a case."""

    case: str
    kernel: str
    dtype: str
    architecture: int
    launches: int
    options: str
    resources: Resources


def specialise(launch: Launch, architecture: int) -> Unit:
    """The compilation that a launch asks for: Triton's own binder says what is constant, aligned or divisible."""
    kernel = _jit_function(launch.kernel)
    backend = make_backend(GPUTarget("cuda", architecture, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, known, _ = bind(**launch.arguments)
    types = [(name, kind[0]) for name, kind in zip(bound, known, strict=True)]
    return Unit(
        kernel.fn.__module__,
        kernel.fn.__qualname__,
        architecture,
        signature=tuple(types),
        constants=tuple((name, bound[name]) for name, kind in types if kind == "constexpr"),
        attributes=tuple(
            (number, value[1]) for number, value in enumerate(known) if value[0] != "constexpr" and value[1]
        ),
        options=tuple(sorted(launch.options.items())),
    )


def compile_unit(unit: Unit) -> Resources:
    """Compile, in a process of `compile_all`."""
    start = time.perf_counter()
    log = io.StringIO()
    try:
        kernel: Any = importlib.import_module(unit.module)
        for name in unit.kernel.split("."):
            kernel = getattr(kernel, name)
        target = GPUTarget("cuda", unit.architecture, 32)
        attributes = {(number,): make_backend(target).parse_attr(known) for number, known in unit.attributes}
        source = ASTSource(_jit_function(kernel), dict(unit.signature), dict(unit.constants), attributes)
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=target, options=dict(unit.options))
        seconds = time.perf_counter() - start
        instructions = _instructions(compiled.asm["cubin"])
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Resources(seconds=time.perf_counter() - start, error=reason[:500])
    ptxas = log.getvalue()
    return Resources(
        registers=max(map(int, re.findall(r"Used (\d+) registers", ptxas))),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", ptxas))),
        shared_bytes=compiled.metadata.shared + sum(map(int, re.findall(r"(\d+) bytes smem", ptxas))),
        tensor_instructions=sum(
            count for name, count in instructions.items() if re.match(r"[A-Z]MMA\b|[A-Z]GMMA\b|UTC\w*MMA\b", name)
        ),
        wide_loads=sum(
            count for name, count in instructions.items() if re.match(r"LDG(STS)?\b.*\.(128|256)\b|UTMALDG\b", name)
        ),
        loads=sum(count for name, count in instructions.items() if re.match(r"LDG(STS)?\b|UTMALDG\b", name)),
        dots=_dots(compiled.asm["ttir"]),
        seconds=seconds,
    )


def violations(row: Row) -> list[str]:
    """What `--check` refuses: a line each."""
    used, limit = row.resources, SHARED_LIMITS[row.architecture]
    found = []
    if used.error:
        found.append(f"does not compile: {used.error}")
    if used.spill_bytes:
        found.append(f"spills {used.spill_bytes} bytes of registers")
    if used.shared_bytes > limit:
        found.append(f"shared memory of {used.shared_bytes} bytes, the limit is {limit}")
    # ieee products of fp32 are made of FFMA.
    products = [kind for kind in used.dots if kind != "ieee"]
    if products and not used.tensor_instructions:
        found.append(f"products of {', '.join(products)} without a tensor-core instruction")
    return [f"{row.kernel} ({row.case}, {row.dtype}, sm_{row.architecture}): {line}" for line in found]


def display_name(module: str, kernel: str) -> str:
    """pspg.kernels.pair_loss.fused, _pairs_kernel → pair_loss._pairs_kernel"""
    folder = module.removeprefix("pspg.kernels.").partition(".")[0]
    return f"{folder}.{kernel.rpartition('.')[2]}"


def _jit_function(kernel: Any) -> Any:
    """Without autotuners and heuristics."""
    while not hasattr(kernel, "params"):
        kernel = kernel.fn
    return kernel


def _instructions(cubin: bytes) -> Counter[str]:
    """How often each instruction stands in a compiled kernel."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([program, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE))


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


# The model of time.


@dataclass(frozen=True)
class Estimate:
    """Work of all launches of a kernel in a case, and the model's time for it."""

    case: str
    kernel: str
    dtype: str
    launches: int
    bytes: int
    flops: float | None
    seconds: float


def estimate(case: Case, dtype: str, launches: Sequence[Launch]) -> list[Estimate]:
    """By kernel, in the order of the first launch; with several kernels, their sum comes last."""
    by_kernel: dict[str, list[Launch]] = {}
    for launch in launches:
        by_kernel.setdefault(_name(launch), []).append(launch)
    found = []
    for name, group in by_kernel.items():
        count = case.flops.get(name.rpartition(".")[2])
        sizes = [_distinct_bytes(launch.arguments.values()) for launch in group]
        products = [count(launch.arguments) if count else 0.0 for launch in group]
        seconds = sum(
            max(size / BANDWIDTH, product / TENSOR_RATE) + LAUNCH_SECONDS
            for size, product in zip(sizes, products, strict=True)
        )
        flops = sum(products) if count else None
        found.append(Estimate(case.name, name, dtype, len(group), sum(sizes), flops, seconds))
    if len(found) > 1:
        stated = [part.flops for part in found if part.flops is not None]
        found.append(
            Estimate(
                case.name,
                "all",
                dtype,
                len(launches),
                sum(part.bytes for part in found),
                sum(stated) if stated else None,
                sum(part.seconds for part in found),
            )
        )
    return found


def _distinct_bytes(arguments: Iterable[Any]) -> int:
    views = {}
    for tensor in arguments:
        if isinstance(tensor, Tensor):
            key = tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
            # Along an expanded dimension there is one row.
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            views[key] = torch.Size(size for size, step in steps if step).numel() * tensor.element_size()
    return sum(views.values())


# The command.


def main() -> int:
    """Returns the exit status: 1 for violations with --check, and where a kernel does not compile; 2 for wrong use."""
    arguments = _parser().parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("inspect_kernels: unset TRITON_INTERPRET, the interpreter compiles nothing", file=sys.stderr)
        return 2
    try:
        if arguments.markdown is not None:
            check_output(arguments.markdown, folder=False)
    except UserError as error:
        print(f"inspect_kernels: {error}", file=sys.stderr)
        return 2

    units: dict[tuple[str, str, Unit], int] = {}  # of a case and dtype → launches
    estimates: list[Estimate] = []
    for case in CASES:
        for dtype in arguments.dtype or case.dtypes:
            for architecture in arguments.arch:
                launches = _launches(case, dtype, architecture, arguments.kernel)
                for launch in launches:
                    key = case.name, dtype, specialise(launch, architecture)
                    units[key] = units.get(key, 0) + 1
            estimates += estimate(case, dtype, _launches(case, dtype, 90, arguments.kernel))
    if not units:
        print(f"inspect_kernels: no kernel or case has {arguments.kernel!r} in its name", file=sys.stderr)
        return 2

    compiled = compile_all(list(dict.fromkeys(unit for _, _, unit in units)), arguments.jobs)
    variants = _variants(unit for _, _, unit in units)
    rows = [
        Row(
            case,
            display_name(unit.module, unit.kernel),
            dtype,
            unit.architecture,
            launches,
            variants[unit],
            compiled[unit],
        )
        for (case, dtype, unit), launches in units.items()
    ]
    rows.sort(key=lambda row: row.architecture)  # stable: cases stay in order
    text = document(rows, estimates)
    print(text)
    if arguments.markdown is not None:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.markdown, text)
    failed = False
    for row in rows:
        for line in violations(row):
            print(line, file=sys.stderr)
            failed |= arguments.check or bool(row.resources.error)
    return int(failed)


def compile_all(units: Sequence[Unit], jobs: int) -> dict[Unit, Resources]:
    """Compile in `jobs` processes, afresh: nothing is taken from Triton's cache or left there."""
    results: dict[Unit, Resources] = {}
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(jobs, get_context("spawn"), _set_up_compiler, (cache,)) as pool,
    ):
        futures: dict[Future[Resources], Unit] = {pool.submit(compile_unit, unit): unit for unit in units}
        for future in tqdm(as_completed(futures), "compile", total=len(units), unit="kernel", disable=None):
            error = future.exception()
            why = f"{error} (with --jobs 1 the first kernel that fails is the culprit)"
            results[futures[future]] = future.result() if error is None else Resources(error=why)
    return results


def _set_up_compiler(cache: str) -> None:
    triton.knobs.cache.dir = cache
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True


def document(rows: Sequence[Row], estimates: Sequence[Estimate]) -> str:
    """Both tables, as markdown."""
    lines = [
        "# Resources of the Triton kernels",
        "",
        f"Compiled without a GPU by triton {triton.__version__} and the ptxas it brings. Refresh with `{REFRESH}`.",
        "",
        f"Forward and backward of {B} images, {C} classes, {G} decoders, {N} prompt vectors; a chunk has {R} pairs.",
        "Launches: how many the case makes. Spills: bytes stored and loaded. 128-bit loads: global loads that wide or",
        "wider, or by TMA, of all global loads.",
        "Products of kind `ieee` are fp32 without tensor cores, on purpose.",
    ]
    for architecture in dict.fromkeys(row.architecture for row in rows):
        limit = SHARED_LIMITS[architecture]
        lines += ["", f"## sm_{architecture}", "", f"Shared memory limit: {limit // 1024} KiB a program.", ""]
        lines += _table(
            "Case|Kernel|dtype|Launches|Configuration|Registers|Spills, B|Shared, KiB|Products|Tensor-core instr.|"
            "128-bit loads|Compile, s",
            [_cells(row) for row in rows if row.architecture == architecture],
            left=(0, 1, 2, 4, 8),
        )
    lines += ["", "## Model of time, not measured", "", ASSUMPTIONS, ""]
    lines += _table(
        "Case|Kernel|dtype|Launches|MB|GFLOP|Model, µs",
        [
            [
                part.case,
                f"`{part.kernel}`" if part.kernel != "all" else "all",
                part.dtype,
                str(part.launches),
                f"{part.bytes / 1e6:.2f}",
                "-" if part.flops is None else f"{part.flops / 1e9:.2f}",
                f"{part.seconds * 1e6:.1f}",
            ]
            for part in estimates
        ],
        left=(0, 1, 2),
    )
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    used = row.resources
    start = [row.case, f"`{row.kernel}`", row.dtype, str(row.launches), row.options]
    if used.error:
        return [*start, *["-"] * 3, "does not compile", "-", "-", f"{used.seconds:.1f}"]
    return [
        *start,
        str(used.registers),
        str(used.spill_bytes),
        f"{used.shared_bytes / 1024:.1f}",
        ", ".join(used.dots) or "-",
        str(used.tensor_instructions) if used.dots else "-",
        f"{used.wide_loads} of {used.loads}",
        f"{used.seconds:.1f}",
    ]


def _table(head: str, rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """A markdown table that is also read well as text. `left`: columns of words."""
    columns = list(zip(head.split("|"), *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        sides = ("<" if number in left else ">" for number in range(len(cells)))
        return "| " + " | ".join(f"{c:{s}{w}}" for c, s, w in zip(cells, sides, widths, strict=True)) + " |"

    rule = ["-" * width if number in left else "-" * (width - 1) + ":" for number, width in enumerate(widths)]
    return [line(head.split("|")), line(rule), *map(line, rows)]


def _variants(units: Iterable[Unit]) -> dict[Unit, str]:
    """Options of each compilation, and the constants that its kernel does not have everywhere."""
    by_kernel: dict[tuple[str, str], dict[Unit, None]] = {}
    for unit in units:
        by_kernel.setdefault((unit.module, unit.kernel), {})[unit] = None
    texts = {}
    for group in by_kernel.values():
        values: dict[str, set[str]] = {}
        for unit in group:
            constants = dict(unit.constants)
            for name, kind in unit.signature:
                values.setdefault(name, set()).add(repr(constants[name]) if name in constants else kind)
        for unit in group:
            words = [f"{value} {name.removeprefix('num_')}" for name, value in unit.options]
            words += [f"{name}={value}" for name, value in unit.constants if len(values[name]) > 1]
            texts[unit] = ", ".join(words)
    return texts


def _launches(case: Case, dtype: str, architecture: int, part: str) -> list[Launch]:
    """Launches of a case whose kernel has `part` in its name, or whose case has."""
    with record(architecture) as launches:
        case.run(DTYPES[dtype])
    return [launch for launch in launches if part in case.name or part in _name(launch)]


def _name(launch: Launch) -> str:
    function = _jit_function(launch.kernel).fn
    return display_name(function.__module__, function.__qualname__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="inspect_kernels", description=__doc__)
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        choices=SHARED_LIMITS,
        default=list(SHARED_LIMITS),
        help="architectures to compile for, 90 is sm_90 (default: all)",
    )
    parser.add_argument("--kernel", default="", metavar="SUBSTRING", help="only kernels or cases with this in the name")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="dtypes to run every case in (default: those of production)"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1, and a line for each, where a kernel spills registers, needs more shared memory than there "
        "is, or has bf16, fp16 or tf32 products without tensor-core instructions",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to this file")
    parser.add_argument(
        "--jobs", type=int, choices=range(1, 65), metavar="N", default=2, help="compilers at a time (default: 2)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
