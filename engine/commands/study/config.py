"""Settings of `pspg-engine study` and `leave-out`: what a table is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeFloat, PositiveInt

from ...utils.packaged import located

Metric = Literal["macro_auc", "micro_auc", "map_ap", "map_trapezoid", "macro_f1", "macro_mcc"]
SOURCES = ("run", "checkpoint", "clip", "predictions", "adapter")
"""keys of a row, one of which names the source of its scores"""
Column = Literal["parameters", "memory", "step_time"]


@dataclass(kw_only=True)
class RunSpec:
    """A training run: a configuration of `pspg-engine train` and what is changed in it."""

    config: str | None = None
    """YAML file; null: the defaults"""
    settings: dict[str, Any] = field(default_factory=dict)
    """dotted key of `train` → value; ${data:NAME} and ${run:NAME} stand for folders of phantoms and of other runs"""
    seeded: bool = True
    """trained once for each of the study's seeds; false: once, with its own seed"""


@dataclass(kw_only=True)
class DataSet:
    """A labelled split that every row is evaluated on."""

    manifest: str
    """JSONL; ${data:NAME} stands for a folder of phantoms"""
    settings: dict[str, Any] = field(default_factory=dict)
    """keys of `evaluate` for this data set, such as label_names, class_lists, image_root"""
    group: str | None = None
    """class list whose metrics are shown; null: all classes"""


@dataclass(kw_only=True)
class RowSpec:
    """A row of the table: one method. Exactly one of run, checkpoint, clip, predictions, adapter; or none, where there
    are quoted numbers only."""

    name: str
    section: str = ""
    """heading that the row stands under"""
    run: str | None = None
    """name of a run: phase 2's prompts, or phase 1's CLIP with the paper's templates"""
    checkpoint: str | None = None
    """a model folder that exists already"""
    clip: str | None = None
    """any CLIP with the paper's templates: open_clip name or JSON file; its weights go into `evaluation`"""
    predictions: dict[str, str] | None = None
    """data set → CSV of probabilities made elsewhere"""
    adapter: str | None = None
    """Python file that scores images with a foreign model"""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """dotted key of `evaluate` → value, for this row"""
    method: str | None = None
    """which method of the evaluation is shown, such as a baseline's name or the probe's; null: the row's own"""
    home: list[str] = field(default_factory=list)
    """data sets of the domain that it was trained on last, marked with *"""
    quoted: dict[str, list[float]] = field(default_factory=dict)
    """data set → a paper's numbers in percent, in the order of `metrics`; shown beside, marked as quoted"""

    @property
    def measured(self) -> bool:
        """There is something to run."""
        return any(getattr(self, source) is not None for source in SOURCES)


@dataclass(kw_only=True)
class StudyConfig:
    """Run what a table compares and write the table: CSV, Markdown, HTML. Run again, it does what is missing."""

    title: str = ""
    """heading of the table"""
    output: str = ""
    """folder of the table"""
    work: str = "runs/studies"
    """folder of data, runs and evaluations; studies share it, so that equal runs are trained once"""
    notes: list[str] = field(default_factory=list)
    """sentences under the heading, such as that phantoms are no clinical data"""
    phantoms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """name → settings of `phantom`: data to draw first"""
    runs: dict[str, RunSpec] = field(default_factory=dict)
    data_sets: dict[str, DataSet] = field(default_factory=dict)
    rows: list[RowSpec] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=lambda: ["macro_auc", "micro_auc", "map_ap"])
    columns: list[Column] = field(default_factory=lambda: ["parameters", "memory", "step_time"])
    """what is shown of the training: trainable parameters, peak memory, seconds a step"""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """dotted key of `evaluate` → value, for every row"""
    intervals: bool = False
    """show intervals in Markdown and HTML, too (the CSV always has them): bootstrap with one seed, else of the seeds"""
    seeds: list[int] = field(default_factory=lambda: [0])
    """seeds of the runs; with several, cells are means over them with the 95 % interval of the mean"""
    processes: PositiveInt = 1
    """processes of each training run and evaluation, by torchrun on this machine: the number of its GPUs"""
    quoted: bool = True
    """show the quoted numbers"""

    def find_files(self, folders: Sequence[Path]) -> None:
        """Set the files of runs and rows to where they are: as given, in one of `folders`, or packaged."""
        for run in self.runs.values():
            run.config = located(run.config, folders)
        for row in self.rows:
            row.clip = located(row.clip, folders, ".json")
            row.adapter = located(row.adapter, folders, ".py")


@dataclass(kw_only=True)
class LeaveOutConfig:
    """Train once for each group of classes without it, and score it zero-shot. Run again, it does what is missing.

    Evaluated on validation images, it chooses the weight of the novelty blend without a test image.
    """

    train: str = ""
    """YAML file of phase 2"""
    settings: dict[str, Any] = field(default_factory=dict)
    """dotted key of `train` → value, such as data.train and model.pretrained"""
    class_names: str | list[str] = ""
    """the training classes: a list or a text file"""
    groups: dict[str, list[str]] = field(default_factory=dict)
    """name → training classes that are left out together, such as all names of one finding"""
    manifest: str = ""
    """labelled images to evaluate on"""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """dotted key of `evaluate` → value"""
    output: str = ""
    """folder of runs, evaluations and tables"""
    weights: list[NonNegativeFloat] = field(default_factory=lambda: [1.0, 2.0, 4.0, 8.0])
    """weights of the novelty blend to compare"""
    seeds: list[int] = field(default_factory=lambda: [0])
    processes: PositiveInt = 1
    """processes of each training run and evaluation, by torchrun on this machine"""

    def find_files(self, folders: Sequence[Path]) -> None:
        """Set train to where it is: as given, in one of `folders`, or packaged."""
        self.train = located(self.train, folders) or ""
