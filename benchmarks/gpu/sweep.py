"""`python -m benchmarks.gpu.sweep OPERATOR SHAPE SECONDS OUT`: other configurations of an operator's kernels.

Each is tried in the operator as it is measured, forward and backward, behind the gate; what is faster by 2 % is kept
while the next values are tried. What was tried is kept beside OUT and not tried again, also what ended the process.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pspg.engine.utils.errors import first_line
from pspg.engine.utils.files import write_text
from pspg.kernels.launch import configuration, replaced

from ..harness import Sizes
from ..machine import DTYPES
from ..operator_case import OperatorCase
from ..operators import OPERATORS

CHOICES = {"num_warps": (2, 4, 8), "num_stages": (1, 2, 3, 4), "DESCRIPTORS": (0, 1), "PROGRAMS": (1, 2, 3)}
"""values of what is no block"""
SMALLEST, LARGEST = 16, 4096
"""numbers of a block: what the tensor cores take, and a row of a pass"""
GAIN = 0.98
"""share of the time so far that a configuration may take at most to be kept"""
REPEATS = 9
Configuration = dict[str, int]


def other_values(name: str, value: int) -> list[int]:
    """Values to try in place of a pinned one: all choices, or half a block and two."""
    if name in CHOICES:
        return [choice for choice in CHOICES[name] if choice != value]
    if not name.startswith(("BLOCK", "ROWS")):
        return []
    return [block for block in (value // 2, 2 * value) if SMALLEST <= block <= LARGEST]


class Sweep:
    """Descends over the values of one kernel's configuration after the other.

    Args:
        operator, shape: of `OPERATORS`, and its letters.
        device: where it runs; on a CPU in Triton's interpreter, whose times mean nothing.
        output: file of the result; the tried configurations lie beside it.
    """

    def __init__(self, operator: str, shape: Mapping[str, int], device: torch.device, output: Path) -> None:
        sizes = Sizes({**OPERATORS[operator].letters, **shape})
        dtype = "bf16" if device.type == "cuda" else "fp32"
        self.case = OperatorCase(OPERATORS[operator], sizes, DTYPES[dtype], device)
        self.device, self.output = device, output
        self._tried_file = output.with_suffix(".tried.json")
        self.tried: dict[str, dict[str, Any]] = {}
        if self._tried_file.is_file():
            self.tried = json.loads(self._tried_file.read_text())
        self.case.prepare("reference")(0)

    def run(self, seconds: float) -> None:
        """Try what there is for at most so long; the result is complete after each one."""
        end = time.monotonic() + seconds
        with replaced() as asked:
            first = self._measured()
        if first["us"] is None:
            raise SystemExit(f"as pinned: {first['error']}")
        kernels = {name: configuration(name, self.device) for name in sorted(asked)}
        best: dict[str, Configuration] = {}
        rows: list[dict[str, Any]] = []
        now, stopped = first["us"], False
        for name, pinned in kernels.items():
            row = {"kernel": name, "pinned": pinned, "best": pinned, "before": now, "us": now, "tried": 0, "refused": 0}
            rows.append(row)
            for values in self._steps(row):
                stopped = stopped or time.monotonic() > end
                key = f"{name} {json.dumps(values, sort_keys=True)} in {json.dumps(best, sort_keys=True)}"
                if key not in self.tried and stopped:
                    row["left"] = True
                    continue
                found = self._try(key, {**best, name: values})
                row["tried"] += 1
                row["refused"] += found["us"] is None
                if found["us"] is not None and found["us"] < GAIN * row["us"]:
                    row["us"], row["best"] = found["us"], values
                self._write(rows)
            now = row["us"]
            if row["best"] != pinned:
                best[name] = row["best"]
        self._write(rows)

    def _steps(self, row: Mapping[str, Any]) -> Iterator[Configuration]:
        """Each other value in the best configuration so far."""
        for name, value in row["pinned"].items():
            for other in other_values(name, value):
                yield {**row["best"], name: other}

    def _try(self, key: str, configurations: Mapping[str, Configuration]) -> dict[str, Any]:
        if key not in self.tried:
            self.tried[key] = {"us": None, "error": "ended the process"}
            self._keep()
            with replaced(**configurations):
                self.tried[key] = self._measured()
            self._keep()
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # what a bad access leaves behind ends the process here
        return self.tried[key]

    def _measured(self) -> dict[str, Any]:
        """Microseconds of forward and backward behind the gate; None and why, where there are none."""
        try:
            call = self.case.start("triton")
            call(0)
            verdict = self.case.verdicts(["reference", "triton"])["triton"]
            if not verdict.error <= 1:
                return {"us": None, "error": f"wrong: error is {verdict.error:.3g} times what is allowed"}
            return {"us": 1e6 * statistics.median(call(turn)["both"] for turn in range(1, 1 + REPEATS))}
        except Exception as error:  # whatever a compiler or a launch raises: this one cannot run
            return {"us": None, "error": f"{type(error).__name__}: {first_line(error)}"[:200]}

    def _keep(self) -> None:
        write_text(self._tried_file, json.dumps(self.tried, indent=1) + "\n")

    def _write(self, rows: list[dict[str, Any]]) -> None:
        left = sum(bool(row.get("left")) for row in rows)
        write_text(self.output, json.dumps({"sweep": rows, "left": left}, indent=1) + "\n")


def main(operator: str, shape: str, seconds: str, output: str) -> None:
    """Sweep one operator; without a GPU in Triton's interpreter, to try the code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("benchmarks.gpu.sweep: error: torch sees no GPU; TRITON_INTERPRET=1 tries the code on a CPU")
    sizes = {letter: int(size) for letter, size in (part.split("=") for part in shape.split(","))}
    Sweep(operator, sizes, device, Path(output)).run(float(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
