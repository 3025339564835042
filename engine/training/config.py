"""Settings of a training run, as typed dataclasses; the command line reads them from YAML and dotted overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from .. import config as shared  # its choices grow with plugins
from ..config import (
    DataConfig,
    EvaluationConfig,
    FractionBelowOne,
    LossConfig,
    ModelConfig,
    Seed,
    check_values,
)
from ..data.cache.header import Header
from ..utils.errors import UserError
from ..utils.files import check_input, check_names, check_output
from ..utils.packaged import located
from ..utils.plugins import load_plugins
from .loggers import LOGGERS


@dataclass(kw_only=True)
class OptimConfig:
    """Optimizer and schedule. Biases, norms and other 1-D parameters and the temperature are never decayed."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 0.05
    residual_lr: PositiveFloat | None = None
    """learning rate of model.residual, on the same schedule; null: lr"""
    residual_decay: NonNegativeFloat | None = None
    """weight decay of model.residual, towards zero; null: weight_decay"""
    momentum: FractionBelowOne = 0.9
    """Nesterov momentum of sgd"""
    epochs: PositiveInt = 50
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: NonNegativeFloat | None = None
    """null: 5, or half of fewer than 10 epochs"""
    warmup_lr: NonNegativeFloat = 1e-6
    """where the linear warm-up starts"""
    cosine_from: Literal["warmup", "start"] = "warmup"
    """where the cosine's first step is: the end of the warm-up, or the start of training, as in the authors' code"""
    min_lr: NonNegativeFloat = 5e-6
    """where the cosine ends"""
    clip_norm: NonNegativeFloat = 0.0
    """largest gradient norm; 0: no clipping"""
    patience: NonNegativeInt = 0
    """epochs without a better validation after which training ends; 0: it goes on to the last"""
    accumulate: PositiveInt = 1
    """batches per optimizer step"""
    ema_decay: FractionBelowOne = 0.0
    """decay of the exponential moving average of the weights; 0: none"""


@dataclass(kw_only=True)
class ProfileConfig:
    """A trace of some steps by torch.profiler, written to `profile/` of the run folder."""

    start: NonNegativeInt = 20
    """optimizer steps of this process before the first that is recorded; the first ones compile and fill caches"""
    steps: NonNegativeInt = 0
    """optimizer steps to record; 0: none"""


@dataclass(kw_only=True)
class TrainConfig:
    """One training run of either phase."""

    task: Literal["contrastive", "prompt", "residual"] = "prompt"
    """phase 1 (contrastive fine-tuning on image-report pairs), phase 2 (prompt learning), or, after it, the residual of
    the text features alone (model.residual on the head of model.pretrained_head)"""
    output: str = "runs/pspg"
    """run folder"""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    batch_size: PositiveInt = 64
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
    plugins: str | list[str] = field(default_factory=list)
    """modules or Python files of your own, which are imported and may register decoders, fusions, losses and image
    encoders; one or a list"""
    resume: Literal["latest"] | None = None
    """latest: continue this run from its newest checkpoint, or start it if it has none"""
    fork: str | None = None
    """run folder: start this run from that one's newest good checkpoint, steps and epochs counted on. What resume may
    change may differ, and seed, data.augment, data.augment_bicubic, data.flip, loss.*, and optim.* but name, accumulate
    and ema_decay"""
    timeout_s: PositiveInt = 600
    """seconds that a batch may take to load, after which the loader counts as standing still and the run ends. Several
    processes: also seconds without a sign of life, or without a batch while the others wait, after which a rank counts
    as lost and the run ends; and how long the processes wait for each other at the start"""
    save_every: NonNegativeInt = 0
    """optimizer steps between checkpoints within an epoch; 0: at the end of each epoch only"""
    log_every: PositiveInt = 10
    """optimizer steps between log lines; the host waits for the device only there"""
    logger: shared.LoggerName | list[shared.LoggerName] = field(default_factory=lambda: ["tensorboard"])
    """where metrics go beside metrics.jsonl: one name or a list of them. wandb and mlflow take their own environment
    variables (WANDB_MODE=offline, WANDB_PROJECT, MLFLOW_TRACKING_URI, …) and may send metrics, settings and examples to
    another machine"""
    log_images: NonNegativeInt = 0
    """phase 2: so many validation images go to the loggers at the end of each epoch, with their labels and highest
    probabilities; 0: none, as images of patients then lie where the loggers write"""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """on a GPU: record the step of either phase as a CUDA graph and replay it, also with cached features and sampled
    pairs; smaller batches, a step that cannot be recorded, or whose replay differs, run as usual. auto: wherever it
    applies; on: refuse settings where it does not"""
    images_ahead: bool = False
    """within the CUDA graph of phase 2, compute the next batch's image features beside the text side of this one; no
    effect without the graph or with cached features"""
    text_memory: PositiveInt | None = None
    """phase 2: MiB of the text tower's activations to hold at a time; null: 512 on a CPU, 1024 on a GPU"""
    seed: Seed = 0
    dry_run: bool = False
    """print what each rank would do (place, device, images of a batch; parameters and bytes) and start nothing"""

    def find_files(self, folders: Sequence[Path]) -> None:
        """Set model.backbone to where its JSON file is: as given, in one of `folders`, or packaged."""
        self.model.backbone = located(self.model.backbone, folders, ".json") or self.model.backbone


def graph_needs(config: TrainConfig) -> str | None:
    """The first thing that a run lacks for its step to be a CUDA graph; None: nothing, given a GPU."""
    needs = {
        "zero_stage 0": config.zero_stage == 0,
        "precision bf16 or fp32, fp16's loss scale does not enter the graph": config.precision != "fp16",
        "a GPU, device is cpu": config.device != "cpu",
    }
    return next((need for need, met in needs.items() if not met), None)


