"""The command `python -m benchmarks.gpu`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch

from pspg.engine.utils.errors import UserError
from pspg.engine.utils.files import check_output, write_text

from ..command import command
from ..machine import environment
from ..model.assumptions import GPUS
from . import __doc__ as purpose
from .calibrate import calibration
from .probe import NAMES
from .report import table
from .session import OK, Part, Session

_FEW = "C=28,n=16,pairs=56"
"""rows of all prefixes of 28 classes"""
OPERATORS = {
    "add_norm": ("C=108,n=16,pairs=482", "C=4,n=2,pairs=3,W=16"),
    "mlp": ("C=108,n=16,pairs=482", "C=4,n=2,pairs=3,W=16"),
    **{
        name: (f"C=108,n=16,pairs=482,products=3,tiles={tiles}", f"C=4,n=2,pairs=3,W=16,products=3,tiles={tiles}")
        for name, tiles in (("block_products narrow", 2), ("block_products wide", 3))
    },
    "block_products few rows": (f"{_FEW},products=1", "C=4,n=2,pairs=3,W=16,products=1"),
    "block_products few rows small": (f"{_FEW},products=3,tiles=4", "C=4,n=2,pairs=3,W=16,products=3,tiles=4"),
    "suffix_attention": ("C=108,n=16,pairs=482", "C=4,n=2,pairs=3,W=16,heads=2"),
    "pooled_attention": ("C=108,n=16,pairs=482", "C=4,n=2,pairs=3,W=16,heads=2"),
    "gather": ("C=108,n=16,pairs=482", "C=4,n=2,pairs=3,W=16"),
    "pair_loss": ("C=108,B=64", "C=4,B=2,D=16"),
    "asymmetric_loss": ("C=108,B=64", "C=4,B=2"),
    "packed_attention": ("B=64,tokens=64,W=512,heads=8", "B=3,tokens=5,W=16,heads=2"),
    "batch_norm": ("B=64,channels=256,side=56", "B=2,channels=5,side=4"),
    "prompt_decoder": ("C=108,B=64,n=16", "C=4,B=2,n=2,D=16,H=16,heads=2"),
    "prompt_decoder overlapped": ("C=108,B=64,n=16,launches=2", "C=4,B=2,n=2,D=16,H=16,heads=2,launches=2"),
    "prompt_decoder one": ("C=108,B=64,n=16,launches=3", "C=4,B=2,n=2,D=16,H=16,heads=2,launches=3"),
}
"""operator, and how it is launched → shape to measure it at, and one to try the code with"""
SWEEPS = {
    **{name: shapes for name, shapes in OPERATORS.items() if " " not in name},
    "block_products": ("C=108,n=16,pairs=482,products=3", "C=4,n=2,pairs=3,W=16,products=3"),
    "block_products small": OPERATORS["block_products few rows small"],
}
"""operators whose kernels' configurations are tried, at the same shapes"""
SWEEP_S = 60
"""seconds of one call for an operator; the next call goes on"""
CLASSES = (14, 28, 108, 193)
CALIBRATION = "calibration.json"


@command("benchmarks.gpu")
def main() -> int:
    """Run one of the three commands; the exit status is 1 if a part failed."""
    options = _arguments()
    check_output(options.out, key="--out")
    if not options.rehearse and not torch.cuda.is_available():
        raise UserError("torch sees no GPU; --rehearse tries everything on a CPU with tiny shapes")
    extra = _installed(options.wheels, options.out)
    if options.rehearse:
        extra = {**extra, "TRITON_INTERPRET": "1"}  # before triton is imported, for the sweep
    device = torch.device("cpu" if options.rehearse else "cuda")
    parts = PLANS[options.command](options)
    missing = [part for part in parts if part.needs and find_spec(part.needs) is None]
    session = Session(options.out / f"gpu-{options.command}", options.budget_s, extra)
    left = session.run([part for part in parts if part not in missing], environment(device, options.commit))
    if options.command == 1:
        probes = {name: session.records[name].result or [] for name in NAMES if name in session.records}
        sheet = GPUS["h100" if not options.rehearse and "H100" in torch.cuda.get_device_name() else "h200"]
        write_text(options.out / CALIBRATION, json.dumps(calibration(probes, sheet), indent=1) + "\n")
    notes = [f"{part.name}: left out, {part.needs} is not installed" for part in missing]
    notes += [f"{name}: left for another call of the same command" for name in left]
    print("\n".join(table(session.records.values(), notes)))
    return int(any(record.status != OK for record in session.records.values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=purpose)
    add = parser.add_argument
    add(
        "command",
        type=int,
        choices=PLANS,
        help="1: probe and tests; 2: whole steps; 3: profile of a step, other configurations of the kernels",
    )
    add("--out", type=Path, default=Path("build/gpu"), help="folder of the results (build/gpu)")
    add("--budget_s", type=float, default=530, help="seconds after which nothing more starts (530)")
    add("--wheels", type=Path, help="folder of wheels to install beside the results, without network")
    add("--commit", help="of the code, where it is no git checkout")
    add("--rehearse", action="store_true", help="tiny shapes on a CPU: tries the code, measures nothing")
    return parser.parse_args()


def _installed(wheels: Path | None, out: Path) -> Mapping[str, str]:
    """Environment of the parts: with the packages of the wheels, if there are some.

    Raises:
        UserError: no such wheels, or pip refuses them.
    """
    if wheels is None:
        return {}
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise UserError(f"--wheels: {wheels} holds no wheel")
    target = out / "packages"
    if not target.is_dir():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--target",
            str(target),
        ]
        done = subprocess.run([*command, *files], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"--wheels: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}")
    sys.path.insert(0, str(target))
    return {"PYTHONPATH": os.pathsep.join([str(target.resolve()), os.environ.get("PYTHONPATH", "")])}


