"""The command `python -m benchmarks.model`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pspg.engine.utils.errors import UserError
from pspg.engine.utils.files import check_output
from pspg.kernels.prompt_decoder.gru import MOST_IMAGES

from ..command import command, positive, write_json
from ..setup import exact_flops
from . import __doc__ as purpose
from .assumptions import GPUS, Assumptions, load_assumptions
from .price import Totals, price_step, with_selectable
from .trace import PARTS, Step, trace_step


@command("benchmarks.model")
def main() -> int:
    """Trace, price, print; returns the exit status."""
    arguments = _arguments()
    if arguments.batch > MOST_IMAGES:
        raise UserError(f"--batch: the decoder's kernels take up to {MOST_IMAGES} images, got {arguments.batch}")
    tables = {gpu: load_assumptions(gpu, arguments.calibration) for gpu in arguments.gpu}
    if arguments.json:
        check_output(arguments.json, folder=False, key="--json")
    results = []
    for classes in arguments.classes:
        step, exact = trace_step(classes, arguments.batch), exact_flops(classes, arguments.batch)
        step = with_selectable(step) if arguments.selectable else step
        for gpu, table in tables.items():
            results.append(_result(step, gpu, table, exact))
            _print(results[-1])
    if arguments.json:
        write_json(arguments.json, results)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=purpose)
    add = parser.add_argument
    add("--phase", type=int, choices=(2,), default=2, help="training phase whose step is modelled (default 2)")
    add("--classes", type=positive, nargs="+", default=[14, 28, 108, 193], metavar="C", help="default 14 28 108 193")
    add("--batch", type=positive, default=64, metavar="B", help="images a batch (default 64)")
    add("--gpu", choices=GPUS, nargs="+", default=["h200"], help="default h200")
    add("--selectable", action="store_true", help="with the forms that are not the default before a GPU has run them")
    add("--calibration", type=Path, metavar="FILE", help="JSON of measured numbers in place of assumptions, by field")
    add("--json", type=Path, metavar="OUT", help="write a list of one object a number of classes and GPU")
    return parser.parse_args()


def _result(step: Step, gpu: str, table: Assumptions, exact: int) -> dict[str, Any]:
    """The model's numbers of a step on a GPU; `floor_ms` is the exact algebra's FLOPs at the rate of products."""
    parts, kinds = price_step(step, table)
    total = _row(_sum(parts), table)
    return {
        "classes": step.classes,
        "batch": step.batch,
        "gpu": gpu,
        **total,
        "floor_ms": 1e3 * exact / table.product_rate,
        "peak_bytes": step.peak_bytes,
        "parts": {name: _row(parts[name], table) for name in PARTS if name in parts},
        "kinds": {
            name: _row(totals, table) for name, totals in sorted(kinds.items(), key=lambda item: -item[1].seconds)
        },
    }


def _sum(parts: Mapping[str, Totals]) -> Totals:
    names = ("launches", "bytes", "flops", "seconds")
    return Totals(*(sum(getattr(part, name) for part in parts.values()) for name in names))


def _row(totals: Totals, table: Assumptions) -> dict[str, float]:
    return {
        "launches": totals.launches,
        "bytes": totals.bytes,
        "flops": totals.flops,
        "ms": 1e3 * totals.seconds,
        "floor_ms": 1e3 * totals.flops / table.product_rate,
    }


def _print(result: dict[str, Any]) -> None:
    print(
        f"\nC={result['classes']} B={result['batch']} {result['gpu']}: a model says {result['ms']:.2f} ms, floor "
        f"{result['floor_ms']:.2f} ms ({result['floor_ms'] / result['ms']:.0%}); "
        f"{result['peak_bytes'] / 2**30:.2f} GiB alive at most"
    )
    print(f"{'':<28}{'launches':>9}{'GB':>9}{'TFLOP':>9}{'ms':>9}{'floor':>8}")
    for rows in ({**result["parts"], "step": result}, result["kinds"]):
        for name, row in rows.items():
            print(
                f"{name:<28}{row['launches']:>9}{row['bytes'] / 1e9:>9.2f}{row['flops'] / 1e12:>9.3f}{row['ms']:>9.3f}"
                f"{row['floor_ms'] / row['ms']:>8.0%}"
            )
        print()


if __name__ == "__main__":
    sys.exit(main())
