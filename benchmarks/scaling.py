"""`python -m benchmarks.scaling`: a step on several ranks, measured here, or by the model for up to 64 GPUs and more.

Strong scaling: the same step on more ranks. Weak scaling: as many pairs for each rank, so that classes grow with the
square root of the ranks, or, where pairs are sampled, with the ranks; the images of a batch stay. In phase 1 weak
scaling is as many images a rank.

Measured: under DeepSpeed, on a CPU gloo processes of one thread each with a narrow model: they show that the work is
shared, not how fast GPUs are. On GPUs it is the full-size RN50 model. The bytes that collectives carry are counted and
compared with a formula.

Model: with --gpu, the step of the full-size RN50 model as `python -m benchmarks.model` prices it, what a rank does of
it, and latency and bandwidth of its collectives, all from the one table of assumptions. A model is not a measurement.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pspg.engine.utils.files import check_output
from pspg.kernels.pairs import number_of_pairs
from pspg.kernels.prompt_decoder.gru import MOST_IMAGES

from .command import command, positive, write_json
from .machine import environment
from .model.assumptions import GPUS, load_assumptions
from .model.scale import ImageShare, larger, price_rank, work
from .model.share import Share
from .ranks import Settings, measure
from .rows import read_results, write_results

COUNTS = (1, 2, 4, 8, 16, 64)
SAMPLES = 8
"""pairs a class of sampled SPCL, positive ones and others each, as `loss.pair_samples`"""


@command("benchmarks.scaling")
def main() -> int:
    """Measure or model, print, write JSON and a figure; returns the exit status."""
    arguments = _arguments()
    for path in filter(None, (arguments.json, arguments.plot)):
        check_output(path, folder=False)
    kept = read_results(Path(arguments.results)) if arguments.results else {}
    if arguments.gpu:
        found: dict[str, Any] = {"model": _model(arguments)}
    else:
        found = {"environment": _environment(arguments), "measured": _measure(arguments)}
    _print(found)
    whole = {**kept.get("scaling", {}), **found}
    if arguments.json:
        write_json(arguments.json, found)
    if arguments.results:
        write_results(Path(arguments.results), {**kept, "scaling": whole})
    if arguments.plot:
        from .plots import draw_scaling

        Path(arguments.plot).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.plot).write_bytes(draw_scaling(whole))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=positive, nargs="*", help="numbers of ranks (default: as cores or GPUs; model 1 2 4 8 16 64)")
    add("--classes", type=positive, nargs="+", metavar="C", help="classes (default 40; model 108 193 500 1000)")
    add(
        "--batch",
        type=positive,
        metavar="B",
        help="images a step, weak scaling of phase 1: a rank (default 16; model 64)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--zero_stage", type=int, choices=(0, 1, 2), default=0)
    add(
        "--scope",
        choices=("global", "local"),
        default="global",
        help="whose images a rank's loss sees (default global)",
    )
    add("--repeat", type=positive, default=5, help="timed steps after two warm-ups (default 5)")
    add("--gpu", choices=GPUS, nargs="+", help="do not measure: the model, of these GPUs")
    add("--phase", type=int, choices=(1, 2), default=2, help="model: training phase (default 2)")
    kinds = ["strong", "weak"]
    add("--scaling", choices=kinds, nargs="+", default=kinds, help="model: kinds of scaling (default both)")
    add("--calibration", type=Path, metavar="FILE", help="model: measured numbers in place of assumptions, by field")
    add("--json", metavar="OUT", help="write all numbers")
    add("--plot", metavar="OUT", help="draw them, as PNG")
    add("--results", metavar="FILE", help="also keep them in this results file of benchmarks.run; the plot has both")
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or (64 if arguments.gpu else 16)
    arguments.classes = arguments.classes or ([108, 193, 500, 1000] if arguments.gpu else [40])
    if arguments.gpu:
        arguments.ranks = sorted({1, *(arguments.ranks or COUNTS)})
        if arguments.batch > MOST_IMAGES and arguments.phase == 2:
            parser.error(f"--batch: the decoder's kernels take up to {MOST_IMAGES} images, got {arguments.batch}")
        if min(arguments.classes) < 2:
            parser.error("--classes: pairs need at least 2 classes")
        return arguments
    if len(arguments.classes) > 1:
        parser.error("--classes: several are for the model, --gpu; a measurement takes one")
    places = torch.cuda.device_count() if arguments.device == "cuda" else len(os.sched_getaffinity(0))
    if not arguments.ranks:
        arguments.ranks = [count for count in COUNTS if count <= places]
    unfit = [count for count in arguments.ranks if arguments.batch % count]
    if unfit:
        parser.error(f"--batch: {arguments.batch} images cannot be split over {unfit[0]} ranks")
    if arguments.device == "cuda" and max(arguments.ranks, default=1) > places:
        parser.error(f"--ranks: {max(arguments.ranks)} ranks need as many GPUs, torch sees {places}")
    return arguments


def _environment(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": "narrow" if arguments.device == "cpu" else "RN50",
        "classes": arguments.classes[0],
        "batch": arguments.batch,
        "zero_stage": arguments.zero_stage,
        "scope": arguments.scope,
        "cores": len(os.sched_getaffinity(0)),
        **environment(torch.device(arguments.device)),
    }


def _measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a number of ranks and kind of scaling; a row's `work` is its pairs."""
    rows: list[dict[str, Any]] = []
    for count in tqdm(arguments.ranks, "ranks", disable=None, leave=False):
        for scaling in ("strong", "weak"):
            if scaling == "weak" and count == 1:
                rows.append({**rows[-1], "scaling": "weak"})
                continue
            share = Share(arguments.classes[0], arguments.batch)
            classes = larger(share, count).classes if scaling == "weak" else share.classes
            values = {**vars(arguments), "classes": classes}
            found = measure(count, arguments.batch, Settings(*(values[key] for key in Settings._fields)))
            about = {"scaling": scaling, "ranks": count, "classes": classes, "batch": arguments.batch}
            rows.append({**about, "work": number_of_pairs(classes), **found})
    return rows


