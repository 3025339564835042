"""`python -m benchmarks.step`: time, CPU time and memory of one full training step of the full-size RN50 model.

Image tower, prompt decoders, text tower, losses, backward and optimizer, n = 16, random weights; fp32 on a CPU; on a
GPU bf16 towers and, as in training, a CUDA graph. Every implementation runs in a fresh process of its own; several take
turns, step by step, so that they see the same machine. Before, each passes the gate of `benchmarks.run --op
phase2_step` with a few classes and images. `--phase 1` measures contrastive fine-tuning in the same way: open_clip's
own modules (reference) against the engine's (eager), on a CPU. CPU time is that of all threads of a step; beside other
work it tells what the clock does not.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pspg.engine.utils.device import reserved_bytes
from pspg.engine.utils.errors import UserError, first_line
from pspg.engine.utils.files import check_output
from pspg.engine.utils.freed_memory import freed_memory_kept

from . import phase1
from .child import Child
from .command import command, positive, write_json
from .harness import Sizes
from .jobs import device_of, registry
from .machine import environment, peak_bytes, peak_flops, timed
from .setup import IMPLS, exact_flops, make_setup
from .steps import GradientStep, whole_step


@command("benchmarks.step")
def main() -> int:
    """Measure, print a table, write JSON; returns the exit status."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    device_of(arguments.device)
    if arguments.phase == 1 and (device.type != "cpu" or not {*arguments.impl} <= {*phase1.IMPLS}):
        raise UserError(f"--phase 1: measures {' and '.join(phase1.IMPLS)} with --device cpu")
    if arguments.phase == 1 and arguments.memory:
        raise UserError("--memory: phase 1 has no text activations to hold; leave it out")
    if device.type == "cpu" and "triton" in arguments.impl:
        raise UserError("--impl triton: kernels need --device cuda")
    if arguments.json:
        check_output(arguments.json, folder=False, key="--json")
    failed = _wrong(arguments)
    results = _measure(arguments, device, failed)
    _print_table(results)
    for impl, reason in failed.items():
        print(f"benchmarks.step: error: --impl {impl}: {reason}", file=sys.stderr)
    if arguments.json and results:
        write_json(arguments.json, results[0] if len(arguments.impl) == 1 else results)
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    add = parser.add_argument
    add("--phase", type=int, choices=(1, 2), default=2, help="training phase (default 2)")
    add("--classes", type=positive, default=14, metavar="C", help="classes of phase 2 (default 14)")
    add("--batch", type=positive, default=16, metavar="B", help="images a batch (default 16)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--impl", choices=IMPLS, nargs="+", default=["eager"], help="implementations to run (default eager)")
    add("--repeat", type=positive, default=5, help="timed steps after one warm-up (default 5)")
    add("--memory", type=positive, metavar="MIB", help="MiB of text activations to hold (eager)")
    add("--json", metavar="OUT", help="write the result, or a list of one result an implementation")
    arguments = parser.parse_args()
    arguments.impl = list(dict.fromkeys(arguments.impl))
    return arguments


def _wrong(arguments: argparse.Namespace) -> dict[str, str]:
    """Implementations that do not pass the gate, with the reason."""
    child = Child(_gate, arguments)
    try:
        found: dict[str, str] = child.ask(True)
    except EOFError:
        return dict.fromkeys(arguments.impl, f"gate: {child.close()}")
    child.close()
    return found


def _gate(pipe: Any, arguments: argparse.Namespace) -> None:
    pipe.recv()
    if arguments.phase == 1:
        pipe.send({impl: why for impl in arguments.impl if (why := phase1.wrong(impl))})
        return
    sizes = Sizes(C=min(max(arguments.classes, 2), 4), B=min(arguments.batch, 2), n=16)
    device, wrong = torch.device(device_of(arguments.device)), {}
    case = registry()[0]["phase2_step"].make(sizes, "bf16" if device.type == "cuda" else "fp32", device)
    for impl in arguments.impl:
        try:
            case.prepare(impl)(0)
        except Exception as error:  # a broken implementation must not end the others
            wrong[impl] = f"{type(error).__name__}: {first_line(error)}"
    for impl, verdict in case.verdicts([impl for impl in arguments.impl if impl not in wrong]).items():
        if not verdict.error <= 1:
            wrong[impl] = f"wrong: error is {verdict.error:.3g} times what is allowed; {verdict.detail}"
    pipe.send(wrong)


