"""Tables of compiled kernels and of the model of time, as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import triton

from pspg.kernels.cases import PAIRS, B, C, G, N

from .checks import ASSUMPTIONS, SHARED_LIMITS, Estimate, Row
from .compiling import Resources, Unit

REFRESH = "make inspect-kernels"


def document(rows: Sequence[Row], estimates: Sequence[Estimate]) -> str:
    """Both tables of every case."""
    architectures = sorted({row.architecture for row in rows})
    limits = ", ".join(f"{SHARED_LIMITS[a] // 1024} KiB on sm_{a}" for a in architectures)
    lines = [
        "# Resources of the Triton kernels",
        "",
        f"Compiled without a GPU by triton {triton.__version__} and the ptxas it brings. Refresh with `{REFRESH}`.",
        f"Forward and backward of {B} images, {C} classes, {G} decoders, {N} prompt vectors; {PAIRS} pairs a chunk.",
        "",
        "A cell is what a kernel uses on an architecture: registers a thread · KiB of shared memory a program ·",
        "tensor-core instructions, where it has products · global loads of 128 bits or wider, or by TMA / all global",
        "loads · bytes of spilled registers, where there are any. `-`: the architecture runs another configuration,",
        "in a line of its own. Launches: how many the case makes. Products of kind `ieee` are fp32 without tensor",
        "cores, on purpose.",
        "",
        f"Shared memory that a program can have: {limits}.",
    ]
    for case in dict.fromkeys(row.case for row in rows):
        lines += ["", f"## {case[:1].upper()}{case[1:]}", ""]
        lines += _resources([row for row in rows if row.case == case], architectures)
    lines += ["", "## Model of time, not measured", "", ASSUMPTIONS, ""]
    lines += _table(
        "Case|Kernel|dtype|Launches|MB|GFLOP|Loop|M instructions|Model, µs|Bound by",
        [
            [
                part.case,
                f"`{part.kernel}`" if part.kernel != "all" else "all",
                part.dtype,
                str(part.launches),
                f"{part.bytes / 1e6:.2f}",
                "-" if part.flops is None else f"{part.flops / 1e9:.2f}",
                "-" if part.loop is None else str(part.loop),
                f"{part.instructions / 1e6:.2f}",
                f"{part.seconds * 1e6:.1f}",
                part.bound,
            ]
            for part in estimates
        ],
        words=3,
    )
    return "\n".join(lines) + "\n"


def _resources(rows: Sequence[Row], architectures: Sequence[int]) -> list[str]:
    """One line a kernel, dtype and configuration, one column an architecture."""
    lines: dict[tuple[str, str, str, int], dict[int, Resources]] = {}
    for row in rows:
        lines.setdefault((row.kernel, row.dtype, row.options, row.launches), {})[row.architecture] = row.resources
    return _table(
        "|".join(["Kernel", "dtype", "Configuration", "Products", "Launches", *(f"sm_{a}" for a in architectures)]),
        [
            [
                f"`{kernel}`",
                dtype,
                options,
                ", ".join(next(iter(found.values())).dots) or "-",
                str(launches),
                *(_cell(found[a]) if a in found else "-" for a in architectures),
            ]
            for (kernel, dtype, options, launches), found in lines.items()
        ],
        words=4,
    )


def _cell(used: Resources) -> str:
    if used.error:
        return "does not compile"
    parts = [str(used.registers), f"{used.shared_bytes / 1024:.1f}"]
    parts += [str(used.tensor_instructions)] * bool(used.dots) + [f"{used.wide_loads}/{used.loads}"]
    return " · ".join(parts) + (f" · {used.spill_bytes} B spilled" if used.spill_bytes else "")


def _table(head: str, rows: Sequence[Sequence[str]], words: int) -> list[str]:
    """A markdown table, its first columns of words aligned left, the others right."""
    names = head.split("|")
    rule = [":--" if number < words else "--:" for number in range(len(names))]
    return [f"| {' | '.join(cells)} |" for cells in (names, rule, *rows)]


def variants(units: Iterable[Unit]) -> dict[Unit, str]:
    """Options of each compilation, and the constants that its kernel does not have everywhere."""
    by_kernel: dict[tuple[str, str], dict[Unit, None]] = {}
    for unit in units:
        by_kernel.setdefault((unit.module, unit.kernel), {})[unit] = None
    texts = {}
    for group in by_kernel.values():
        values: dict[str, set[str]] = {}
        for unit in group:
            constants = dict(_named(unit))
            for name, kind in unit.signature:
                values.setdefault(name, set()).add(repr(constants[name]) if name in constants else repr(kind))
        for unit in group:
            words = [f"{value} {name.removeprefix('num_')}" for name, value in unit.options]
            words += [f"{name}={value}" for name, value in _named(unit) if len(values[name]) > 1]
            texts[unit] = ", ".join(words)
    return texts


def _named(unit: Unit) -> list[tuple[str, Any]]:
    """Constants that are parameters by name; those within a named tuple are left out."""
    return [(unit.signature[path[0]][0], value) for path, value in unit.constants if len(path) == 1]
