"""On a machine that has torch, triton and numpy only, operators are measured and nothing else is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MISSING = [
    "open_clip",
    "deepspeed",
    "jsonargparse",
    "yaml",
    "tqdm",
    "sklearn",
    "scipy",
    "PIL",
    "safetensors",
    "pydicom",
]


def test_operators_need_torch_only() -> None:
    hidden = f"import sys; sys.modules.update(dict.fromkeys({MISSING}))"
    code = f"{hidden}\nfrom benchmarks.run import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--list", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {line.split("/")[0] for line in done.stdout.split() if "/" in line} == {"operators"}
    for name in ("steps", "loaders"):
        assert f"{name}: left out, " in done.stderr
