"""`python -m benchmarks.scaling`: a phase-2 step on several ranks, measured, and a model of it for up to 64 GPUs.

Measured: strong scaling (--batch images over all ranks) and weak scaling (--batch images a rank), under DeepSpeed. On
a CPU the ranks are gloo processes of one thread each, with a narrow model: they show that the work is shared, not how
fast GPUs are. On GPUs it is the full-size RN50 model. The bytes that collectives carry are counted and compared with a
formula.

Model: with --step, the JSON of `python -m benchmarks.step` on one device, the same step on 1 to 64 GPUs: its
computation by FLOPs, plus latency and bandwidth of the collectives. A model is not a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pspg.engine.checkpoints.run import read_json
from pspg.engine.training.config import OptimConfig
from pspg.engine.training.optimizer import make_optimizer
from pspg.engine.utils.errors import UserError
from pspg.engine.utils.files import check_output, write_text

from .machine import environment
from .ranks import Settings, measure
from .rows import read_results, write_results
from .setup import exact_flops, make_setup
from .step import positive
from .traffic import Network, group_sizes, step_payload

COUNTS = (1, 2, 4, 8, 16, 32, 64)


def main() -> int:
    """Measure, model, print, write JSON and a figure; returns the exit status."""
    arguments = _arguments()
    try:
        for path in filter(None, (arguments.json, arguments.plot)):
            check_output(path, folder=False)
        if arguments.results:
            read_results(Path(arguments.results))
        model = {"model": _model(arguments)} if arguments.step else {}
        found = {"environment": _environment(arguments), "measured": _measure(arguments), **model}
    except UserError as error:
        print(f"benchmarks.scaling: error: {error}", file=sys.stderr)
        return 2
    _print(found)
    if arguments.json:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(arguments.json), json.dumps(found, indent=2) + "\n")
    if arguments.results:
        path = Path(arguments.results)
        write_results(path, {**read_results(path), "scaling": found})
    if arguments.plot:
        from .plots import draw_scaling

        Path(arguments.plot).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.plot).write_bytes(draw_scaling(found))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=positive, nargs="*", help="numbers of ranks to measure (default: 1, 2, 4 … as cores or GPUs)")
    add("--classes", type=positive, default=40, metavar="C", help="classes (default 40)")
    add("--batch", type=positive, default=16, metavar="B", help="images a step, weak scaling: a rank (default 16)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--zero_stage", type=int, choices=(0, 1, 2), default=0)
    add(
        "--scope",
        choices=("global", "local"),
        default="global",
        help="whose images a rank's loss sees (default global)",
    )
    add("--repeat", type=positive, default=5, help="timed steps after two warm-ups (default 5)")
    add("--step", metavar="FILE", help="JSON of benchmarks.step on one device: adds the model")
    add("--latency_us", type=float, default=10, help="model: α, a round of a collective (default 10 µs, assumed)")
    add("--node_gbs", type=float, default=200, help="model: β within a node, GB/s a GPU (default 200, assumed)")
    add("--network_gbs", type=float, default=25, help="model: β between nodes, GB/s a GPU (default 25, assumed)")
    add("--json", metavar="OUT", help="write all numbers")
    add("--plot", metavar="OUT", help="draw them, as PNG")
    add("--results", metavar="FILE", help="also keep them in this results file of benchmarks.run")
    arguments = parser.parse_args()
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
        "classes": arguments.classes,
        "batch": arguments.batch,
        "zero_stage": arguments.zero_stage,
        "scope": arguments.scope,
        "cores": len(os.sched_getaffinity(0)),
        **environment(torch.device(arguments.device)),
    }


def _measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a number of ranks and kind of scaling."""
    rows: list[dict[str, Any]] = []
    same = Settings(*(vars(arguments)[key] for key in Settings._fields))
    for count in tqdm(arguments.ranks, "ranks", disable=None, leave=False):
        for scaling, batch in (("strong", arguments.batch), ("weak", arguments.batch * count)):
            if scaling == "weak" and count == 1:
                rows.append({**rows[-1], "scaling": "weak"})
                continue
            rows.append({"scaling": scaling, "ranks": count, "batch": batch, **measure(count, batch, same)})
    return rows