def _measure(arguments: argparse.Namespace, device: torch.device, failed: dict[str, str]) -> list[dict[str, Any]]:
    """A result an implementation; what breaks goes to `failed`."""
    children = {impl: Child(_work, impl, arguments) for impl in arguments.impl if impl not in failed}
    times: dict[str, list[float]] = {impl: [] for impl in children}
    cpu: dict[str, list[float]] = {impl: [] for impl in children}
    peaks: dict[str, list[int | None]] = {}
    for turn in tqdm(range(1 + arguments.repeat), desc="steps", disable=None, leave=False):
        for impl in [impl for impl in children if impl not in failed]:
            try:
                answer = children[impl].ask(turn == 0)
            except EOFError:
                answer = children[impl].close()
            if isinstance(answer, str):
                failed[impl] = answer
                continue
            seconds, of_cpu, *peaks[impl] = answer
            if turn:  # the first is the warm-up
                times[impl].append(seconds)
                cpu[impl].append(of_cpu)
    for child in children.values():
        child.close()
    ran = [impl for impl in children if impl not in failed]
    if not ran:
        return []
    rate = peak_flops(device, _dtype(device))
    phase, classes = arguments.phase, arguments.classes if arguments.phase == 2 else 0
    flops = exact_flops(classes, arguments.batch) if phase == 2 else phase1.flops(arguments.batch)
    facts = environment(device)
    results = []
    for impl in ran:
        p20, p50, p80 = (float(value) for value in np.percentile(times[impl], [20, 50, 80]))
        result = {
            "impl": impl,
            "phase": phase,
            "classes": classes,
            "batch": arguments.batch,
            "device": arguments.device,
        }
        result |= {"repeat": len(times[impl]), "p20": p20, "p50": p50, "p80": p80}
        result["cpu_s"] = float(np.median(cpu[impl]))
        result |= dict(zip(("peak_bytes", "reserved_bytes"), peaks[impl], strict=True))
        result |= {"flops": flops, "utilisation": flops / (p50 * rate), "peak_flops": rate}
        results.append(result | {key: facts[key] for key in ("machine", "versions", "numerics", "commit")})
    return results


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _work(pipe: Any, impl: str, arguments: argparse.Namespace) -> None:
    """A process of one implementation: a step for every message, answered with its seconds and the peak memory."""
    device = torch.device(device_of(arguments.device))
    # What the engine's commands compute in; the published code has nothing of it.
    with nullcontext() if impl == "reference" else freed_memory_kept(device):
        _answer(pipe, _step(impl, arguments, device), device)


def _answer(pipe: Any, step: GradientStep, device: torch.device) -> None:
    while True:
        try:
            warm_up = pipe.recv()
        except EOFError:
            return
        try:
            if warm_up:
                step.warm_up()
            before = time.process_time()
            seconds = timed(step.whole, device)
            pipe.send((seconds, time.process_time() - before, peak_bytes(device), reserved_bytes(device)))
        except RuntimeError as error:  # torch's out-of-memory errors are of this kind, too
            pipe.send(first_line(error))
            return


def _step(impl: str, arguments: argparse.Namespace, device: torch.device) -> GradientStep:
    if arguments.phase == 1:
        return phase1.contrastive_step(arguments.batch, impl, device)
    dtype = _dtype(device)
    setup = make_setup(arguments.classes, arguments.batch, device, impl, dtype)
    if arguments.memory:
        setup.head.text_memory = arguments.memory * 2**20
    return whole_step(setup, impl, dtype)


def _print_table(results: list[dict[str, Any]]) -> None:
    if not results:
        return
    one = results[0]
    classes = f"C={one['classes']}, " if one["classes"] else ""
    print(
        f"phase-{one['phase']} step, RN50, {classes}B={one['batch']}, {one['device']}: {one['flops'] / 1e12:.2f} TFLOP "
        f"in the exact algebra; matrix products reach {one['peak_flops'] / 1e9:.0f} GFLOP/s here"
    )
    against = f"against {one['impl']}, in CPU time"
    print(f"{'':<12}{'p20':>9}{'p50':>9}{'p80':>9}{'CPU':>9}  {'peak':>9}{'reserved':>10}  utilisation  {against}")
    for row in results:
        print(
            f"{row['impl']:<12}{row['p20']:>8.2f}s{row['p50']:>8.2f}s{row['p80']:>8.2f}s{row['cpu_s']:>8.2f}s"
            f"  {row['peak_bytes'] / 2**30:>5.2f} GiB{_gib(row['reserved_bytes'])}"
            f"  {row['utilisation']:>11.0%}  {one['p50'] / row['p50']:>.1f}×, {one['cpu_s'] / row['cpu_s']:>.1f}×"
        )


def _gib(size: int | None) -> str:
    return f"{'':>10}" if size is None else f"{size / 2**30:>6.2f} GiB"


if __name__ == "__main__":
    sys.exit(main())
