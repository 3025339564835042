"""Settings of the commands that are one function, and what can be refused before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ..config import BitDepth, BlendName, check_values, require
from ..utils.errors import UserError
from ..utils.files import check_input, check_names, check_new_folder, check_output, check_unused
from ..utils.plugins import load_plugins


@dataclass(kw_only=True)
class PredictConfig:
    """Score images (PNG, JPEG, DICOM) and write a table of probabilities."""

    checkpoint: str = ""
    """folder of a phase-2 run, of an exported or imported model, or of a classifier; or hf-hub:OWNER/NAME"""
    input: str = ""
    """an image, a folder of images, or a manifest (.jsonl)"""
    output: str = "predictions.csv"
    """CSV file: one image a line, one class a column"""
    overwrite: bool = False
    """replace an output that is there; false: refuse. A folder of maps is always a new one"""
    plugins: str | list[str] = field(default_factory=list)
    """modules or Python files of your own, which are imported and may register what a model needs;
    one or a list"""
    class_names: str | list[str] | None = None
    """classes to score, trained on or not: a list or a text file; null: those of the training. A classifier has its
    frozen ones, or some of them"""
    image_root: str | None = None
    """for a manifest: folder that `filepath` is relative to; null: where `prepare` found the images, else the
    manifest's own folder"""
    context: Literal["bank", "batch"] = "bank"
    """what the prompts attend to; bank makes a score independent of the other images"""
    blend: BlendName | None = None
    """add the paper's templates to the prompts' log-odds. novelty: the more, the less a class name is like those of the
    training classes, which stay as they are; fixed: alike for all; none: prompts alone, the paper; null: novelty. A
    classifier has the blend that it was frozen with"""
    blend_weight: NonNegativeFloat | None = None
    """weight of the templates; null: 4 for novelty, 1 for fixed"""
    calibrated: bool = True
    """use the model's calibration where it has one for these classes and this blend, and add a column of the classes
    above their thresholds; false: the model's own probabilities alone"""
    maps: str | None = None
    """new folder for pictures of where: a PNG an image, with a panel a class that shows at which places the image is
    more like the class's positive prompt than its negative one; null: none"""
    map_classes: str | list[str] | None = None
    """classes to draw, some of those scored: a list or a text file; null: all"""
    map_threshold: ClosedUnitInterval | None = None
    """draw only classes that the image has with at least this probability; null: whatever it is"""
    batch_size: PositiveInt = 64
    """images a batch"""
    on_bad_image: Literal["error", "skip"] = "skip"
    """stop at an unreadable image, or leave it out, count it and list it"""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """dali decodes, resizes and augments on the GPU (on a CPU it works, too, but slower than torch); auto: dali on a
    GPU if it is installed, else torch"""
    max_megapixels: PositiveFloat = 100
    """million pixels above which an image counts as unreadable; it guards the memory, 3 bytes for each of them: so
    fewer of colour, progressive JPEG and DICOM"""
    bit_depth: BitDepth | None = None
    """true depth of 16-bit PNGs, 8 to 16 bits; null: the smallest of 8, 10, 12, 14, 16 that holds an image's pixels,
    and images of which it could be a smaller one but for a few pixels are unreadable"""
    workers: NonNegativeInt = 2
    """loader processes; with dali also its decoding threads"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU, fp32 on a CPU"""


@dataclass(kw_only=True)
class CalibrateConfig:
    """Fit a model's probabilities and the thresholds of its classes on validation images, and keep both with it.

    Predict and exported classifiers then use them. The order of a class's scores, and so its AUC, does not change.
    """

    checkpoint: str = ""
    """folder of a phase-2 run, of an exported or imported model, or of a classifier; calibration.json is written to
    it. Of hf-hub:OWNER/NAME, this machine's copy"""
    plugins: str | list[str] = field(default_factory=list)
    """modules or Python files of your own, which are imported and may register what a model needs; one or a list"""
    manifest: str = ""
    """labelled validation images (JSONL), none of them trained or tested on"""
    point: Literal["f1", "sensitivity", "specificity"] = "f1"
    """what a class's threshold is chosen for: the best F1, or at least `target` of sensitivity or specificity"""
    target: ClosedUnitInterval = 0.9
    """sensitivity or specificity to reach"""
    method: Literal["platt", "temperature"] = "platt"
    """platt: probability = sigmoid(slope * log-odds + intercept); temperature: slope alone"""
    groups: dict[str, str] | None = None
    """name → text file of class names that share slope and intercept; null, and for classes in no file: one group a
    class, and one for all classes with few positives"""
    min_positives: PositiveInt = 10
    """positives, and negatives, from which a class is fitted by itself"""
    class_names: str | list[str] | None = None
    """classes to score, trained on or not: a list or a text file; null: those of the training. Of a classifier its
    frozen ones are calibrated"""
    label_names: str | None = None
    """text file with the names of the manifest's labels, in order; null: classes.txt beside the manifest"""
    image_root: str | None = None
    """folder that `filepath` is relative to; null: where `prepare` found the images, else the manifest's own folder"""
    uncertain: Literal["ignore", "zeros", "ones"] = "ignore"
    """what a label of -1 becomes"""
    blank: Literal["zeros", "ignore"] = "zeros"
    """what a null label becomes"""
    blend: BlendName | None = None
    """as in predict, which uses a calibration only under the blend that it was fitted with; null: novelty"""
    blend_weight: NonNegativeFloat | None = None
    """weight of the templates; null: 4 for novelty, 1 for fixed"""
    batch_size: PositiveInt = 64
    """images a batch"""
    on_bad_image: Literal["error", "skip"] = "error"
    """stop at an unreadable image, or leave it out, count it and list it"""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """dali decodes, resizes and augments on the GPU; auto: dali on a GPU if it is installed, else torch"""
    max_megapixels: PositiveFloat = 100
    """million pixels above which an image counts as unreadable; it guards the memory"""
    bit_depth: BitDepth | None = None
    """true depth of 16-bit PNGs, 8 to 16 bits; null: as in predict"""
    workers: NonNegativeInt = 2
    """loader processes; with dali also its decoding threads"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU, fp32 on a CPU"""