def _model(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the full-size step on 1 to 64 GPUs, computed, not measured."""
    step = read_json(Path(arguments.step))
    if not isinstance(step, dict) or not {"p50", "classes", "batch", "device", "impl"} <= step.keys():
        raise UserError(f"{arguments.step}: is not the JSON of benchmarks.step for one implementation")
    # FLOPs grow linearly with the images: what one image costs, and what is there without images.
    one, two = (exact_flops(step["classes"], batch) for batch in (1, 2))
    images, texts = step["batch"] * (two - one), 2 * one - two
    repeated = texts - (one - exact_flops(step["classes"], 1, "none") if arguments.scope == "global" else 0)
    share = repeated / (images + texts)
    repeated_s, shared_s = step["p50"] * share, step["p50"] * (1 - share)
    with torch.device("meta"):
        setup = make_setup(step["classes"], 1, torch.device("meta"), "eager", torch.float32)
    groups = group_sizes(make_optimizer(setup.head, OptimConfig()))
    sizes = {"scope": arguments.scope, "classes": step["classes"], "width": setup.tower.projection.shape[1]}
    network = Network(arguments.latency_us * 1e-6, arguments.node_gbs * 1e9, arguments.network_gbs * 1e9)
    rows = []
    for count in COUNTS:
        row: dict[str, Any] = {"ranks": count}
        for scaling, batch in (("strong", step["batch"]), ("weak", step["batch"] * count)):
            payload = step_payload(groups, count, arguments.zero_stage, batch=batch, **sizes)
            sent = row[f"{scaling}_communication"] = network.seconds(payload, count)
            images_s = 0 if scaling == "strong" else step["p50"] * images / (images + texts) * (1 - 1 / count)
            row[scaling] = repeated_s + shared_s / count + images_s + sent
        rows.append(row)
    return {
        "note": "a model, not measured: computation by FLOPs from the step of one device, collectives by α and β",
        "step": {key: step[key] for key in ("p50", "classes", "batch", "device", "impl")},
        "repeated_share": share,
        "parameters": sum(groups),
        "network": vars(network),
        "rows": rows,
    }


def _print(found: dict[str, Any]) -> None:
    about = found["environment"]
    print(
        f"measured: phase-2 step, {about['model']} model, C={about['classes']}, {about['device']}, "
        f"ZeRO {about['zero_stage']}, {about['cores']} cores"
    )
    print("payload, formula: MiB of collectives a step")
    print(f"{'':<8}{'ranks':>6}{'batch':>7}{'s/step':>9}{'img/s':>8}{'payload':>10}{'formula':>9}{'peak GiB':>10}")
    for row in found["measured"]:
        sent, formula = (sum(row[key].values()) / 2**20 for key in ("payload", "formula"))
        print(
            f"{row['scaling']:<8}{row['ranks']:>6}{row['batch']:>7}{row['seconds']:>9.3f}"
            f"{row['batch'] / row['seconds']:>8.1f}{sent:>10.2f}{formula:>9.2f}{row['peak_bytes'] / 2**30:>10.2f}"
        )
    if "model" not in found:
        return
    step, rows = found["model"]["step"], found["model"]["rows"]
    print(f"\nMODEL, not measured: {step['p50']:.3f} s on one {step['device']}, C={step['classes']}, B={step['batch']}")
    print(f"{'ranks':>6}{'strong s':>10}{'speed-up':>10}{'weak s':>10}{'strong: communication':>23}")
    for row in rows:
        speedup = rows[0]["strong"] / row["strong"]
        print(
            f"{row['ranks']:>6}{row['strong']:>10.4f}{speedup:>9.1f}×{row['weak']:>10.4f}{row['strong_communication']:>23.5f}"
        )


if __name__ == "__main__":
    sys.exit(main())
