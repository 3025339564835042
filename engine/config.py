"""Every setting of a run, as typed dataclasses; `cli.py` reads them from YAML and dotted overrides."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from .utils.errors import UserError
from .utils.registry import choices

FractionBelowOne: TypeAlias = float
Seed: TypeAlias = int
DecoderName: TypeAlias = str
FusionName: TypeAlias = str
ClassificationLossName: TypeAlias = str
PairLossName: TypeAlias = str
if not TYPE_CHECKING:
    FractionBelowOne = restricted_number_type("FractionBelowOne", float, [(">=", 0), ("<", 1)])
    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**63)])
    # A setting's values are the files of a folder, so that whoever adds one edits no list. Nothing is imported.
    _ENGINE = Path(__file__).parent
    DecoderName = Literal[choices(_ENGINE / "models/decoders")]
    FusionName = Literal[choices(_ENGINE / "models/fusions")]
    ClassificationLossName = Literal[choices(_ENGINE / "training/losses/classification")]
    PairLossName = Literal[choices(_ENGINE / "training/losses/pair")]


@dataclass(kw_only=True)
class ModelConfig:
    """CLIP backbone, prompt decoder and spatial fusion (letters of the paper: n, H, D)."""

    backbone: str = "RN50"
    """open_clip model name, or the path of a JSON file in open_clip's model-config format"""
    pretrained: str | None = None
    """open_clip tag (such as openai), a weights file, or the folder of a phase-1 run; null: random weights"""
    pretrained_head: str | None = None
    """phase 2: folder of a phase-2 run or an exported model whose trained prompt head to start from, whatever classes
    it was trained on (the paper's cross-dataset training); null: a fresh one"""
    quick_gelu: bool = True
    """QuickGELU activations, as OpenAI's weights need; false: what the open_clip configuration says"""
    decoder: DecoderName = "gru"
    """what writes the prompts (paper, table 3); gru is the paper's, mlp writes all vectors at once. context: nothing
    does; a positive and a negative sequence of n learned vectors, shared by all classes, stand before the class name,
    whatever prefix says (with fusion regions the baseline DualCoOp)"""
    context_init: Literal["random", "template"] = "random"
    """context: what its vectors start from. random: normal of deviation 0.02; template: the tokens of "Findings
    suggesting" and "No evidence of" right before the class name, the places before them random"""
    prompts: Literal["dual", "shared", "positive"] = "dual"
    """dual: a decoder for positive and one for negative prompts; shared: one decoder with an output projection for
    each; positive: positive prompts only, the probability is the sigmoid of their logit"""
    prompt_length: PositiveInt = 16
    """n, generated prompt vectors a class"""
    hidden_size: PositiveInt = 512
    """H, decoder hidden width"""
    decoder_heads: PositiveInt = 8
    """attention heads of the prompt decoder"""
    dropout: FractionBelowOne = 0.2
    """dropout on the decoder outputs; mlp and context have none"""
    drop_path: FractionBelowOne = 0.1
    """transformer: probability of dropping a residual branch of its last block in training"""
    prefix: bool = False
    """generate a prefix that stands before the class name instead of the whole prompt"""
    fusion: FusionName = "gate_after_norm"
    """how global and local image tokens are fused; gate_before_norm is the published order, whose gate cancels.
    regions: DualCoOp's, each class weighs the local tokens by itself; neither gate nor temperature train, and spcl and
    pcl, which compare pairs of classes with one vector an image, do not go with it"""