@dataclass(kw_only=True)
class ImportConfig:
    """Turn a checkpoint of the authors' code (.pth, .safetensors) into a model folder."""

    source: str = ""
    """weights in the published layout; nothing in them is executed"""
    class_names: str | list[str] = ""
    """the classes it was trained on, in order: a list or a text file"""
    output: str = ""
    """new model folder"""
    class_feature_weights: str | None = None
    """the original CLIP's weights, which the published code computes class features with; null: the checkpoint's own"""
    prompt_length: PositiveInt = 16
    """n, where the file does not say it"""
    decoder_heads: PositiveInt = 8
    """attention heads, where the file does not say them"""
    prefix: bool = False
    """the checkpoint generates prefixes"""
    mean: ClosedUnitInterval | None = None
    """pixel mean in [0, 1] of the training images; null: what the file says, else the authors' 0.5306"""
    std: PositiveFloat | None = None
    """pixel standard deviation of the training images; null: what the file says, else the authors' 0.2327"""


@dataclass(kw_only=True)
class ExportConfig:
    """Write the best weights of a run as a self-contained model folder, in the published layout, or as a classifier."""

    checkpoint: str = ""
    """run or model folder, or hf-hub:OWNER/NAME"""
    output: str = ""
    """new folder"""
    layout: Literal["pspg-engine", "published", "classifier"] = "pspg-engine"
    """pspg-engine: what evaluate and predict read; published: one safetensors file with the authors' names; classifier:
    a fixed class list, prompted once under the context bank, and the towers as open_clip loads them"""
    plugins: str | list[str] = field(default_factory=list)
    """modules or Python files of your own, which are imported and may register what a model needs;
    one or a list"""
    class_names: str | list[str] | None = None
    """layout classifier: classes to freeze, trained on or not: a list or a text file; null: those of the training"""
    blend: BlendName | None = None
    """layout classifier: add the paper's templates to the prompts' log-odds, as predict does; null: novelty"""
    blend_weight: NonNegativeFloat | None = None
    """layout classifier: weight of the templates; null: 4 for novelty, 1 for fixed"""


@dataclass(kw_only=True)
class CheckConfig:
    """Decode every image of one or more manifests, list those that cannot be used, and tell copies of one image; or
    verify a cache of them."""

    manifest: str | list[str] = ""
    """manifest (JSONL), or a list of them"""
    cache: str | None = None
    """verify this cache instead of the files: checksums, that it holds every image, and that no source changed"""
    image_root: str | None = None
    """folder that `filepath` is relative to; null: where `prepare` found the images, else each manifest's own
    folder"""
    output: str | None = None
    """also list the unusable images, and the copies of others, in this file, .csv or .jsonl"""
    overwrite: bool = False
    """replace an output that is there; false: refuse"""
    max_megapixels: PositiveFloat = 100
    """million pixels above which an image counts as unreadable; it guards the memory, 3 bytes for each of them: so
    fewer of colour, progressive JPEG and DICOM"""
    bit_depth: BitDepth | None = None
    """true depth of 16-bit PNGs, 8 to 16 bits; null: the smallest of 8, 10, 12, 14, 16 that holds an image's pixels,
    and images of which it could be a smaller one but for a few pixels are unreadable"""
    workers: PositiveInt = 2
    """decoding processes"""


