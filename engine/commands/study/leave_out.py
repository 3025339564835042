"""`pspg-engine leave-out`: zero-shot on class types that are left out of the training, one group after the other."""

from __future__ import annotations

import logging
import re
import statistics
from pathlib import Path

from ...config import check_values, require
from ...data.labels import select_classes
from ...data.manifest import load_label_names
from ...models.templates import PAIRED
from ...utils.errors import UserError
from ...utils.files import check_output, write_text
from ...utils.tables import write_csv
from .config import DataSet, LeaveOutConfig, RowSpec, RunSpec, StudyConfig
from .plan import make_plan
from .run import study, table_of

log = logging.getLogger(__name__)

LEFT_OUT, KEPT = "Left out", "Kept"


def leave_out(config: LeaveOutConfig) -> Path:
    """Train and evaluate without each group; returns the table of means over groups.

    Raises:
        UserError: settings that cannot be, or steps that failed.
    """
    check_values(config)
    require(train=config.train, manifest=config.manifest, output=config.output)
    plan = make_study(config)
    study(plan)
    return _write_means(config, plan)


def make_study(config: LeaveOutConfig) -> StudyConfig:
    """The study of all groups: a run and a section for each; writes the class lists.

    Raises:
        UserError: unknown classes, or a group of none or of all.
    """
    given = config.class_names
    names = load_label_names(given) if isinstance(given, str) and given else list(given)
    if not names:
        raise UserError("class_names: give the training classes, a list or a text file")
    if not config.groups:
        raise UserError("groups: name the classes to leave out, such as {effusion: [effusion, left effusion]}")
    check_output(config.output)
    runs: dict[str, RunSpec] = {}
    rows: list[RowSpec] = []
    for group, chosen in config.groups.items():
        left_out = select_classes(names, chosen, key=f"groups: {group}")[0] if chosen else []
        kept = [name for name in names if name not in left_out]
        if not left_out or not kept:
            raise UserError(f"groups: {group}: leaves out {len(left_out)} of {len(names)} classes; leave out some")
        slug = re.sub(r"[^a-z0-9]+", "-", group.lower()).strip("-")
        lists = {}
        for title, classes in ((LEFT_OUT, left_out), (KEPT, kept)):
            file = Path(config.output) / "lists" / f"{slug}-{title.lower().replace(' ', '-')}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, "".join(f"{name}\n" for name in classes))
            lists[title] = str(file)
        runs[group] = RunSpec(config=config.train, settings={**config.settings, "data.class_names": lists[KEPT]})
        shared = {"class_lists": lists, "baselines": True}
        rows.append(RowSpec(name="prompts", section=group, run=group, evaluation=shared))
        rows.append(
            RowSpec(name="templates", section=group, run=group, evaluation=shared, method=f"template, {PAIRED}")
        )
        for weight in config.weights:
            blend = {**shared, "baselines": False, "evaluation.blend": "novelty", "evaluation.blend_weight": weight}
            rows.append(RowSpec(name=f"novelty blend, weight {weight:g}", section=group, run=group, evaluation=blend))
    return StudyConfig(
        title="Classes left out of the training",
        output=config.output,
        work=str(Path(config.output) / "work"),
        runs=runs,
        data_sets={title: DataSet(manifest=config.manifest, group=title) for title in (LEFT_OUT, KEPT)},
        rows=rows,
        metrics=["macro_auc", "map_ap"],
        columns=[],
        evaluation=config.evaluation,
        seeds=config.seeds,
        processes=config.processes,
    )


def _write_means(config: LeaveOutConfig, plan: StudyConfig) -> Path:
    """means.csv and means.md: each method's mean over groups and seeds."""
    results = table_of(plan, make_plan(plan), {}).results
    sets, metrics = (LEFT_OUT, KEPT), plan.metrics
    lines: list[list[str]] = []
    for name in dict.fromkeys(row.name for row in plan.rows):
        cells = []
        for data_set in sets:
            for metric in metrics:
                numbers = [r for r, row in enumerate(plan.rows) if row.name == name]
                values = [results[r, data_set, seed].values.get(metric) for r in numbers for seed in plan.seeds]
                known = [100 * value for value in values if value is not None]
                cells.append(f"{statistics.fmean(known):.1f}" if known else "–")
        lines.append([name, *cells])
    header = ["method", *(f"{data_set} {metric}" for data_set in sets for metric in metrics)]
    folder = Path(config.output)
    write_csv(folder / "means.csv", header, lines)
    rule = ["---", *("--:" for _ in header[1:])]
    text = "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *lines))
    groups = ", ".join(config.groups)
    write_text(folder / "means.md", f"Means over {len(config.groups)} groups ({groups}), in percent.\n\n{text}")
    log.info(f"{len(config.groups)} groups: {folder / 'means.md'}")
    return folder / "means.md"