@dataclass(kw_only=True)
class DataConfig:
    """Where the images and labels are, and what is done to the pixels."""

    train: str = ""
    """training manifest (JSONL)"""
    val: str | None = None
    """validation manifest; picks the best epoch"""
    image_root: str | None = None
    """folder that `filepath` is relative to; null: the manifest's own folder"""
    label_names: str | None = None
    """text file, one class name a line, in the order of the label lists; null: classes.txt beside the manifest"""
    class_names: str | list[str] | None = None
    """classes to train on, a subset of label_names: a list or a text file; null: all"""
    uncertain: Literal["ignore", "zeros", "ones"] = "ignore"
    """what a label of -1 becomes"""
    blank: Literal["zeros", "ignore"] = "zeros"
    """what a null label becomes"""
    image_size: PositiveInt = 224
    """side of the square input, pixels"""
    resize: Literal["stretch", "pad"] = "stretch"
    """stretch to the square (the paper), or keep the aspect ratio and pad with black"""
    mean: ClosedUnitInterval | None = None
    """pixel mean in [0, 1]; null: the backbone's if it carries one, else measured on the training images"""
    std: PositiveFloat | None = None
    """pixel standard deviation, likewise"""
    augment: bool = True
    """two of four random augmentations (paper A.2)"""
    flip: ClosedUnitInterval = 0.5
    """probability of a horizontal flip; set 0 where class names carry a side"""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """dali decodes, resizes and augments on the GPU (on a CPU it works, too, but slower than torch); auto: dali on a
    GPU if it is installed, else torch"""
    workers: NonNegativeInt = 2
    """loader processes; with dali also its decoding threads"""
    on_bad_image: Literal["error", "skip"] = "error"
    """stop at an unreadable image, or leave it out, count it and list it"""
    max_megapixels: PositiveFloat = 100
    """million pixels above which an image counts as unreadable; it guards the memory"""
    cache: str | None = None
    """folder of `pspg-engine prepare cache` that holds the images of both manifests; null: decode the files"""
    cache_features: bool = False
    """phase 2: run the frozen image tower once and keep its features in memory; needs augment false"""


@dataclass(kw_only=True)
class LossConfig:
    """Phase 2's loss. The preset fills nulls: paper = ASL + SPCL, sums; published = 0.1 ASL (sum) + SPCL (mean)."""

    preset: Literal["paper", "published"] = "paper"
    classification: ClassificationLossName = "asl"
    pair: PairLossName = "spcl"
    """pair loss: batch-level co-occurrence, sample-level co-occurrence, multi-label margin, or none"""
    pair_samples: NonNegativeInt = 0
    """spcl, pcl: estimate the loss from all positive pairs and this many others a class, for vocabularies beyond a few
    hundred classes; unbiased, and the cost grows with C instead of C²; 0: all pairs"""
    classification_weight: NonNegativeFloat | None = None
    classification_reduction: Literal["sum", "mean"] | None = None
    pair_weight: NonNegativeFloat | None = None
    pair_reduction: Literal["sum", "mean"] | None = None
    gamma_positive: NonNegativeFloat = 1.0
    gamma_negative: NonNegativeFloat = 2.0
    clip: ClosedUnitInterval = 0.05
    """probability shift of the asymmetric loss"""


@dataclass(kw_only=True)
class EvaluationConfig:
    """How scores and metrics are computed."""

    context: Literal["batch", "bank"] = "batch"
    """what the prompts attend to: the images of the batch (the paper) or a fixed bank of training images"""
    batch_size: PositiveInt = 64
    """images a batch; under context=batch it changes the scores, so it is recorded with them"""
    bank_size: PositiveInt = 64
    """training images in the bank that a checkpoint keeps"""
    bootstrap: NonNegativeInt = 1000
    """resamples of the 95 % confidence intervals; 0: none"""
    threshold: ClosedUnitInterval = 0.5
    """probability above which F1 and MCC count a class as predicted"""
    seed: Seed = 0


