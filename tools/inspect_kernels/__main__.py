"""Command line: python -m tools.inspect_kernels."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from pspg import kernels
from pspg.engine.utils.errors import UserError
from pspg.engine.utils.files import check_output, write_text
from pspg.kernels.cases import Case
from pspg.kernels.launch import Launch, record

from . import __doc__ as purpose
from .checks import SHARED_LIMITS, Row, display_name, estimate, launch_name, violations
from .compiling import Unit, compile_all, specialise
from .report import document, variants

MODELLED = 90
"""architecture that the model of time is for"""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(cases: Sequence[Case] | None = None) -> int:
    """Inspect the kernels of `cases`, by default of every `kernels/<op>/cases.py`.

    Returns:
        The exit status: 1 for violations with --check, and where a kernel does not compile; 2 for wrong use.
    """
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

    start = time.perf_counter()
    units: dict[tuple[str, str, Unit], int] = {}  # of a case and dtype → launches
    may_spill: set[str] = set()
    modelled: list[tuple[Case, str, list[Launch], list[Unit]]] = []
    for case in all_cases() if cases is None else cases:
        may_spill |= {case.name} if case.may_spill else set()
        for dtype in arguments.dtype or case.dtypes:
            for architecture in arguments.arch:
                launches = _launches(case, dtype, architecture, arguments.kernel)
                own = [specialise(launch, architecture) for launch in launches]
                for unit in own:
                    key = case.name, dtype, unit
                    units[key] = units.get(key, 0) + 1
                if architecture == MODELLED:
                    modelled.append((case, dtype, launches, own))
    if not units:
        print(f"inspect_kernels: no kernel or case has {arguments.kernel!r} in its name", file=sys.stderr)
        return 2

    compiled = compile_all(list(dict.fromkeys(unit for _, _, unit in units)), arguments.jobs)
    estimates = [
        part
        for case, dtype, launches, own in modelled
        for part in estimate(case, dtype, launches, [compiled[unit] for unit in own])
    ]
    texts = variants(unit for _, _, unit in units)
    rows = [
        Row(
            case,
            display_name(unit.module, unit.kernel),
            dtype,
            unit.architecture,
            launches,
            texts[unit],
            compiled[unit],
            case in may_spill,
        )
        for (case, dtype, unit), launches in units.items()
    ]
    text = document(rows, estimates)
    print(text)
    if arguments.markdown is not None:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.markdown, text)
    seconds = sum(used.seconds for used in compiled.values())
    print(
        f"{len(compiled)} compilations, {seconds:.0f} s of work, in {time.perf_counter() - start:.0f} s",
        file=sys.stderr,
    )
    failed = False
    for row in rows:
        for line in violations(row):
            print(line, file=sys.stderr)
            failed |= arguments.check or bool(row.resources.error)
    return int(failed)


def all_cases() -> list[Case]:
    """The cases of every operator that has some, in the order of their folders."""
    folders = sorted(file.parent.name for path in kernels.__path__ for file in Path(path).glob("*/cases.py"))
    return [case for folder in folders for case in import_module(f"pspg.kernels.{folder}.cases").CASES]


def _launches(case: Case, dtype: str, architecture: int, part: str) -> list[Launch]:
    """Launches of a case whose kernel has `part` in its name, or whose case has."""
    with record(architecture) as launches:
        case.run(DTYPES[dtype])
    return [launch for launch in launches if part in case.name or part in launch_name(launch)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="inspect_kernels", description=purpose.split("\n\n")[0])
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
