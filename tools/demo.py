"""The demo: phantoms, both phases, evaluation, a real radiograph, a report. Every step is a `pspg-engine` command.

Run it with `make demo`, or `python -m tools.demo --seed 1 --output runs/demo1` for another draw of everything.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from textwrap import shorten
from typing import Any

from PIL import Image
from pydicom.data import get_testdata_file

from pspg.engine.data.images import read_image
from pspg.engine.data.phantoms.dataset import contact_sheet

CONFIGS = Path(os.path.relpath(Path(__file__).parents[1] / "configs"))
NOTE = "Phantoms are drawings, no clinical data: these numbers show that the engine learns, and nothing about patients."


def main() -> int:
    """Run all steps; returns the exit status of the first that fails, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of everything the demo writes")
    parser.add_argument("--seed", type=int, default=0, help="seed of phantoms and training")
    arguments = parser.parse_args()
    out, seed = arguments.output, str(arguments.seed)
    phantoms, phase1, phase2, report = out / "phantoms", out / "phase1", out / "phase2", out / "report"
    residual, report_residual = out / "residual", out / "report_residual"
    picture, predictions = out / "real_radiograph.png", out / "real_radiograph.csv"
    start = time.perf_counter()

    def command(title: str, *words: object) -> None:
        print(f"\n── {title}  ({time.perf_counter() - start:.0f} s)", flush=True)
        print("$ " + shorten(shlex.join(["pspg-engine", *map(str, words)]), 400), flush=True)
        subprocess.run([sys.executable, "-m", "pspg.engine", *map(str, words)], check=True)

    data = ("--data.train", phantoms / "train.jsonl", "--data.val", phantoms / "val.jsonl")
    try:
        command("draw phantom radiographs", "phantom", "--output", phantoms, "--seed", seed)
        command(
            "phase 1: contrastive training of a small CLIP on radiographs and reports",
            "train", "--config", CONFIGS / "demo_phase1.yaml", *data,
            "--output", phase1, "--seed", seed, "--resume", "latest",
        )  # fmt: skip
        command(
            "phase 2: prompt learning on the frozen CLIP",
            "train", "--config", CONFIGS / "demo.yaml", *data, "--data.class_names", phantoms / "seen.txt",
            "--model.pretrained", phase1, "--output", phase2, "--seed", seed, "--resume", "latest",
        )  # fmt: skip
        command(
            "residual of the training classes on the finished prompts",
            "train", "--config", CONFIGS / "demo_residual.yaml", *data, "--data.class_names", phantoms / "seen.txt",
            "--model.pretrained", phase1, "--model.pretrained_head", phase2, "--model.residual", "related",
            "--output", residual, "--seed", seed, "--resume", "latest",
        )  # fmt: skip
        source = get_testdata_file("RG1_UNCR.dcm", download=False)
        command(
            "predict on a real radiograph",
            "predict",
            "--checkpoint",
            phase2,
            "--input",
            source,
            "--output",
            predictions,
            "--overwrite",
            "true",
        )
        save_picture(Path(str(source)), picture)
        contact_sheet(phantoms, out / "phantoms.png")
        pictures = {
            "Phantom radiographs of the test split": str(out / "phantoms.png"),
            f"A real radiograph (pydicom-data), scored by a model that has only seen drawings: {top(predictions)}": str(
                picture
            ),
        }
        lists = json.dumps({
            "seen": str(phantoms / "seen.txt"),
            "unseen compositions": str(phantoms / "unseen.txt"),
            "unseen types": str(phantoms / "unseen_types.txt"),
        })  # fmt: skip
        split = ("--manifest", phantoms / "test.jsonl", "--class_lists", lists, "--notes", json.dumps([NOTE]))
        command(
            "evaluate the residual, blended with the templates",
            "evaluate", "--checkpoint", residual, *split, "--output", report_residual, "--baselines", "false",
            "--method", "PsPG, related residual, novelty blend", "--evaluation.blend", "novelty",
            "--evaluation.context", "bank", "--evaluation.batch_size", "128", "--overwrite", "true",
        )  # fmt: skip
        command(
            "evaluate",
            "evaluate", "--checkpoint", phase2, *split, "--output", report,
            "--probe", phantoms / "train.jsonl", "--pictures", json.dumps(pictures),
            "--title", "PsPG demo on phantom radiographs", "--evaluation.batch_size", "128",
            "--overwrite", "true",
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        return error.returncode
    results = [json.loads((each / "metrics.json").read_text())["results"] for each in (report, report_residual)]
    print_table(results[0] | results[1])
    print(f"real radiograph: {top(predictions)}\n{NOTE}")
    print(f"report: {report / 'report.html'}   ({time.perf_counter() - start:.0f} s in all)")
    print(f"the command: {how_to_call()}")
    return 0


def how_to_call() -> str:
    """What to type for `pspg-engine` after this: its name where the shell finds it, else what makes it so."""
    script = Path(sys.executable).with_name("pspg-engine")
    if shutil.which("pspg-engine"):
        return "pspg-engine --help"
    if script.exists():
        return f". {os.path.relpath(script.with_name('activate'))} && pspg-engine --help"
    return f"pip install '.[dicom]' in {Path(__file__).parents[1]}, then pspg-engine --help"


def print_table(results: dict[str, Any]) -> None:
    """Macro AUC of every method on every class list."""
    groups = [group for group in next(iter(results.values())) if group != "all"]
    print(f"\n{'Macro AUC on test phantoms':<38}" + "".join(f"{group:>22}" for group in groups))
    for method, found in results.items():
        print(f"{method:<38}" + "".join(f"{found[group]['macro_auc']:>22.3f}" for group in groups))
    print()


def save_picture(source: Path, target: Path) -> None:
    """Write the image as a PNG small enough for a page."""
    image = read_image(source)
    image.thumbnail((512, 512), Image.Resampling.LANCZOS)
    image.save(target)


def top(predictions: Path, count: int = 3) -> str:
    """The most probable classes of the first row of a predictions table."""
    with predictions.open(newline="") as file:
        row = next(csv.DictReader(file))
    row.pop("id")
    best = sorted(row.items(), key=lambda item: -float(item[1]))[:count]
    return ", ".join(f"{name} {float(value):.2f}" for name, value in best)


if __name__ == "__main__":
    sys.exit(main())
