"""Every setting of a run, as typed dataclasses; `cli.py` reads them from YAML and dotted overrides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .utils.errors import UserError


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
    decoder: Literal["gru", "lstm", "transformer", "mlp", "context"] = "gru"
    """what writes the prompts (paper, table 3); gru is the paper's, mlp writes all vectors at once. context: nothing
    does; a positive and a negative sequence of n learned vectors, shared by all classes, stand before the class name,
    whatever prefix says (with fusion regions the baseline DualCoOp)"""
    context_init: Literal["random", "template"] = "random"
    """context: what its vectors start from. random: normal of deviation 0.02; template: the tokens of "Findings
    suggesting" and "No evidence of" right before the class name, the places before them random"""
    prompts: Literal["dual", "shared", "positive"] = "dual"
    """dual: a decoder for positive and one for negative prompts; shared: one decoder with an output projection for
    each; positive: positive prompts only, the probability is the sigmoid of their logit"""
    prompt_length: int = 16
    """n, generated prompt vectors a class"""
    hidden_size: int = 512
    """H, decoder hidden width"""
    decoder_heads: int = 8
    """attention heads of the prompt decoder"""
    dropout: float = 0.2
    """dropout on the decoder outputs; mlp and context have none"""
    drop_path: float = 0.1
    """transformer: probability of dropping a residual branch of its last block in training"""
    prefix: bool = False
    """generate a prefix that stands before the class name instead of the whole prompt"""
    fusion: Literal["gate_after_norm", "gate_before_norm", "ungated", "global", "regions"] = "gate_after_norm"
    """how global and local image tokens are fused; gate_before_norm is the published order, whose gate cancels.
    regions: DualCoOp's, each class weighs the local tokens by itself; neither gate nor temperature train, and spcl and
    pcl, which compare pairs of classes with one vector an image, do not go with it"""

    @property
    def method(self) -> str:
        """What a report calls the model."""
        return "DualCoOp" if (self.decoder, self.fusion) == ("context", "regions") else "PsPG"


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
    image_size: int = 224
    """side of the square input, pixels"""
    resize: Literal["stretch", "pad"] = "stretch"
    """stretch to the square (the paper), or keep the aspect ratio and pad with black"""
    mean: float | None = None
    """pixel mean in [0, 1]; null: the backbone's if it carries one, else measured on the training images"""
    std: float | None = None
    """pixel standard deviation, likewise"""
    augment: bool = True
    """two of four random augmentations (paper A.2)"""
    flip: float = 0.5
    """probability of a horizontal flip; set 0 where class names carry a side"""
    loader: Literal["auto", "dali", "torch"] = "auto"
    """dali decodes, resizes and augments on the GPU (on a CPU it works, too, but slower than torch); auto: dali on a
    GPU if it is installed, else torch"""
    workers: int = 2
    """loader processes; with dali also its decoding threads"""
    on_bad_image: Literal["error", "skip"] = "error"
    """stop at an unreadable image, or leave it out, count it and list it"""
    max_megapixels: float = 100
    """million pixels above which an image counts as unreadable; it guards the memory"""
    cache: str | None = None
    """folder of `pspg-engine prepare cache` that holds the images of both manifests; null: decode the files"""
    cache_features: bool = False
    """phase 2: run the frozen image tower once and keep its features in memory; needs augment false"""


@dataclass(kw_only=True)
class LossConfig:
    """Phase 2's loss. The preset fills nulls: paper = ASL + SPCL, sums; published = 0.1 ASL (sum) + SPCL (mean)."""

    preset: Literal["paper", "published"] = "paper"
    classification: Literal["asl", "bce"] = "asl"
    pair: Literal["spcl", "pcl", "ranking", "none"] = "spcl"
    """pair loss: batch-level co-occurrence, sample-level co-occurrence, multi-label margin, or none"""
    pair_samples: int = 0
    """spcl, pcl: estimate the loss from all positive pairs and this many others a class, for vocabularies beyond a few
    hundred classes; unbiased, and the cost grows with C instead of C²; 0: all pairs"""
    classification_weight: float | None = None
    classification_reduction: Literal["sum", "mean"] | None = None
    pair_weight: float | None = None
    pair_reduction: Literal["sum", "mean"] | None = None
    gamma_positive: float = 1.0
    gamma_negative: float = 2.0
    clip: float = 0.05
    """probability shift of the asymmetric loss"""

    def resolved(self) -> LossConfig:
        """This configuration with every null filled from the preset."""
        published = self.preset == "published"
        pair_weight = 1.0
        if published and self.pair == "ranking":
            pair_weight = 0.07
        fill = {
            "classification_weight": 0.1 if published else 1.0,
            "classification_reduction": "sum",
            "pair_weight": pair_weight,
            "pair_reduction": "mean" if published or self.pair == "ranking" else "sum",
        }
        values = dict(vars(self))
        for key, value in fill.items():
            if values[key] is None:
                values[key] = value
        return LossConfig(**values)


