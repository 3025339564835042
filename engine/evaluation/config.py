"""Settings of an evaluation, as a typed dataclass; the command line reads them from YAML and dotted overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt

from ..config import BitDepth, EvaluationConfig, check_values, require
from ..data.cache.header import Header
from ..utils.errors import UserError
from ..utils.files import check_input, check_output, check_unused
from ..utils.names import HUB
from ..utils.packaged import located
from ..utils.plugins import load_plugins


@dataclass(kw_only=True)
class EvaluateConfig:
    """Score a labelled split and write metrics, tables, curves and a report.

    The scores come from exactly one source: checkpoint, clip, predictions, adapter, or one of your own.
    """

    checkpoint: str = ""
    """source: folder of a run of either phase, of an exported or imported model, or of a classifier, which scores the
    classes that it was frozen with, or hf-hub:OWNER/NAME; a CLIP of phase 1 is scored with the paper's fixed
    templates"""
    clip: str | None = None
    """source: open_clip model name, or JSON file in open_clip's format with its preprocess_cfg, scored with the paper's
    fixed templates"""
    clip_weights: str | None = None
    """weights file or open_clip tag of `clip`"""
    predictions: str | None = None
    """source: CSV file of probabilities made elsewhere, columns id and class names, as `predict` writes it; no image is
    read"""
    adapter: str | None = None
    """source: Python file with the functions load, preprocess and score of any model; its code is run"""
    other_source: dict[str, Any] = field(default_factory=dict)
    """source: name → value of a source of your own that has no setting here, see engine/evaluation/README.md"""
    plugins: str | list[str] = field(default_factory=list)
    """modules or Python files of your own, which are imported and may register what a model needs, sources or metrics;
    one or a list"""
    method: str | None = None
    """name of the method in the report; null: PsPG, CLIP fine-tuned, or the name of `clip` or of the file"""
    manifest: str = ""
    """labelled images (JSONL)"""
    output: str = ""
    """folder for the report"""
    overwrite: bool = False
    """replace the files of a report that is there; false: refuse"""
    image_root: str | None = None
    """folder that `filepath` is relative to; null: where `prepare` found the images, else the manifest's own folder"""
    label_names: str | None = None
    """text file with the names of the manifest's labels, in order; null: classes.txt beside the manifest"""
    class_lists: dict[str, str] | None = None
    """name → text file of class names; each list is prompted and reported by itself; null: one list of all labels"""
    frequencies: str | None = None
    """training manifest; the report then also has the classes by how often they are positive there, as groups head,
    medium and tail; null: no such groups"""
    head_above: ClosedUnitInterval = 0.1
    """share of positives above which a class is of the head"""
    tail_below: ClosedUnitInterval = 0.01
    """share of positives below which a class is of the tail"""
    uncertain: Literal["ignore", "zeros", "ones"] = "ignore"
    """what a label of -1 becomes"""
    blank: Literal["zeros", "ignore"] = "zeros"
    """what a null label becomes"""
    baselines: bool = True
    """score the (other) fixed templates of the same CLIP, too; predictions and adapters have none"""
    template_absences: Literal["turned", "literal"] = "turned"
    """sentences of the fixed templates about classes that are an absence, such as No Finding and normal. turned: "No
    evidence of abnormality." for it and "Findings suggesting abnormality." against it; literal: the name in the
    templates as it is, as in the paper, which reads "No evidence of No Finding." """
    probe: str | None = None
    """training manifest for two probes on the frozen image features of a checkpoint or clip: ridge on all labels, a
    ceiling, and, of a checkpoint of phase 2, the templates corrected by ridge on its training classes; null: none"""
    compare: dict[str, str] = field(default_factory=dict)
    """name → another method for the same report: folder of a run or model or hf-hub:OWNER/NAME, table of probabilities
    (.csv), or adapter (.py); it gets the differences of the method under evaluation from each, with paired intervals"""
    calibration: str | None = None
    """validation manifest, which neither trained nor tests the model: calibration and thresholds fitted on its images
    are shown on these; null: none. `pspg-engine calibrate` keeps such a fit with a model"""
    point: Literal["f1", "sensitivity", "specificity"] = "f1"
    """with calibration, what a class's threshold is chosen for: the best F1, or at least `target` of the other two"""
    target: ClosedUnitInterval = 0.9
    """sensitivity or specificity to reach"""
    gallery: NonNegativeInt = 0
    """images to show of each kind: hits, misses, false alarms and the most uncertain, with maps where the method is a
    prompt head; they are pictures of patients and show their ids. 0: none"""
    pictures: dict[str, str] = field(default_factory=dict)
    """caption → image file to show in the report; pictures of patients enter it only this way"""
    notes: list[str] = field(default_factory=list)
    """sentences to print at the top of the report"""
    title: str | None = None
    """heading of the report; null: the method's name and the word evaluation"""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    on_bad_image: Literal["error", "skip"] = "error"
    """stop at an unreadable image, or leave it out, count it and list it"""
    max_megapixels: PositiveFloat = 100
    """million pixels above which an image counts as unreadable; it guards the memory, 3 bytes for each of them: so
    fewer of colour, progressive JPEG and DICOM"""
    bit_depth: BitDepth | None = None
    """true depth of 16-bit PNGs, 8 to 16 bits; null: the smallest of 8, 10, 12, 14, 16 that holds an image's pixels,
    and images of which it could be a smaller one but for a few pixels are unreadable"""
    cache: str | None = None
    """folder of `pspg-engine prepare cache` that holds the images of the manifest (and of the probe's)"""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """dali decodes, resizes and augments on the GPU (on a CPU it works, too, but slower than torch); auto: dali on a
    GPU if it is installed, else torch"""
    workers: NonNegativeInt = 2
    """loader processes of each process; with dali also its decoding threads"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU, fp32 on a CPU"""
    timeout_s: PositiveInt = 600
    """seconds that a batch may take to load. Several processes: also seconds that they wait for one another, at the
    start and once one has scored its batches"""

    def find_files(self, folders: Sequence[Path]) -> None:
        """Set clip and adapter to where their files are: as given, in one of `folders`, or packaged."""
        self.clip = located(self.clip, folders, ".json")
        self.adapter = located(self.adapter, folders, ".py")


