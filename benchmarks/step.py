"""`python -m benchmarks.step`: time and memory of one full phase-2 step of the full-size RN50 model.

Image tower, prompt decoders, text tower, losses, backward and optimizer, n = 16, random weights; fp32 on a CPU, bf16
towers on a GPU. Every form runs in a fresh process of its own; several forms take turns, step by step, so that they see
the same machine.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pspg.engine.utils.errors import UserError
from pspg.engine.utils.files import check_output, write_text

from .machine import commit, describe_machine, peak_bytes, peak_flops, timed, versions
from .training_step import IMPLS, exact_flops, make_setup, make_step


def main() -> int:
    """Measure, print a table, write JSON; returns the exit status."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.step: error: --device cuda: torch sees no GPU", file=sys.stderr)
        return 2
    if device.type == "cpu" and "triton" in arguments.impl:
        print("benchmarks.step: error: --impl triton: kernels need --device cuda", file=sys.stderr)
        return 2
    if arguments.json:
        try:
            check_output(arguments.json, folder=False)
        except UserError as error:
            print(f"benchmarks.step: error: --json: {error}", file=sys.stderr)
            return 2
    processes = {impl: _start(impl, arguments) for impl in arguments.impl}
    times: dict[str, list[float]] = {impl: [] for impl in processes}
    peaks: dict[str, int] = {}
    bar = tqdm(total=len(processes) * (1 + arguments.repeat), desc="steps", disable=None, leave=False)
    failed = {}
    for turn in range(1 + arguments.repeat):
        for impl, (process, pipe) in processes.items():
            if impl in failed:
                continue
            try:
                pipe.send(True)
                answer = pipe.recv()
            except (EOFError, BrokenPipeError):
                process.join()
                answer = f"its process ended with status {process.exitcode}"
            if isinstance(answer, str):
                failed[impl] = answer
                continue
            seconds, peaks[impl] = answer
            if turn:  # the first is the warm-up
                times[impl].append(seconds)
            bar.update()
    bar.close()
    for process, pipe in processes.values():
        pipe.close()
        process.join()
    peak = peak_flops(device, _dtype(device))
    flops = exact_flops(arguments.classes, arguments.batch)
    results = [
        _result(impl, arguments, times[impl], peaks[impl], flops, peak, device)
        for impl in processes
        if impl not in failed
    ]
    _print_table(results, peak)
    for impl, reason in failed.items():
        print(f"benchmarks.step: error: --impl {impl}: {reason}", file=sys.stderr)
    if arguments.json and results:
        found = results[0] if len(arguments.impl) == 1 else results
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(arguments.json), json.dumps(found, indent=2) + "\n")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--classes", type=_positive, default=14, metavar="C", help="classes (default 14)")
    parser.add_argument("--batch", type=_positive, default=16, metavar="B", help="images a batch (default 16)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--impl", choices=IMPLS, nargs="+", default=["eager"], help="forms to run (default eager)")
    parser.add_argument("--repeat", type=_positive, default=5, help="timed steps after one warm-up (default 5)")
    parser.add_argument("--memory", type=_positive, metavar="MIB", help="MiB of text activations to hold (eager)")
    parser.add_argument("--json", metavar="OUT", help="write the result, or a list of one result a form")
    arguments = parser.parse_args()
    arguments.impl = list(dict.fromkeys(arguments.impl))
    return arguments


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _start(impl: str, arguments: argparse.Namespace) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, impl, arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _work(pipe: Connection, impl: str, arguments: argparse.Namespace) -> None:
    """A process of one form: a step for every message, answered with its seconds and the peak memory so far."""
    device = torch.device(arguments.device)
    dtype = _dtype(device)
    setup = make_setup(arguments.classes, arguments.batch, device, impl, dtype)
    if arguments.memory:
        setup.head.text_memory = arguments.memory * 2**20
    step = make_step(setup, impl, device, dtype)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((timed(step, device), peak_bytes(device)))
        except RuntimeError as error:  # torch's out-of-memory errors are of this kind, too
            pipe.send((str(error).splitlines() or ["failed"])[0])
            return


def _result(
    impl: str,
    arguments: argparse.Namespace,
    times: list[float],
    peak: int,
    flops: int,
    rate: float,
    device: torch.device,
) -> dict[str, Any]:
    p20, p50, p80 = (float(value) for value in np.percentile(times, [20, 50, 80]))
    return {
        "impl": impl,
        "classes": arguments.classes,
        "batch": arguments.batch,
        "device": arguments.device,
        "repeat": len(times),
        "p20": p20,
        "p50": p50,
        "p80": p80,
        "peak_bytes": peak,
        "flops": flops,
        "utilisation": flops / (p50 * rate),
        "peak_flops": rate,
        "machine": describe_machine(device),
        "versions": versions(),
        "commit": commit(),
    }


def _print_table(results: list[dict[str, Any]], peak: float) -> None:
    if not results:
        return
    one = results[0]
    print(
        f"phase-2 step, RN50, C={one['classes']}, B={one['batch']}, {one['device']}: {one['flops'] / 1e12:.2f} TFLOP "
        f"in the exact algebra; matrix products reach {peak / 1e9:.0f} GFLOP/s here"
    )
    print(f"{'':<12}{'p20':>9}{'p50':>9}{'p80':>9}  {'peak':>9}  utilisation  against {one['impl']}")
    for row in results:
        print(
            f"{row['impl']:<12}{row['p20']:>8.2f}s{row['p50']:>8.2f}s{row['p80']:>8.2f}s"
            f"  {row['peak_bytes'] / 2**30:>5.2f} GiB  {row['utilisation']:>11.0%}  {one['p50'] / row['p50']:>.1f}×"
        )


if __name__ == "__main__":
    sys.exit(main())
