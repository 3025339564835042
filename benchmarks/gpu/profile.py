"""`python -m benchmarks.gpu.profile CLASSES BATCH OUT [CALIBRATION]`: a step by kernel, beside the model."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pspg.engine.utils.files import write_text

from ..model.assumptions import load_assumptions
from ..model.price import price_step
from ..model.trace import trace_step
from ..setup import make_setup
from ..steps import whole_step

STEPS = 3
KINDS = {
    "torch's attention": r"flash|fmha|attention|sdpa",
    "convolutions": r"conv|cudnn|fprop|dgrad|wgrad",
    "products": r"gemm|nvjet|cutlass|xmma|splitk",
    "fills": r"memset|fill",
    "optimizer": r"multi_tensor|adam|sgd",
}
"""kind of the model → names of libraries' kernels, tried in this order"""


def main(classes: str, batch: str, output: str, calibration: str = "") -> None:
    """Profile replays of the triton step; on a CPU the eager one, to try the code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    impl, dtype = ("triton", torch.bfloat16) if device.type == "cuda" else ("eager", torch.float32)
    step = whole_step(make_setup(int(classes), int(batch), device, impl, dtype), impl, dtype)
    step.warm_up()
    step.whole()
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as recorded:
        for _ in range(STEPS):
            step.whole()
        if device.type == "cuda":
            torch.cuda.synchronize()
    kernels = [_kernel(event, device) for event in recorded.key_averages()]
    kernels = sorted((row for row in kernels if row["us"] > 0), key=lambda row: -row["us"])
    gpu = "h100" if device.type == "cuda" and "H100" in torch.cuda.get_device_name() else "h200"
    table = load_assumptions(gpu, Path(calibration) if calibration else None)
    _, kinds = price_step(trace_step(int(classes), int(batch)), table)
    model = {name: {"us": 1e6 * total.seconds, "launches": total.launches} for name, total in kinds.items()}
    found = {"classes": int(classes), "batch": int(batch), "gpu": gpu, "kinds": compare(kernels, model)}
    write_text(Path(output), json.dumps({**found, "kernels": kernels}, indent=1) + "\n")


def compare(kernels: list[dict[str, Any]], model: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """A row a kind: measured and modelled µs and launches a step, the longest first."""
    measured: dict[str, dict[str, float]] = {}
    for row in kernels:
        total = measured.setdefault(kind_of(row["name"], model), {"us": 0.0, "launches": 0.0})
        total["us"] += row["us"]
        total["launches"] += row["launches"]
    rows = []
    for name in {**measured, **model}:
        here, there = measured.get(name, {}), model.get(name, {})
        rows.append(
            {
                "kind": name,
                "us": here.get("us"),
                "launches": here.get("launches"),
                "model_us": there.get("us"),
                "model_launches": there.get("launches"),
            }
        )
    return sorted(rows, key=lambda row: -max(row["us"] or 0, row["model_us"] or 0))


def kind_of(kernel: str, model: Mapping[str, Any]) -> str:
    """Kind of a kernel: the project's own by its name, those of libraries by `KINDS`, others are passes."""
    own = kernel.strip("_").removesuffix("_kernel")
    if own in model:
        return own
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE)), "passes")


def _kernel(event: Any, device: torch.device) -> dict[str, Any]:
    us = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
    return {"name": event.key, "us": us / STEPS, "launches": event.count / STEPS}


if __name__ == "__main__":
    main(*sys.argv[1:])