REPORT = ("metrics.json", "per_class.csv", "predictions.csv", "MODEL_CARD.md", "report.html")
"""files of a report"""
SOURCES = ("checkpoint", "clip", "predictions", "adapter")


def check_evaluate(config: EvaluateConfig) -> None:
    """Refuse, before torch is imported, what the settings alone and the presence of files can tell.

    Raises:
        UserError: naming the key and what to do.
    """
    load_plugins(config.plugins)
    given = [f"--{name}" for name in SOURCES if getattr(config, name)]
    given += [f"--{name}" for name in config.other_source]
    if len(given) != 1:
        one_of = ", ".join(f"--{name}" for name in SOURCES)
        raise UserError(f"give exactly one of {one_of}; got {' and '.join(given) or 'none'}")
    require(manifest=config.manifest, output=config.output)
    check_values(config)
    if config.tail_below > config.head_above:
        raise UserError(
            f"tail_below: {config.tail_below} is above head_above {config.head_above}; a class has one group"
        )
    check_output(config.output)
    check_unused(*(Path(config.output) / name for name in REPORT), overwrite=config.overwrite)
    check_input(manifest=config.manifest, checkpoint=config.checkpoint, image_root=config.image_root)
    cache = config.cache if config.checkpoint or config.clip else None  # else it is told that it does not go with it
    check_input(calibration=config.calibration, cache=cache)
    if cache is not None:
        Header.read(Path(cache))
    for name, place in config.compare.items():
        if not name.strip() or not (Path(place).exists() or place.startswith(HUB)):
            what = "no such file or folder; name a run, a model folder, a .csv or a .py" if name.strip() else "no name"
            raise UserError(f"compare: {name}: {place}: {what}")
    for name, file in (config.class_lists or {}).items():
        if not Path(file).is_file():
            raise UserError(f"class_lists: {name}: {file}: no such file; a list is a text file, one class a line")
    check_input(label_names=config.label_names)
