"""Every setting of a run, as typed dataclasses; `cli.py` reads them from YAML and dotted overrides."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
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
from .utils.impossible import refuse_impossible
from .utils.parser_messages import plain_range
from .utils.registry import choices, on_register, registered

FractionBelowOne: TypeAlias = float
BitDepth: TypeAlias = int
Seed: TypeAlias = int
DecoderName: TypeAlias = str
FusionName: TypeAlias = str
ClassificationLossName: TypeAlias = str
PairLossName: TypeAlias = str
LoggerName: TypeAlias = str
CHOICES = {
    "DecoderName": ("model.decoder", "models/decoders"),
    "FusionName": ("model.fusion", "models/fusions"),
    "ClassificationLossName": ("loss.classification", "training/losses/classification"),
    "PairLossName": ("loss.pair", "training/losses/pair"),
    "LoggerName": ("logger", "training/loggers"),
}
"""type → its setting, and the folder whose files are its values"""


def choice_values() -> dict[str, tuple[str, ...]]:
    """Type → its values: the files of a folder, so that whoever adds one edits no list, and what is registered from
    elsewhere. Nothing is imported."""
    root = Path(__file__).parent
    found = {name: {*choices(root / folder), *registered(setting)} for name, (setting, folder) in CHOICES.items()}
    return {name: tuple(sorted(values)) for name, values in found.items()}


def set_choices() -> None:
    """Set the types of `CHOICES`, which the parser and `check_values` find by their names."""
    globals().update({name: Literal[values] for name, values in choice_values().items()})


if not TYPE_CHECKING:
    FractionBelowOne = restricted_number_type("FractionBelowOne", float, [(">=", 0), ("<", 1)])
    BitDepth = restricted_number_type("BitDepth", int, [(">=", 8), ("<=", 16)])
    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**63)])
    set_choices()
    on_register(set_choices)


@dataclass(kw_only=True)
class ModelConfig:
    """CLIP backbone, prompt decoder and spatial fusion (letters of the paper: n, H, D)."""

    backbone: str = "RN50"
    """open_clip model name, or the path of a JSON file in open_clip's model-config format"""
    pretrained: str | None = None
    """open_clip tag (such as openai), a weights file, the folder of a phase-1 run, or a CLIP in the Hugging Face Hub's
    layout: a local folder, or hf-hub:OWNER/NAME; a folder brings its own architecture. random: random weights, which
    in phase 1 null means, too"""
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
    text_drop_path: FractionBelowOne = 0.0
    """phase 1: probability of dropping a residual branch of the text tower's last block in training, rising linearly
    from 0 in its first; the authors' code has 0.1"""
    residual: Literal["none", "class", "related"] = "none"
    """class: also train a vector for each training class and side, added to its text feature; classes never trained on
    have none, so their scores stay those of the prompts. related: those borrow from training classes with like names"""
    prefix: bool = False
    """generate a prefix that stands before the class name instead of the whole prompt"""
    fusion: FusionName = "gate_after_norm"
    """how global and local image tokens are fused; gate_before_norm is the published order, whose gate cancels.
    regions: DualCoOp's, each class weighs the local tokens by itself; neither gate nor temperature train, and spcl and
    pcl, which compare pairs of classes with one vector an image, do not go with it"""


Resize: TypeAlias = Literal["stretch", "pad"]


@dataclass(kw_only=True)
class DataConfig:
    """Images, labels, and what is done to the pixels."""

    train: str = ""
    """training manifest (JSONL)"""
    val: str | None = None
    """validation manifest; picks the best epoch"""
    image_root: str | None = None
    """folder that `filepath` is relative to; null: where `prepare` found the images, else the manifest's own folder"""
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
    resize: Resize = "stretch"
    """stretch to the square (the paper), or keep the aspect ratio and pad with black"""
    mean: ClosedUnitInterval | None = None
    """pixel mean in [0, 1]; null: the backbone's if it carries one, else measured on the training images"""
    std: PositiveFloat | None = None
    """pixel standard deviation, likewise"""
    augment: bool = True
    """two of four random augmentations (paper A.2)"""
    augment_bicubic: bool = False
    """resized crop and affine bicubic, as in the authors' code, by the torch loader; false: bilinear and nearest
    neighbour"""
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
    """million pixels above which an image counts as unreadable; it guards the memory, 3 bytes for each of them: so
    fewer of colour, progressive JPEG and DICOM"""
    bit_depth: BitDepth | None = None
    """true depth of 16-bit PNGs, 8 to 16 bits; null: the smallest of 8, 10, 12, 14, 16 that holds an image's pixels,
    and images of which it could be a smaller one but for a few pixels are unreadable"""
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
    """spcl, pcl: estimate the loss from at most this many positive pairs a class and as many others, for more than a
    few hundred classes; the estimate is unbiased, and the cost grows with C instead of C²; 0: all pairs"""
    classification_weight: NonNegativeFloat | None = None
    classification_reduction: Literal["sum", "mean"] | None = None
    pair_weight: NonNegativeFloat | None = None
    pair_reduction: Literal["sum", "mean"] | None = None
    gamma_positive: NonNegativeFloat = 1.0
    gamma_negative: NonNegativeFloat = 2.0
    clip: ClosedUnitInterval = 0.05
    """probability shift of the asymmetric loss"""


BlendName: TypeAlias = Literal["none", "novelty", "fixed"]


@dataclass(kw_only=True)
class EvaluationConfig:
    """Scores and metrics: how they are computed."""

    context: Literal["batch", "bank"] = "batch"
    """what the prompts attend to: the images of the batch (the paper) or a fixed bank of training images"""
    batch_size: PositiveInt = 64
    """images a batch; under context=batch it changes the scores, so it is recorded with them"""
    bank_size: PositiveInt = 64
    """training images in the bank that a checkpoint keeps"""
    blend: BlendName = "none"
    """evaluate: add the paper's templates to the prompts' log-odds. none: the paper; novelty: the more, the less a
    class name is like those of the training classes, which stay as they are; fixed: alike for all"""
    blend_weight: NonNegativeFloat | None = None
    """weight of the templates; null: 4 for novelty, 1 for fixed"""
    bootstrap: NonNegativeInt = 1000
    """resamples of the 95 % confidence intervals; 0: none"""
    threshold: ClosedUnitInterval = 0.5
    """probability above which F1 and MCC count a class as predicted"""
    seed: Seed = 0


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
        else:
            refuse_impossible(value, f"{prefix}{key}")
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise UserError(f"{prefix}{key}: {value!r} is not one of {', '.join(map(str, get_args(hint)))}")
        for kind in get_args(hint) or (hint,):
            if value is not None and isinstance(kind, type) and kind.__module__ == "jsonargparse.typing":
                for item in value if isinstance(value, list) else [value]:
                    try:
                        kind(item)
                    except ValueError as error:
                        raise UserError(f"{prefix}{key}: {plain_range(str(error), item)}") from None