def _model(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows of every GPU, number of classes, choice of pairs, kind of scaling and number of ranks; nothing measured."""
    tables = {gpu: load_assumptions(gpu, arguments.calibration) for gpu in arguments.gpu}
    rows = []
    for about, share in tqdm(list(_shares(arguments)), "shares", disable=None, leave=False):
        for gpu, table in tables.items():
            sizes = {"ranks": share.ranks, "classes": share.classes, "batch": share.batch, "work": work(share)}
            rows.append({"gpu": gpu, "phase": arguments.phase, **about, **sizes, **price_rank(share, table)})
    return {
        "note": "a model, not measured: what a rank does by the table of assumptions, collectives by α and β",
        "rows": rows,
    }


def _shares(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Share | ImageShare]]:
    whole: list[tuple[str, Share | ImageShare]] = []
    if arguments.phase == 1:
        whole.append(("images", ImageShare(arguments.batch)))
    for name, samples in (("all pairs", 0), ("sampled pairs", SAMPLES)) if arguments.phase == 2 else ():
        whole += [(name, Share(classes, arguments.batch, samples=samples)) for classes in arguments.classes]
    for name, one in whole:
        for scaling in arguments.scaling:
            for count in arguments.ranks:
                share = replace(one, ranks=count) if scaling == "strong" else larger(one, count)
                yield {"curve": f"{name}, C = {one.classes}" if one.classes else name, "scaling": scaling}, share


def _print(found: dict[str, Any]) -> None:
    from .plots import curves, speedups

    if "measured" in found:
        _print_measured(found)
        return
    print(f"MODEL, not measured ({found['model']['note']})")
    print("hidden: ms of collectives that go on while pairs run, and are not in ms")
    print("no graph: ms where the host starts the kernels one by one; limit: the largest part of the recorded step")
    for (gpu, curve, scaling), rows in curves(found["model"]["rows"]).items():
        print(f"\n{gpu}, phase {rows[0]['phase']}, {curve}, {scaling} scaling")
        names = {
            "ranks": 6,
            "classes": 9,
            "batch": 7,
            "ms": 10,
            "speed-up": 10,
            "efficiency": 12,
            "hidden": 8,
            "no graph": 10,
            "GiB": 7,
        }
        print(f"{''.join(f'{name:>{width}}' for name, width in names.items())}  limit")
        for row, speedup in zip(rows, speedups(rows), strict=True):
            limit, whole = row["limit"], max(row["seconds"], row["host_seconds"])
            print(
                f"{row['ranks']:>6}{row['classes']:>9}{row['batch']:>7}{1e3 * row['seconds']:>10.2f}{speedup:>9.1f}×"
                f"{speedup / row['ranks']:>12.0%}{1e3 * row['hidden_seconds']:>8.2f}{1e3 * whole:>10.2f}"
                f"{row['peak_bytes'] / 2**30:>7.2f}  {limit} {row['of'][limit] / row['seconds']:.0%}"
            )


def _print_measured(found: dict[str, Any]) -> None:
    about = found["environment"]
    print(
        f"measured: phase-2 step, {about['model']} model, C={about['classes']}, {about['device']}, "
        f"ZeRO {about['zero_stage']}, {about['cores']} cores"
    )
    print("payload, formula: MiB of collectives a step")
    print(f"{'':<8}{'ranks':>6}{'classes':>9}{'s/step':>9}{'pairs/s':>9}{'payload':>10}{'formula':>9}{'peak GiB':>10}")
    for row in found["measured"]:
        sent, formula = (sum(row[key].values()) / 2**20 for key in ("payload", "formula"))
        print(
            f"{row['scaling']:<8}{row['ranks']:>6}{row['classes']:>9}{row['seconds']:>9.3f}"
            f"{row['work'] / row['seconds']:>9.0f}{sent:>10.2f}{formula:>9.2f}{row['peak_bytes'] / 2**30:>10.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