@dataclass(kw_only=True)
class CacheConfig:
    """Decode, window and resize the images once, so that training reads pixels. Run again, it goes on or adds."""

    manifest: str | list[str] = ""
    """manifest (JSONL), or a list of them"""
    output: str = ""
    """folder of the cache; one that is there already keeps its images"""
    image_root: str | None = None
    """folder that `filepath` is relative to; null: where `prepare` found the images, else each manifest's own
    folder"""
    image_size: PositiveInt = 224
    """side of the square, pixels, as data.image_size of the training"""
    resize: Literal["stretch", "pad"] = "stretch"
    """stretch to the square (the paper), or keep the aspect ratio and pad with black"""
    on_bad_image: Literal["error", "skip"] = "error"
    """stop at an unreadable image, or keep it as unreadable; training then does what its own on_bad_image says"""
    max_megapixels: PositiveFloat = 100
    """million pixels above which an image counts as unreadable; it guards the memory, 3 bytes for each of them: so
    fewer of colour, progressive JPEG and DICOM"""
    bit_depth: BitDepth | None = None
    """true depth of 16-bit PNGs, 8 to 16 bits; null: the smallest of 8, 10, 12, 14, 16 that holds an image's pixels,
    and images of which it could be a smaller one but for a few pixels are unreadable"""
    workers: PositiveInt = 2
    """decoding processes"""


def check_predict(config: PredictConfig) -> None:
    """Refuse what the settings alone and the presence of files can tell.

    Raises:
        UserError: naming the key and what to do.
    """
    load_plugins(config.plugins)
    check_values(config)
    require(checkpoint=config.checkpoint, input=config.input, output=config.output)
    check_output(config.output, folder=False)
    if Path(config.output).suffix.lower() in (".png", ".jpg", ".jpeg", ".dcm", ".dicom", ".jsonl"):
        raise UserError(
            f"output: {config.output} has the name of an image or a manifest; it is a table, end it in .csv"
        )
    _check_spared(config.output, config.input)
    check_unused(config.output, overwrite=config.overwrite)
    check_input(checkpoint=config.checkpoint, input=config.input, image_root=config.image_root)
    check_names(class_names=config.class_names, map_classes=config.map_classes)
    if config.maps is not None:
        check_new_folder(config.maps, key="maps")
    elif config.map_classes is not None or config.map_threshold is not None:
        key = "map_classes" if config.map_classes is not None else "map_threshold"
        raise UserError(f"{key}: needs maps, the folder to draw to; give --maps")


def check_calibrate(config: CalibrateConfig) -> None:
    """As `check_predict`."""
    load_plugins(config.plugins)
    check_values(config)
    require(checkpoint=config.checkpoint, manifest=config.manifest)
    check_input(checkpoint=config.checkpoint, manifest=config.manifest, image_root=config.image_root)
    for name, file in (config.groups or {}).items():
        if not Path(file).is_file():
            raise UserError(f"groups.{name}: {file}: no such file; name a text file of class names, one a line")


def check_import(config: ImportConfig) -> None:
    """As `check_predict`."""
    check_values(config)
    require(source=config.source, output=config.output)
    if not config.class_names:
        raise UserError("class_names: give the classes the checkpoint was trained on, in order (a list or a text file)")
    check_new_folder(config.output)
    check_input(source=config.source)
    check_names(class_names=config.class_names)


def check_export(config: ExportConfig) -> None:
    """As `check_predict`."""
    load_plugins(config.plugins)
    check_values(config)
    require(checkpoint=config.checkpoint, output=config.output)
    if config.class_names is not None and config.layout != "classifier":
        raise UserError("class_names: only layout classifier freezes classes; the others score any")
    if (config.blend is not None or config.blend_weight is not None) and config.layout != "classifier":
        key = "blend" if config.blend is not None else "blend_weight"
        raise UserError(f"{key}: only layout classifier freezes a blend; evaluate and predict have it as a setting")
    check_new_folder(config.output)
    check_input(checkpoint=config.checkpoint)
    check_names(class_names=config.class_names)


def check_images(config: CheckConfig) -> None:
    """As `check_predict`."""
    _check_manifests(config)
    if config.output is not None:
        check_output(config.output, folder=False)
        if Path(config.output).suffix not in (".csv", ".jsonl"):
            raise UserError(f"output: {config.output} must end in .csv or .jsonl")
        _check_spared(config.output, *([config.manifest] if isinstance(config.manifest, str) else config.manifest))
        check_unused(config.output, overwrite=config.overwrite)


def check_cache(config: CacheConfig) -> None:
    """As `check_predict`."""
    _check_manifests(config)
    require(output=config.output)
    check_output(config.output)


def _check_spared(output: str, *inputs: str) -> None:
    """Refuse to write over what is read."""
    for path in inputs:
        if Path(output).is_file() and Path(path).is_file() and Path(output).samefile(path):
            raise UserError(f"output: {output} is the input; choose another name")


def _check_manifests(config: CheckConfig | CacheConfig) -> None:
    check_values(config)
    require(manifest="".join(config.manifest))
    for path in [config.manifest] if isinstance(config.manifest, str) else config.manifest:
        check_input(manifest=path)
    check_input(image_root=config.image_root)