@dataclass(kw_only=True)
class EvaluateConfig:
    """Score a labelled split and write metrics, tables, curves and a report.

    The scores come from exactly one source: checkpoint, clip, predictions or adapter.
    """

    checkpoint: str = ""
    """source: folder of a run of either phase, or of an exported or imported model; a CLIP of phase 1 is scored with
    the paper's fixed templates"""
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
    method: str | None = None
    """name of the method in the report; null: PsPG, CLIP fine-tuned, or the name of `clip` or of the file"""
    manifest: str = ""
    """labelled images (JSONL)"""
    output: str = ""
    """folder for the report"""
    image_root: str | None = None
    """folder that `filepath` is relative to; null: the manifest's own folder"""
    label_names: str | None = None
    """text file with the names of the manifest's labels, in order; null: classes.txt beside the manifest"""
    class_lists: dict[str, str] | None = None
    """name → text file of class names; each list is prompted and reported by itself; null: one list of all labels"""
    uncertain: Literal["ignore", "zeros", "ones"] = "ignore"
    """what a label of -1 becomes"""
    blank: Literal["zeros", "ignore"] = "zeros"
    """what a null label becomes"""
    baselines: bool = True
    """score the (other) fixed templates of the same CLIP, too; predictions and adapters have none"""
    probe: str | None = None
    """training manifest for a ridge probe on the frozen image features of a checkpoint or clip, a ceiling; null:
    none"""
    pictures: dict[str, str] = field(default_factory=dict)
    """caption → image file to show in the report; pictures of patients enter it only this way"""
    notes: list[str] = field(default_factory=list)
    """sentences to print at the top of the report"""
    title: str | None = None
    """heading of the report; null: the method's name and the word evaluation"""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    on_bad_image: Literal["error", "skip"] = "error"
    """stop at an unreadable image, or leave it out, count it and list it"""
    max_megapixels: float = 100
    """million pixels above which an image counts as unreadable; it guards the memory"""
    cache: str | None = None
    """folder of `pspg-engine prepare cache` that holds the images of the manifest (and of the probe's)"""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """dali decodes, resizes and augments on the GPU (on a CPU it works, too, but slower than torch); auto: dali on a
    GPU if it is installed, else torch"""
    workers: int = 2
    """loader processes of each process; with dali also its decoding threads"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU, fp32 on a CPU"""
    timeout_s: int = 600
    """several processes: seconds that they wait for one another, at the start and once one has scored its batches"""


@dataclass(kw_only=True)
class PredictConfig:
    """Score images (PNG, JPEG, DICOM) and write a table of probabilities."""

    checkpoint: str = ""
    """folder of a phase-2 run, of an exported or imported model, or of a classifier"""
    input: str = ""
    """an image, a folder of images, or a manifest (.jsonl)"""
    output: str = "predictions.csv"
    """CSV file: one image a line, one class a column"""
    class_names: str | list[str] | None = None
    """classes to score, trained on or not: a list or a text file; null: those of the training. A classifier has its
    frozen ones, or some of them"""
    image_root: str | None = None
    """for a manifest: folder that `filepath` is relative to; null: the manifest's own folder"""
    context: Literal["bank", "batch"] = "bank"
    """what the prompts attend to; bank makes a score independent of the other images"""
    maps: str | None = None
    """new folder for pictures of where: a PNG an image, with a panel a class that shows at which places the image is
    more like the class's positive prompt than its negative one; null: none"""
    map_classes: str | list[str] | None = None
    """classes to draw, some of those scored: a list or a text file; null: all"""
    map_threshold: float | None = None
    """draw only classes that the image has with at least this probability; null: whatever it is"""
    batch_size: int = 64
    """images a batch"""
    on_bad_image: Literal["error", "skip"] = "skip"
    """stop at an unreadable image, or leave it out, count it and list it"""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """dali decodes, resizes and augments on the GPU (on a CPU it works, too, but slower than torch); auto: dali on a
    GPU if it is installed, else torch"""
    max_megapixels: float = 100
    """million pixels above which an image counts as unreadable; it guards the memory"""
    workers: int = 2
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
    prompt_length: int = 16
    """n, where the file does not say it"""
    decoder_heads: int = 8
    """attention heads, where the file does not say them"""
    prefix: bool = False
    """the checkpoint generates prefixes"""
    mean: float | None = None
    """pixel mean in [0, 1] of the training images; null: what the file says, else 0.5"""
    std: float | None = None
    """pixel standard deviation of the training images; null: what the file says, else 0.25"""


@dataclass(kw_only=True)
class ExportConfig:
    """Write the best weights of a run as a self-contained model folder, in the published layout, or as a classifier."""

    checkpoint: str = ""
    """run or model folder"""
    output: str = ""
    """new folder"""
    layout: Literal["pspg-engine", "published", "classifier"] = "pspg-engine"
    """pspg-engine: what evaluate and predict read; published: one safetensors file with the authors' names; classifier:
    a fixed class list, prompted once under the context bank, and the towers as open_clip loads them"""
    class_names: str | list[str] | None = None
    """layout classifier: classes to freeze, trained on or not: a list or a text file; null: those of the training"""


