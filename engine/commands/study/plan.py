"""The steps of a study in order, with every reference resolved; nothing is run here."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import check_values, require
from ...utils.errors import UserError
from ...utils.packaged import near_names
from .config import SOURCES, RowSpec, StudyConfig

REFERENCE = re.compile(r"\$\{(data|run):([^}]*)\}")


@dataclass(frozen=True)
class Step:
    """One command of `pspg-engine` that fills a folder."""

    command: str
    """phantom, train or evaluate"""
    title: str
    folder: Path
    settings: Mapping[str, Any]
    """dotted key → value, without the output"""
    config: str | None = None
    needs: tuple[Step, ...] = ()

    def words(self) -> list[str]:
        """The command line."""
        words = [self.command]
        if self.config is not None:
            words += ["--config", self.config]
        for key, value in {**self.settings, "output": str(self.folder)}.items():
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        return words


@dataclass(frozen=True)
class Cell:
    """A row on a data set, trained with one seed."""

    row: int
    data_set: str
    seed: int
    evaluation: Step
    training: Step | None = None


@dataclass
class Plan:
    """Cells in the order of the rows, and the steps in the order in which they run."""

    cells: list[Cell] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def add(self, step: Step) -> None:
        """A step after those that it needs; one a folder."""
        for needed in step.needs:
            self.add(needed)
        if step.folder not in {known.folder for known in self.steps}:
            self.steps.append(step)


def make_plan(study: StudyConfig) -> Plan:
    """Everything that a study runs.

    Raises:
        UserError: a setting that cannot be, an unknown name, or runs that need each other.
    """
    _check(study)
    resolve = _Resolver(study)
    plan = Plan()
    for number, row in enumerate(study.rows):
        for seed in study.seeds if row.measured else ():
            for name in study.data_sets:
                cell = resolve.cell(number, row, name, seed)
                plan.cells.append(cell)
                plan.add(cell.evaluation)
    return plan


def _check(study: StudyConfig) -> None:
    check_values(study)
    require(title=study.title, output=study.output, work=study.work)
    for key in ("rows", "data_sets", "metrics", "seeds"):
        if not getattr(study, key):
            raise UserError(f"{key}: is required; a study needs one at least")
    if len(set(study.seeds)) < len(study.seeds):
        raise UserError(f"seeds: must differ, got {study.seeds}")
    for number, row in enumerate(study.rows, 1):
        where = f"rows: number {number} ({row.name!r})"
        given = [source for source in SOURCES if getattr(row, source) is not None]
        if len(given) > 1 or not (given or row.quoted):
            raise UserError(f"{where} needs one of {', '.join(SOURCES)}; it has {' and '.join(given) or 'none'}")
        if row.run is not None and row.run not in study.runs:
            raise UserError(f"{where}: runs has no {row.run!r}")
        if row.predictions is not None and row.predictions.keys() != study.data_sets.keys():
            raise UserError(f"{where}: predictions must name a file for each of {', '.join(study.data_sets)}")
        for name in (*row.home, *row.quoted):
            if name not in study.data_sets:
                raise UserError(f"{where}: data_sets has no {name!r}")
        for name, numbers in row.quoted.items():
            if len(numbers) != len(study.metrics):
                raise UserError(f"{where}: quoted {name} has {len(numbers)} numbers for {len(study.metrics)} metrics")
    for (section, name), count in Counter((row.section, row.name) for row in study.rows).items():
        if count > 1:
            raise UserError(f"rows: {name!r} is there {count} times in one section ({section!r})")


class _Resolver:
    """Turns the names of runs and data into steps."""

    def __init__(self, study: StudyConfig) -> None:
        self._study = study
        self._open: list[str] = []

    def cell(self, number: int, row: RowSpec, name: str, seed: int) -> Cell:
        data = self._study.data_sets[name]
        settings = {**self._study.evaluation, **data.settings, **row.evaluation, "manifest": data.manifest}
        training = None
        if row.run is not None:
            training = self._run(row.run, seed)
            settings["checkpoint"] = str(training.folder)
        elif row.predictions is not None:
            settings["predictions"] = row.predictions[name]
        else:
            source = next(source for source in SOURCES if getattr(row, source) is not None)
            settings[source] = getattr(row, source)
        found, needs = self._replace(settings, seed, f"rows: {row.name!r}")
        needs = needs if training is None else (*needs, training)
        # Not after the data set: several class lists of one split are one evaluation.
        folder = self._folder("evaluations", f"{row.section} {row.name}", found)
        seeds = f", seed {seed}" if training is not None and len(self._study.seeds) > 1 else ""
        return Cell(
            number, name, seed, Step("evaluate", f"{row.name} on {name}{seeds}", folder, found, needs=needs), training
        )

    def _run(self, name: str, seed: int) -> Step:
        if name not in self._study.runs:
            raise UserError(f"runs: there is no {name!r}")
        if name in self._open:
            raise UserError(f"runs: {' needs '.join([*self._open, name])}; a run cannot need itself")
        run = self._study.runs[name]
        if "output" in run.settings:
            raise UserError(f"runs: {name}: output is chosen by the study; leave it out")
        self._open.append(name)
        settings, needs = self._replace(run.settings, seed, f"runs: {name}")
        self._open.pop()
        if run.seeded:
            settings["seed"] = seed
        content = ""
        if run.config is not None:
            try:
                content = Path(run.config).read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                reason = f"cannot be read ({error}){near_names(run.config)}"
                raise UserError(f"runs: {name}: config: {run.config}: {reason}") from None
        folder = self._folder("runs", name, [content, settings])
        title = f"{name}, seed {seed}" if run.seeded else name
        return Step("train", title, folder, settings, run.config, needs)

    def _data(self, name: str) -> Step:
        if name not in self._study.phantoms:
            raise UserError(f"phantoms: there is no {name!r}")
        settings = self._study.phantoms[name]
        return Step("phantom", name, self._folder("data", name, settings), settings)

    def _replace(self, settings: Mapping[str, Any], seed: int, where: str) -> tuple[dict[str, Any], tuple[Step, ...]]:
        """Settings without references, and the steps that were referred to."""
        needs: list[Step] = []

        def folder(match: re.Match[str]) -> str:
            kind, name = match.groups()
            step = self._data(name) if kind == "data" else self._run(name, seed)
            needs.append(step)
            return str(step.folder)

        def walk(value: Any) -> Any:
            if isinstance(value, str):
                if "${" in REFERENCE.sub("", value):
                    raise UserError(f"{where}: {value!r}: write ${{data:NAME}} or ${{run:NAME}}")
                return REFERENCE.sub(folder, value)
            if isinstance(value, Mapping):
                return {key: walk(one) for key, one in value.items()}
            return [walk(one) for one in value] if isinstance(value, list) else value

        return walk(settings), tuple(needs)

    def _folder(self, kind: str, name: str, content: Any) -> Path:
        """A folder named after the settings, so that other settings never find the results of older ones."""
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        return Path(self._study.work, kind, f"{slug}-{digest}")