def check_train(config: TrainConfig) -> None:
    """Refuse values and combinations that cannot run; what the parts of the model say of one another is not checked.

    Raises:
        UserError: naming the key and what to do.
    """
    load_plugins(config.plugins)
    check_values(config)
    data, optim = config.data, config.optim
    if not data.train:
        raise UserError("data.train: name the training manifest (a JSONL file)")
    if (data.mean is None) != (data.std is None):
        raise UserError("data.mean: give data.mean and data.std together, or neither")
    _check_loggers(config)
    if optim.patience and not data.val:
        raise UserError("optim.patience: needs data.val, a validation that can get better")
    if optim.warmup_epochs is not None and optim.warmup_epochs > optim.epochs:
        raise UserError(
            f"optim.warmup_epochs: {optim.warmup_epochs} is more than optim.epochs {optim.epochs}; null fits any number"
        )
    if config.zero_stage == 3:
        if config.task != "contrastive":
            raise UserError("zero_stage: 3 is for phase 1; the head of phase 2 is small, use 0, 1 or 2")
        if optim.ema_decay:
            raise UserError("zero_stage: 3 keeps no average of the weights; set optim.ema_decay to 0, or use 0, 1 or 2")
        if config.precision == "fp16":
            raise UserError("zero_stage: 3 does not go with precision fp16; use bf16, or stage 0, 1 or 2")
    if config.task == "residual":
        needs = {
            "model.residual: task residual trains it; set class or related": config.model.residual != "none",
            "model.pretrained_head: task residual needs the folder of a phase-2 run": bool(
                config.model.pretrained_head
            ),
            "loss.pair: task residual has no pair prompts to train; set none": config.loss.pair == "none",
        }
        for line, met in needs.items():
            if not met:
                raise UserError(line)
    need = graph_needs(config)
    if config.cuda_graphs == "on" and need:
        raise UserError(f"cuda_graphs: needs {need}")
    if config.model.text_drop_path and config.task == "prompt":
        raise UserError("model.text_drop_path: is for phase 1; phase 2 does not train the text tower, set it to 0")
    if data.cache_features and config.task == "contrastive":
        raise UserError("data.cache_features: phase 1 trains the image tower, its features cannot be cached")
    if data.cache_features and data.augment:
        raise UserError("data.cache_features: needs data.augment false, features are computed once")
    if data.cache_features and data.flip:
        raise UserError("data.cache_features: needs data.flip 0, features are computed once")


def loggers_of(config: TrainConfig) -> list[str]:
    """Names of the loggers, each once."""
    return list(dict.fromkeys([config.logger] if isinstance(config.logger, str) else config.logger))


def _check_loggers(config: TrainConfig) -> None:
    for name in loggers_of(config):
        package = LOGGERS[name].package
        if find_spec(package) is None:
            raise UserError(f"logger: {name} needs the package {package}; pip install 'pspg-engine[{name}]'")
    if config.log_images and config.task == "contrastive":
        raise UserError("log_images: shows labels and scores, which phase 1 does not have; set it to 0")
    if config.log_images and not config.data.val:
        raise UserError("log_images: shows validation images; name data.val, or set it to 0")
    if config.log_images and config.data.cache_features:
        raise UserError("log_images: data.cache_features keeps no images; set that to false, or log_images to 0")


def _holds_run(folder: Path) -> bool:
    return (folder / "checkpoints/last").is_file() or any(folder.glob("checkpoints/step-*/state.json"))


def check_fresh(config: TrainConfig) -> None:
    """Refuse to start a run over another one.

    Raises:
        UserError: the folder holds a run and `resume` was not asked for.
    """
    if config.resume is None and _holds_run(Path(config.output)):
        raise UserError(
            f"output: {config.output} already holds a run; continue it with --resume latest, or choose another folder"
        )


def check_backbone(config: TrainConfig) -> None:
    """Refuse phase 2 without a backbone; a run that goes on, or a fork, has its own.

    Raises:
        UserError: naming the key and what to do.
    """
    own = config.fork is not None or _holds_run(Path(config.output))
    if config.model.pretrained is None and config.task != "contrastive" and not own:
        raise UserError(
            "model.pretrained: phase 2 freezes the backbone, and its weights would be random; name a phase-1 run, a "
            "weights file or an open_clip tag, or write random if you mean it"
        )


def check_run(config: TrainConfig) -> None:
    """Refuse, before torch is imported, what the settings alone and the presence of files can tell.

    Raises:
        UserError: naming the key and what to do.
    """
    check_train(config)
    data = config.data
    check_output(config.output)
    check_input(fork=config.fork)
    if config.fork is not None and not (Path(config.fork) / "checkpoints").is_dir():
        raise UserError(
            f"fork: {config.fork} is not the folder of a run, it has no checkpoints; model.pretrained_head starts from "
            "the weights of any model"
        )
    if config.fork is not None and Path(config.fork).resolve() == Path(config.output).resolve():
        raise UserError(f"fork: {config.fork} is the output itself; choose another output, or use --resume latest")
    check_fresh(config)
    files = {"train": data.train, "val": data.val, "label_names": data.label_names}
    folders = {"image_root": data.image_root, "cache": data.cache}
    check_input(**{f"data.{key}": path for key, path in {**files, **folders}.items()})
    check_input(**{"model.pretrained_head": config.model.pretrained_head})
    check_names(**{"data.class_names": data.class_names})
    check_backbone(config)
    if data.cache is not None:
        cache = Path(data.cache)
        header = Header.read(cache)
        header.check_use(cache, size=data.image_size, resize=data.resize, bit_depth=data.bit_depth)
