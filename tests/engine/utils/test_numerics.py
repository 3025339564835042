"""Settings that decide numbers on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from pspg.engine.utils.numerics import fix_numerics, numerics

FIXED = {
    "deterministic_algorithms": True,
    "cudnn.deterministic": True,
    "cudnn.benchmark": False,
    "cudnn.allow_tf32": False,
    "cuda.matmul.allow_tf32": False,
    "cuda.matmul.allow_bf16_reduced_precision_reduction": False,
    "cuda.matmul.allow_fp16_reduced_precision_reduction": False,
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


def test_they_are_set_for_a_gpu_and_reported() -> None:
    """In a process of its own: they are the process's."""
    code = """
import json, os, torch
from pspg.engine.utils.numerics import fix_numerics, numerics
os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True
fix_numerics(torch.device("cuda"))
print(json.dumps([numerics(), torch.utils.deterministic.fill_uninitialized_memory]))
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
fix_numerics(torch.device("cuda"))
print(json.dumps(numerics()["CUBLAS_WORKSPACE_CONFIG"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, users_own = map(json.loads, done.stdout.splitlines())
    assert first == [FIXED, False]
    assert users_own == ":16:8"


def test_a_cpu_is_left_alone() -> None:
    before = numerics()
    fix_numerics(torch.device("cpu"))
    assert numerics() == before