@dataclass(kw_only=True)
class OptimConfig:
    """Optimizer and schedule. Biases, norms and other 1-D parameters and the temperature are never decayed."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1e-4
    weight_decay: float = 0.05
    momentum: float = 0.9
    """of sgd, with Nesterov"""
    epochs: int = 50
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = 5
    warmup_lr: float = 1e-6
    """where the linear warm-up starts"""
    min_lr: float = 5e-6
    """where the cosine ends"""
    clip_norm: float = 0.0
    """largest gradient norm; 0: no clipping"""
    accumulate: int = 1
    """batches per optimizer step"""
    ema_decay: float = 0.0
    """decay of the exponential moving average of the weights; 0: none"""


@dataclass(kw_only=True)
class EvaluationConfig:
    """How scores and metrics are computed."""

    context: Literal["batch", "bank"] = "batch"
    """what the prompts attend to: the images of the batch (the paper) or a fixed bank of training images"""
    batch_size: int = 64
    """images a batch; under context=batch it changes the scores, so it is recorded with them"""
    bank_size: int = 64
    """training images in the bank that a checkpoint keeps"""
    bootstrap: int = 1000
    """resamples of the 95 % confidence intervals; 0: none"""
    threshold: float = 0.5
    """probability above which F1 and MCC count a class as predicted"""
    seed: int = 0


@dataclass(kw_only=True)
class TrainConfig:
    """One training run of either phase."""

    task: Literal["contrastive", "prompt"] = "prompt"
    """phase 1 (contrastive fine-tuning on image-report pairs) or phase 2 (prompt learning)"""
    output: str = "runs/pspg"
    """run folder"""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    batch_size: int = 64
    """images a batch over all processes"""
    scope: Literal["global", "local"] = "global"
    """with several processes, what the parts that look at a whole batch see (context, co-occurrence, pooling,
    contrastive pairs, batch norm). global: the batch of all processes, so that any number of them computes the step of
    one, pairs shared out; local: each process its own share"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 autocast on a GPU, fp32 on a CPU"""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: what the processes share out. 1: optimizer state; 2: gradients, too; 3: weights, too, in
    phase 1"""
    resume: Literal["latest"] | None = None
    """latest: continue this run from its newest checkpoint, or start it if it has none"""
    timeout_s: int = 600
    """several processes: seconds without a sign of life, or without a batch while the others wait, after which a rank
    counts as lost and the run ends; also how long the processes wait for each other at the start"""
    save_every: int = 0
    """optimizer steps between checkpoints within an epoch; 0: at the end of each epoch only"""
    log_every: int = 10
    """optimizer steps between log lines; the host waits for the device only there"""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """phase 2 on a GPU: record the step once as a CUDA graph and replay it; batches of another shape, a step that
    cannot be recorded, or whose replay differs, run as usual. auto: wherever it applies; on: refuse settings where it
    does not"""
    text_memory: int | None = None
    """phase 2: MiB of the text tower's activations to hold at a time; null: 512 on a CPU, 1024 on a GPU"""
    seed: int = 0


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


def check_head(model: ModelConfig) -> None:
    """Refuse prompt heads that cannot be built.

    Raises:
        UserError: naming the key and what to do.
    """
    if model.hidden_size % model.decoder_heads:
        raise UserError(
            f"model.decoder_heads: {model.decoder_heads} heads do not divide model.hidden_size {model.hidden_size}"
        )
    if model.decoder == "context" and model.prompts != "dual":
        raise UserError(
            f"model.prompts: {model.prompts}, but model.decoder context learns a positive and a negative one; use dual"
        )


def graph_needs(config: TrainConfig, processes: int = 1) -> str | None:
    """What a run of so many processes lacks for its step to be a CUDA graph; None: nothing, given a GPU."""
    needs = {
        "task prompt": config.task == "prompt",
        "zero_stage 0": config.zero_stage == 0,
        "data.cache_features false": not config.data.cache_features,
        "loss.pair_samples 0, they are drawn on the host": not config.loss.pair_samples,
        "precision bf16 or fp32, fp16's loss scale does not enter the graph": config.precision != "fp16",
        "a GPU, device is cpu": config.device != "cpu",
        "one process or scope local, collectives are not recorded": processes == 1 or config.scope == "local",
    }
    return next((need for need, met in needs.items() if not met), None)