@dataclass(kw_only=True)
class CheckConfig:
    """Decode every image of one or more manifests and list those that cannot be used; or verify a cache of them."""

    manifest: str | list[str] = ""
    """manifest (JSONL), or a list of them"""
    cache: str | None = None
    """verify this cache instead of the files: checksums, that it holds every image, and that no source changed"""
    image_root: str | None = None
    """folder that `filepath` is relative to; null: each manifest's own folder"""
    output: str | None = None
    """also list the unusable images in this file, .csv or .jsonl"""
    max_megapixels: float = 100
    """million pixels above which an image counts as unreadable; it guards the memory"""
    workers: int = 2
    """decoding processes"""


@dataclass(kw_only=True)
class CacheConfig:
    """Decode, window and resize the images once, so that training reads pixels. Run again, it goes on or adds."""

    manifest: str | list[str] = ""
    """manifest (JSONL), or a list of them"""
    output: str = ""
    """folder of the cache; one that is there already keeps its images"""
    image_root: str | None = None
    """folder that `filepath` is relative to; null: each manifest's own folder"""
    size: int = 224
    """side of the square, pixels: data.image_size of the training"""
    resize: Literal["stretch", "pad"] = "stretch"
    """stretch to the square (the paper), or keep the aspect ratio and pad with black"""
    on_bad_image: Literal["error", "skip"] = "error"
    """stop at an unreadable image, or keep it as unreadable; training then does what its own on_bad_image says"""
    max_megapixels: float = 100
    """million pixels above which an image counts as unreadable; it guards the memory"""
    workers: int = 2
    """decoding processes"""


def require(**values: str) -> None:
    """Refuse empty settings.

    Raises:
        UserError: naming the first empty key.
    """
    for key, value in values.items():
        if not value:
            raise UserError(f"{key}: is required; give --{key}")


def check_values(settings: Any, prefix: str = "") -> None:
    """Refuse choices and numbers that the type of a setting excludes, also where no parser has seen them.

    Raises:
        UserError: naming the key.
    """
    for key, hint in get_type_hints(type(settings)).items():
        value = getattr(settings, key)
        if is_dataclass(value):
            check_values(value, f"{prefix}{key}.")
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise UserError(f"{prefix}{key}: {value!r} is not one of {', '.join(map(str, get_args(hint)))}")
        for kind in get_args(hint) or (hint,):
            if value is not None and isinstance(kind, type) and kind.__module__ == "jsonargparse.typing":
                try:
                    kind(value)
                except ValueError as error:
                    raise UserError(f"{prefix}{key}: {plain_range(str(error), value)}") from None


def plain_range(message: str, value: object) -> str:
    """The parser's message about a number that its type excludes, in plain words."""
    found = re.search(r"does not conform to restriction (.*)", message)
    if not found:
        return f"must be a number, got {value}"
    limits = re.sub(r"v([<>]=?)", r"\1 ", found[1])
    return f"must be {limits}, got {value}"


def check_evaluation(prefix: str, evaluation: EvaluationConfig) -> None:
    """Refuse impossible evaluation settings; `prefix` stands before the key's name.

    Raises:
        UserError: naming the key.
    """
    for key in ("batch_size", "bank_size"):
        if getattr(evaluation, key) < 1:
            raise UserError(f"{prefix}{key}: must be at least 1, got {getattr(evaluation, key)}")
    if evaluation.bootstrap < 0:
        raise UserError(f"{prefix}bootstrap: must not be negative, got {evaluation.bootstrap}")
    if not 0 <= evaluation.threshold <= 1:
        raise UserError(f"{prefix}threshold: must lie between 0 and 1, got {evaluation.threshold}")
    check_seed(f"{prefix}seed", evaluation.seed)


def check_workers(key: str, workers: int) -> None:
    """Refuse a negative number of loader processes.

    Raises:
        UserError: naming the key.
    """
    if workers < 0:
        raise UserError(f"{key}: must not be negative, got {workers}")


def check_seed(key: str, seed: int) -> None:
    """Refuse seeds that random generators do not take.

    Raises:
        UserError: naming the key.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"{key}: must lie between 0 and 2^63 - 1, got {seed}")
