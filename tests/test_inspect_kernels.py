"""Compiling kernels without a GPU: a real one, some made for the purpose, and what --check refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

TOY = """
    import torch
    import triton
    import triton.language as tl

    from pspg.kernels.cases import Case
    from pspg.kernels.launch import launch
    from tools.inspect_kernels.__main__ import main

    @triton.jit
    def product(a, b, c, rows, one, flag, bias, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        at = i[:, None] * BLOCK + i[None, :]
        x, y = tl.load(a + at, mask=i[:, None] < rows, other=0), tl.load(b + at)
        z = tl.dot(x, y, input_precision=PRECISION) * one
        if bias is not None:
            z += tl.load(bias + i)[None, :]
        tl.store(c + at, z)

    @triton.jit
    def wrong(a):
        tl.store(a, tl.undefined)

    def run(dtype, block=32, times=3, warps=4):
        a, c = (torch.empty(block + 1, block, dtype=kind, device="meta") for kind in (dtype, torch.float32))
        for _ in range(times):
            arguments = (a[1:], a[1:], c, 30, 1, True, None)
            launch(product, (1,), *arguments, PRECISION="ieee", BLOCK=block, num_warps=warps)

    CASES = {
        "good": Case("good", run, ("bf16", "fp32"), {"product": lambda arguments: 1e9 * arguments["one"]}),
        "spill": Case("spill", lambda dtype: run(dtype, 128, 1, 1)),
        "wrong": Case("wrong", lambda dtype: launch(wrong, (1,), torch.empty(1, device="meta"))),
    }
"""


def python(*command: object, path: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run python in the repository, with Triton's compiler unless `environment` says otherwise."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), str(ROOT), inherited.get("PYTHONPATH")]))
    command = (sys.executable, *map(str, command))
    return subprocess.run(command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True)


def cells(text: str, *wanted: str) -> list[list[str]]:
    """Rows of the tables that have all of these cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if set(wanted) <= set(row)]