def probe_and_tests(options: argparse.Namespace) -> list[Part]:
    """Probes, then each kernel against its plain form, then the tests, those of whole steps last."""
    small = options.rehearse
    parts = [Part(name, ["-m", "benchmarks.gpu.probe", name, "json"], 60) for name in NAMES]
    impls = ("eager", "repaired") if small else ("eager", "triton")
    for name, shapes in OPERATORS.items():
        command = [
            "-m",
            "benchmarks.run",
            "--op",
            name.split()[0],
            "--device",
            "cpu" if small else "cuda",
            "--json",
            "json",
        ]
        parts.append(
            Part(f"operator-{name.replace(' ', '-')}", [*command, "--shape", shapes[small], "--impl", *impls], 60)
        )
    chosen = {"tests": ["tests/benchmarks/test_gpu.py", "-k", "kind"]}
    if not small:
        chosen = {f"tests-{name}": ["-m", "gpu", f"tests/{name}"] for name in ("kernels", "engine")}
    return parts + [Part(name, ["-m", "benchmarks.gpu.tests", "json", *words], 240) for name, words in chosen.items()]


def whole_steps(options: argparse.Namespace) -> list[Part]:
    """The exact algebra and the kernels at every size, then the tuned baseline, which compiles."""
    sizes, batch = ((2,), 2) if options.rehearse else (CLASSES, 64)
    where = "cpu" if options.rehearse else "cuda"
    rounds = (("eager",), ("repaired",)) if options.rehearse else (("eager", "triton"), ("repaired",))
    return [
        Part(
            f"step-{impls[-1]}-C{classes}",
            [
                *("-m", "benchmarks.step", "--device", where, "--classes", str(classes), "--batch", str(batch)),
                *("--repeat", "1" if options.rehearse else "10", "--json", "json", "--impl", *impls),
            ],
            150,
            needs="open_clip",
        )
        for impls in rounds
        for classes in sizes
    ]


def profiles(options: argparse.Namespace) -> list[Part]:
    """One replay by kernel, beside the model with what the first command has measured; then the sweep."""
    sizes, batch = ((2,), 2) if options.rehearse else ((108, 14), 64)
    known = options.out / CALIBRATION
    extra = [str(known)] if known.is_file() else []
    return [
        Part(
            f"profile-C{classes}",
            ["-m", "benchmarks.gpu.profile", str(classes), str(batch), "json", *extra],
            200,
            needs="open_clip",
        )
        for classes in sizes
    ] + sweeps(options)


def sweeps(options: argparse.Namespace) -> list[Part]:
    """Other configurations of the kernels, an operator at a time; the rehearsal tries the smallest one."""
    names = ["asymmetric_loss"] if options.rehearse else list(SWEEPS)
    return [
        Part(
            f"sweep-{name.replace(' ', '-')}",
            ["-m", "benchmarks.gpu.sweep", name.split()[0], SWEEPS[name][options.rehearse], str(SWEEP_S), "json"],
            SWEEP_S + 60,  # the first run, its oracle, and the compiler's last
        )
        for name in names
    ]


PLANS = {1: probe_and_tests, 2: whole_steps, 3: profiles}


if __name__ == "__main__":
    sys.exit(main())