def check_train(config: TrainConfig) -> None:
    """Refuse values and combinations that cannot run.

    Raises:
        UserError: naming the key and what to do.
    """
    model, data, optim = config.model, config.data, config.optim
    positive = {
        "model.prompt_length": model.prompt_length,
        "model.hidden_size": model.hidden_size,
        "model.decoder_heads": model.decoder_heads,
        "data.image_size": data.image_size,
        "optim.epochs": optim.epochs,
        "optim.accumulate": optim.accumulate,
        "batch_size": config.batch_size,
        "log_every": config.log_every,
        "timeout_s": config.timeout_s,
        "text_memory": 1 if config.text_memory is None else config.text_memory,
    }
    not_negative = {
        "optim.weight_decay": optim.weight_decay,
        "optim.momentum": optim.momentum,
        "optim.warmup_epochs": optim.warmup_epochs,
        "optim.warmup_lr": optim.warmup_lr,
        "optim.min_lr": optim.min_lr,
        "optim.clip_norm": optim.clip_norm,
        "save_every": config.save_every,
        "loss.pair_samples": config.loss.pair_samples,
        "loss.gamma_positive": config.loss.gamma_positive,
        "loss.gamma_negative": config.loss.gamma_negative,
        "loss.classification_weight": config.loss.classification_weight or 0.0,
        "loss.pair_weight": config.loss.pair_weight or 0.0,
    }
    fractions = {
        "data.flip": data.flip,
        "data.mean": data.mean or 0.0,
        "loss.clip": config.loss.clip,
    }
    below_one = {
        "model.dropout": model.dropout,
        "model.drop_path": model.drop_path,
        "optim.momentum": optim.momentum,
        "optim.ema_decay": optim.ema_decay,
    }
    check_evaluation("evaluation.", config.evaluation)
    check_workers("data.workers", data.workers)
    check_seed("seed", config.seed)
    for key, count in positive.items():
        if count < 1:
            raise UserError(f"{key}: must be at least 1, got {count}")
    if not data.max_megapixels > 0:
        raise UserError(f"data.max_megapixels: must be positive, got {data.max_megapixels}")
    if not optim.lr > 0:
        raise UserError(f"optim.lr: must be positive, got {optim.lr}")
    for key, value in not_negative.items():
        if not value >= 0:
            raise UserError(f"{key}: must not be negative, got {value}")
    for key, value in fractions.items():
        if not 0 <= value <= 1:
            raise UserError(f"{key}: must lie between 0 and 1, got {value}")
    for key, value in below_one.items():
        if not 0 <= value < 1:
            raise UserError(f"{key}: must be at least 0 and below 1, got {value}")
    if not data.train:
        raise UserError("data.train: name the training manifest (a JSONL file)")
    check_head(model)
    if model.fusion == "regions" and config.loss.pair in ("spcl", "pcl"):
        raise UserError(
            f"loss.pair: {config.loss.pair} compares pairs of classes with one vector an image, and model.fusion "
            "regions makes none; use ranking or none"
        )
    if config.loss.pair_samples and config.loss.pair not in ("spcl", "pcl"):
        raise UserError(f"loss.pair_samples: loss.pair {config.loss.pair} has no pairs to sample; use spcl or pcl")
    if (data.mean is None) != (data.std is None):
        raise UserError("data.mean: give data.mean and data.std together, or neither")
    if data.std is not None and data.std <= 0:
        raise UserError(f"data.std: must be positive, got {data.std}")
    if optim.warmup_epochs > optim.epochs:
        raise UserError(f"optim.warmup_epochs: {optim.warmup_epochs} is more than optim.epochs {optim.epochs}")
    if config.zero_stage == 3:
        if config.task == "prompt":
            raise UserError("zero_stage: 3 is for phase 1; the head of phase 2 is small, use 0, 1 or 2")
        if optim.ema_decay:
            raise UserError("zero_stage: 3 keeps no average of the weights; set optim.ema_decay to 0, or use 0, 1 or 2")
        if config.precision == "fp16":
            raise UserError("zero_stage: 3 does not go with precision fp16; use bf16, or stage 0, 1 or 2")
    need = graph_needs(config)
    if config.cuda_graphs == "on" and need:
        raise UserError(f"cuda_graphs: needs {need}")
    if data.cache_features and config.task == "contrastive":
        raise UserError("data.cache_features: phase 1 trains the image tower, its features cannot be cached")
    if data.cache_features and data.augment:
        raise UserError("data.cache_features: needs data.augment false, features are computed once")
    if data.cache_features and data.flip:
        raise UserError("data.cache_features: needs data.flip 0, features are computed once")