@pytest.fixture
def toy(tmp_path: Path) -> Any:
    """Function (case, arguments) → the tool's run on kernels made for the purpose."""
    (tmp_path / "toy.py").write_text(dedent(TOY))

    def run(case: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        # Workers are started afresh from the main module, which must not run again there.
        (tmp_path / "run.py").write_text(
            f"import sys, toy\nif __name__ == '__main__':\n    sys.exit(toy.main([toy.CASES[{case!r}]]))\n"
        )
        return python(tmp_path / "run.py", "--arch", 90, "--jobs", 1, *arguments, path=tmp_path)

    return run


@pytest.mark.slow
def test_a_kernel_of_the_package(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    done = python(
        "-m", "tools.inspect_kernels", "--arch", 90, "--kernel", "asymmetric_loss", "--check", "--markdown", table
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == table.read_text() + "\n"
    resources, model = cells(done.stdout, "`asymmetric_loss._kernel`", "fp32")
    registers, _, loads = resources[-1].split(" · ")
    assert 16 <= int(registers) <= 255
    assert re.fullmatch(r"\d+/[1-9]\d*", loads)
    assert float(model[-2]) >= 2
    assert "model, not measured" in done.stdout
    assert "make inspect-kernels" in done.stdout


@pytest.mark.slow
def test_equal_launches_are_one_compilation(toy: Any) -> None:
    done = toy("good", "--check")
    assert done.returncode == 0, done.stderr
    (bf16, bf16_model), (fp32, _) = (cells(done.stdout, "`toy.product`", dtype) for dtype in ("bf16", "fp32"))
    assert bf16[3:5] == ["bf16", "3"]
    assert int(bf16[5].split(" · ")[2]) > 0
    # Products of fp32 without tensor cores are in the table, and no violation.
    assert fp32[3:5] == ["ieee", "3"]
    assert fp32[5].split(" · ")[2] == "0"
    # Three launches of 32·32·(2 + 4) bytes (a and b are one tensor), and three of 1 GFLOP.
    assert bf16_model[3:6] == ["3", "0.02", "3.00"]
    assert bf16_model[8:] == [f"{3 * (1e9 / 790e12 + 2e-6) * 1e6:.1f}", "products"]


@pytest.mark.slow
def test_a_kernel_that_spills_fails_the_check(toy: Any) -> None:
    done = toy("spill", "--check")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "spills" in line]
    assert line.startswith("toy.product (spill, bf16, sm_90): spills ")
    assert re.search(r" · [1-9]\d* B spilled$", cells(done.stdout, "`toy.product`")[0][5])


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_is_named(toy: Any) -> None:
    done = toy("wrong")
    assert done.returncode == 1
    assert "toy.wrong (wrong, bf16, sm_90): does not compile: " in done.stderr
    assert "does not compile" in cells(done.stdout, "`toy.wrong`")[0]


def test_signatures_are_those_of_a_launch(toy: Any, tmp_path: Path) -> None:
    code = """
        import torch
        from toy import product
        from pspg.kernels.launch import Launch
        from tools.inspect_kernels.compiling import specialise
        x = torch.empty(64, dtype=torch.bfloat16, device="meta")
        arguments = [x, x[1:], x.long(), 48, 1, 2**40, None, "ieee", 32]
        launch = Launch(product, (1,), dict(zip(product.arg_names, arguments)), {"num_warps": 8})
        unit = specialise(launch, 90)
        kinds = ["*bf16", "*bf16", "*i64", "i32", "constexpr", "i64"] + 3 * ["constexpr"]
        assert [kind for _, kind in unit.signature] == kinds
        assert dict(unit.constants) == {(4,): 1, (6,): None, (7,): "ieee", (8,): 32}
        assert unit.attributes == (((0,), "D"), ((2,), "D"), ((3,), "D"), ((5,), "D"))
        assert unit.options == (("num_warps", 8),)
    """
    done = python("-c", dedent(code), path=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_instructions_are_those_of_the_vendors_listing(tmp_path: Path) -> None:
    """Code that is cut out of several compiled kernels and disassembled at once, against cuobjdump of each."""
    (tmp_path / "toy.py").write_text(dedent(TOY))
    (tmp_path / "both.py").write_text(
        dedent("""
        import re, subprocess
        from collections import Counter
        from pathlib import Path
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from toy import product
        from tools.inspect_kernels.compiling import disassemble, machine_code
        program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        file = Path(__file__).with_suffix(".cubin")
        types = dict.fromkeys(product.arg_names, "constexpr") | dict(a="*bf16", b="*bf16", c="*fp32", rows="i32")
        for architecture in (80, 90, 100):
            cubins, listed = [], []
            for block in (16, 32):
                constants = dict(one=1, flag=True, bias=None, PRECISION="ieee", BLOCK=block)
                source = ASTSource(product, types, constants)
                cubins.append(triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["cubin"])
                file.write_bytes(cubins[-1])
                text = subprocess.run([program, "-sass", file], capture_output=True, text=True).stdout
                names = re.findall(r"^ +/[*][0-9a-f]+[*]/ +(?:@!?[A-Z0-9]+ +)?([A-Z][A-Z0-9.]*)", text, re.MULTILINE)
                listed.append(sum(Counter(names).values()))
            found = disassemble([machine_code(cubin) for cubin in cubins], architecture)
            assert [len(one) for one in found] == listed and min(listed) > 50, (found, listed)
            assert all(any("MMA" in name for _, name, _ in one) for one in found)
    """)
    )
    done = python(tmp_path / "both.py", path=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_loop_is_bound_by_what_its_warps_issue() -> None:
    from pspg.kernels.cases import Case, empty
    from pspg.kernels.launch import Launch
    from tools.inspect_kernels.checks import estimate
    from tools.inspect_kernels.compiling import Instruction, Resources, longest_loop

    def kernel() -> None: ...

    listing = [(0, "MOV", None), (16, "FADD", None), (32, "BRA", 16), (48, "BRA", 80), (64, "BRA", 0), (80, "BRA", 80)]
    assert longest_loop([Instruction(*line) for line in listing]) == 5
    jit = SimpleNamespace(fn=kernel, params=())
    launch = Launch(jit, (10, 2), {"x": empty(4)}, {"num_warps": 8})
    case = Case("toy", lambda dtype: None, trips={"kernel": lambda arguments: 1000})
    (part,) = estimate(case, "bf16", [launch], [Resources(instructions=150, loop=100)])
    # 20 programs of 8 warps run through 50 instructions, 1,000 turns of them through 100.
    issued = 8 * (20 * 50 + 1000 * 100)
    assert (part.instructions, part.bound) == (issued, "issue")
    assert part.seconds == pytest.approx(issued / (132 * 2 * 1.83e9) + 2e-6)


def test_spills_count_where_products_are() -> None:
    from tools.inspect_kernels.compiling import Instruction, spills_in_products

    inner = [(16, "HMMA.16816", None), (32, "LDL", None), (48, "BRA", 16)]
    outside = [(0, "STL", None), *inner[::2], (64, "LDL.64", None), (80, "BRA", 0)]
    plain = [(96, "LDL", None), (112, "BRA", 96)]  # a loop without products
    assert spills_in_products([Instruction(*line) for line in [*outside, *plain]]) == 0
    assert spills_in_products([Instruction(*line) for line in [outside[0], *inner, *outside[3:], *plain]]) == 1


def test_what_the_check_refuses() -> None:
    from tools.inspect_kernels.checks import Row, violations
    from tools.inspect_kernels.compiling import Resources

    def check(architecture: int = 90, **used: Any) -> list[str]:
        return violations(Row("case", "kernel", "bf16", architecture, 1, "", Resources(**used)))

    assert check(registers=255, shared_bytes=227 * 1024, dots=("bf16",), tensor_instructions=1) == []
    assert check(dots=("ieee",)) == check() == []
    assert check(spill_bytes=8) == ["kernel (case, bf16, sm_90): spills 8 bytes of registers"]
    for within, lines in ((0, 0), (1, 1)):
        used = Resources(spill_bytes=8, spills_in_products=within)
        assert len(violations(Row("case", "kernel", "bf16", 90, 1, "", used, may_spill=True))) == lines
    for architecture, limit in {80: 163, 86: 99, 90: 227, 100: 227}.items():
        assert check(architecture, shared_bytes=limit * 1024) == []
        (line,) = check(architecture, shared_bytes=limit * 1024 + 1)
        assert f"sm_{architecture}): shared memory of {limit * 1024 + 1} bytes" in line
    for kind in ("bf16", "fp16", "tf32x3"):
        (line,) = check(dots=("ieee", kind))
        assert f"products of {kind} without a tensor-core instruction" in line
    assert len(check(spill_bytes=8, shared_bytes=2**20, dots=("bf16",))) == 3
    assert "does not compile: why" in check(error="why")[0]


def test_every_operator_with_kernels_has_cases() -> None:
    folders = {path.parent for path in (ROOT / "kernels").glob("*/triton*")}
    assert len(folders) >= 4
    assert [folder.name for folder in folders if not (folder / "cases.py").exists()] == []


def test_the_interpreter_is_refused_in_one_line() -> None:
    done = python("-m", "tools.inspect_kernels", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "inspect_kernels: unset TRITON_INTERPRET, the interpreter compiles nothing\n"
