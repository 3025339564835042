"""Tests run where a rented GPU has torch, triton, numpy and pytest, and nothing else."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_pytest(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Status and output of pytest, for the tests in a folder, in the bare environment."""
    environment = {key: value for key, value in os.environ.items() if "XDIST" not in key} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-p", "tests.bare_environment", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_gpu_tests_are_collected_or_say_what_they_need() -> None:
    done = run_pytest("-m", "gpu", "-v", "-rs")
    assert done.returncode == 0, done.stdout[-3000:]
    functions = ast.parse((ROOT / "tests" / "kernels" / "test_on_gpu.py").read_text()).body
    for function in functions:
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
            assert f"test_on_gpu.py::{function.name}" in done.stdout
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", done.stdout, re.MULTILINE)
    assert "needs open_clip" in reasons or "needs jsonargparse" in reasons
    assert all(re.match(r"needs \w+|\S+ needs \w+|could not import '[\w.]+'", reason) for reason in reasons)


@pytest.mark.slow
def test_kernels_run() -> None:
    """Compiled, or in the interpreter, from the checkout."""
    done = run_pytest("-q", "tests/kernels/test_losses_triton.py", "-k", "proper_operators")
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"^1 passed", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize("complete", [False, True])
def test_only_a_known_package_may_be_missing(tmp_path: Path, complete: bool) -> None:
    """Skipped with the reason; an error with --complete, as in `make test`. Any other missing module is always one."""
    folder = tmp_path / "tests"
    folder.mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", folder)
    (folder / "test_file.py").write_text("import scipy.stats\n\ndef test_a(): pass\n")
    (folder / "test_body.py").write_text("def test_b(): import scipy\n\ndef test_c(): import no_such_module\n")
    done = run_pytest("-rs", "--continue-on-collection-errors", *(["--complete"] if complete else []), cwd=folder)
    last = done.stdout.splitlines()[-1]
    if complete:
        assert "2 failed, 1 error in" in last
    else:
        assert "1 failed, 2 skipped in" in last
        assert "needs scipy" in done.stdout
        assert "test_b needs scipy" in done.stdout
