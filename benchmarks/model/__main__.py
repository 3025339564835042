"""The command `python -m benchmarks.model`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pspg.engine.utils.errors import UserError
from pspg.engine.utils.files import check_output
from pspg.kernels.prompt_decoder.gru import MOST_IMAGES

from ..command import command, positive, write_json
from ..setup import exact_flops
from . import __doc__ as purpose
from .assumptions import GPUS, Assumptions, load_assumptions
from .price import Totals, price_step
from .selectable import faster_decoder, images_ahead, selectable_step
from .trace import PARTS, Step, trace_contrastive, trace_step


@command("benchmarks.model")
def main() -> int:
    """Trace, price, print; returns the exit status."""
    arguments = _arguments()
    if arguments.phase == 1 and arguments.selectable:
        raise UserError("--selectable: a step of phase 1 has no forms that can be selected; leave it out")
    if arguments.batch > MOST_IMAGES and arguments.phase == 2:
        raise UserError(f"--batch: the decoder's kernels take up to {MOST_IMAGES} images, got {arguments.batch}")
    tables = {gpu: load_assumptions(gpu, arguments.calibration) for gpu in arguments.gpu}
    if arguments.json:
        check_output(arguments.json, folder=False, key="--json")
    results = []
    for result in _results(arguments, tables):
        results.append(result)
        _print(result)
    if arguments.json:
        write_json(arguments.json, results)
    return 0


def _results(arguments: argparse.Namespace, tables: Mapping[str, Assumptions]) -> Iterator[dict[str, Any]]:
    """A result of every number of classes and GPU; with `--selectable` also that of the forms that can be selected."""
    if arguments.phase == 1:
        step = trace_contrastive(arguments.batch, arguments.tokens)
        about = {"phase": 1, "batch": arguments.batch, "tokens": arguments.tokens}
        # No formula of its own: what runs is what has to run.
        exact = round(sum(operation.flops for operation in step.operations))
        yield from ({**about, **_result(step, gpu, table, exact)} for gpu, table in tables.items())
        return
    for classes in arguments.classes:
        step, exact = trace_step(classes, arguments.batch), exact_flops(classes, arguments.batch)
        for gpu, table in tables.items():
            about = {"phase": 2, "classes": classes, "batch": arguments.batch}
            yield {**about, "form": "default", **_result(step, gpu, table, exact)}
            if not arguments.selectable:
                continue
            decoder, seconds = faster_decoder(classes, arguments.batch, table)
            chosen = selectable_step(classes, arguments.batch, decoder)
            ahead, result = images_ahead(chosen, table), _result(chosen, gpu, table, exact)
            yield {
                **about,
                "form": "selectable",
                **result,
                "ms": result["ms"] - 1e3 * ahead.saved,
                "serial_ms": result["ms"],
                "ahead_ms": {name: 1e3 * value for name, value in asdict(ahead).items()},
                "decoder": decoder,
                "decoder_ms": {name: 1e3 * value for name, value in seconds.items()},
            }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=purpose)
    add = parser.add_argument
    add("--phase", type=int, choices=(1, 2), default=2, help="training phase whose step is modelled (default 2)")
    many = [14, 28, 108, 193]
    add("--classes", type=positive, nargs="+", default=many, metavar="C", help="phase 2: default 14 28 108 193")
    add("--tokens", type=positive, default=64, help="phase 1: of a report, with its EOS (default 64)")
    add("--batch", type=positive, default=64, metavar="B", help="images a batch (default 64)")
    add("--gpu", choices=GPUS, nargs="+", default=["h200"], help="default h200")
    selectable = "phase 2: also the step of the forms that are not the default before a GPU has run them"
    add("--selectable", action="store_true", help=selectable)
    add("--calibration", type=Path, metavar="FILE", help="JSON of measured numbers in place of assumptions, by field")
    add("--json", type=Path, metavar="OUT", help="write a list of one object a number of classes and GPU")
    return parser.parse_args()


def _result(step: Step, gpu: str, table: Assumptions, exact: int) -> dict[str, Any]:
    """The model's numbers of a step on a GPU; `floor_ms` is the exact algebra's FLOPs at the rate of products."""
    parts, kinds = price_step(step, table)
    total = _row(_sum(parts), table)
    return {
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
    sizes = f"C={result['classes']}" if result["phase"] == 2 else f"phase 1, {result['tokens']} tokens,"
    form = ", selectable forms" if result.get("form") == "selectable" else ""
    print(
        f"\n{sizes} B={result['batch']} {result['gpu']}{form}: a model says {result['ms']:.2f} ms, floor "
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
    if form:
        ahead, decoder = result["ahead_ms"], result["decoder_ms"]
        print(
            f"images ahead: {result['serial_ms']:.2f} ms become {result['ms']:.2f}; image tower alone "
            f"{ahead['images']:.2f}, what it runs beside {ahead['texts']:.2f}, used by both {ahead['used']:.2f} ms"
        )
        choices = ", ".join(f"{name} {ms:.2f} ms" for name, ms in decoder.items())
        print(f"decoder: {choices}; counted: {result['decoder']}\n")


if __name__ == "__main__":
    sys.exit(main())
