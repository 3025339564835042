"""`pspg-engine study`: run what a table compares, then write the table."""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ...utils.documents import Within, as_schema, read_json
from ...utils.errors import DAMAGED, UserError
from ...utils.files import check_output, write_text
from ...utils.lock import one_writer
from ...utils.metrics_log import read_metrics
from ...utils.yaml_text import read_yaml
from .config import StudyConfig
from .plan import Cell, Plan, Step, make_plan
from .table import Result, Table, write_table

log = logging.getLogger(__name__)

DONE = "done.json"


def study(config: StudyConfig) -> Path:
    """Run every step that has not been run yet, and write the table after each row; returns its HTML page.

    Steps are commands of their own, so that a broken one leaves its row out and the others go on.

    Raises:
        UserError: settings that cannot be; or, at the end, the rows that failed.
    """
    plan = make_plan(config)
    check_output(config.output)
    with one_writer(config.output):
        return _run_all(config, plan)


def _run_all(config: StudyConfig, plan: Plan) -> Path:
    begin = time.monotonic()
    failed: dict[Path, str] = {}
    waiting = 0
    for number, step in enumerate(plan.steps, 1):
        if any(need.folder in failed for need in step.needs):
            failed[step.folder] = ""
            waiting += 1
            continue
        if is_done(step):
            continue
        minutes = (time.monotonic() - begin) / 60
        log.info(f"[{number}/{len(plan.steps)}, {minutes:.1f} min] {step.command}: {step.title}")
        status = run(step, config.processes)
        if status:
            failed[step.folder] = f"{step.command} {step.title} ended with status {status}"
        elif step.command == "evaluate":
            write_table(Path(config.output), table_of(config, plan, failed))
    page = write_table(Path(config.output), table_of(config, plan, failed))
    log.info(f"{len(config.rows)} rows: {page}")
    if failed:
        reasons = [reason for reason in failed.values() if reason]
        rest = f"; {waiting} steps that need them were left out" if waiting else ""
        raise UserError(
            f"{len(reasons)} of {len(plan.steps)} steps failed: {'; '.join(reasons)}{rest}; run it again to go on"
        )
    return page


def is_done(step: Step) -> bool:
    """The step's command has ended well. Its folder is named after its settings, so it had the same ones."""
    return (step.folder / DONE).is_file()


def run(step: Step, processes: int) -> int:
    """Run a step, or continue it, to its end; returns the exit status.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after the step has ended.
    """
    words = step.words()
    command = [sys.executable, "-m"]
    if step.command != "phantom" and processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    if step.command == "train":
        words += ["--resume", "latest"]
    if step.command == "evaluate":
        words += ["--overwrite", "true"]  # of an evaluation that was killed
    begin = time.monotonic()
    status = subprocess.run([*command, "pspg.engine", *words], env=os.environ, check=False).returncode
    status = 0 if status == DAMAGED else status  # told, and done
    if status == 130:
        raise KeyboardInterrupt
    if status == 0:
        facts = {"command": words, "seconds": time.monotonic() - begin}
        write_text(step.folder / DONE, json.dumps(facts, indent=2) + "\n")
    return status


def table_of(config: StudyConfig, plan: Plan, failed: dict[Path, str]) -> Table:
    """The table with the cells that are known by now."""
    return Table(config, {(c.row, c.data_set, c.seed): _result(config, c, failed) for c in plan.cells})


def _result(config: StudyConfig, cell: Cell, failed: dict[Path, str]) -> Result:
    if cell.evaluation.folder in failed:
        return Result("failed")
    if not is_done(cell.evaluation):
        return Result("not run")
    file = cell.evaluation.folder / "metrics.json"
    try:
        document = as_schema(_Metrics, read_json(file))
    except ValueError as error:
        raise UserError(f"{file}: is not what evaluate writes ({error}); delete its folder and run again") from None
    results = document.results
    row = config.rows[cell.row]
    method = row.method or next(iter(results))
    if method not in results:
        raise UserError(f"rows: {row.name!r}: method: {method!r} is none of {', '.join(results)}")
    groups, group = results[method], config.data_sets[cell.data_set].group
    if group is not None and group not in groups:
        raise UserError(f"data_sets: {cell.data_set}: group: {group!r} is none of {', '.join(groups)}")
    found = groups[next(iter(groups)) if group is None else group]
    # A baseline or probe beside a run was not trained by it.
    trained = cell.training if row.method is None else None
    steps = training_facts(trained.folder) if trained is not None else {}
    parameters = document.trainable_parameters or {}
    return Result(
        "ok",
        {metric: found[metric] for metric in config.metrics},
        {metric: (found.get("intervals") or {}).get(metric) for metric in config.metrics},
        parameters=parameters.get(method),
        **steps,
    )


def training_facts(run: Path) -> dict[str, Any]:
    """Median seconds a step and most bytes held, on the worst rank, of a run's metrics.jsonl."""
    rows = read_metrics(run / "metrics.jsonl")
    rates = [row["images_per_s"] for row in rows if row.get("images_per_s")]
    peaks = [max(row["peak_bytes"]) for row in rows if row.get("peak_bytes")]
    batch = _batch_size(run)
    return {
        "step_seconds": batch / statistics.median(rates) if rates else None,
        "peak_bytes": max(peaks) if peaks else None,
    }


@dataclass
class _Metrics:
    """What is read of metrics.json."""

    results: dict[str, dict[str, dict[str, Any]]]
    """method → group → metrics"""
    trainable_parameters: dict[str, int | None] | None = None


@dataclass
class _Optim:
    accumulate: Annotated[int, Within(1)]


@dataclass
class _Settings:
    """What is read of config.yaml."""

    batch_size: Annotated[int, Within(1)]
    optim: _Optim


def _batch_size(run: Path) -> int:
    file = run / "config.yaml"
    try:
        settings = as_schema(_Settings, read_yaml(file))
    except ValueError as error:
        raise UserError(f"{file}: is not what train writes ({error}); delete its folder and run again") from None
    return settings.batch_size * settings.optim.accumulate
