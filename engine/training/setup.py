"""Setup that both phases share: backbone, data set, loader, the first files of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import yaml
from torch import Tensor, nn

from ..checkpoints.model_folder import load_clip_folder, write_model
from ..data.augment import Augmentation
from ..data.dataset import ImageDataset
from ..data.loaders.choose import load_with
from ..data.loaders.training import make_train_loader
from ..data.manifest import Manifest
from ..data.pixels import Pixels
from ..data.statistics import reading_of, training_pixels
from ..distributed.collectives import barrier
from ..distributed.world import World
from ..models.clip import load_clip
from ..models.hub import CONFIG, hub_weights, local_folder
from ..utils.device import autocast_dtype
from ..utils.errors import UserError
from ..utils.files import write_text
from ..utils.names import HUB
from .config import TrainConfig, check_backbone
from .fork import origin
from .global_batch import SharedBatches

log = logging.getLogger(__name__)

RANDOM = "random"
"""`model.pretrained` that asks for random weights"""


def shares_batch(config: TrainConfig, world: World) -> bool:
    """True where several ranks are one batch: it decides the task and what the loader's batches carry."""
    return config.scope == "global" and world.size > 1


def share_batches(config: TrainConfig, world: World, loader: Any) -> Any:
    """The loader's batches, with what ranks tell one another about them where they share a batch."""
    return SharedBatches(loader, config.batch_size // world.size, world.rank) if shares_batch(config, world) else loader


def load_backbone(config: TrainConfig, manifest: Manifest) -> tuple[open_clip.CLIP, Pixels]:
    """CLIP to start from, and the pixel rule: of the settings, else of the backbone, else of the training images."""
    data = config.data
    pretrained = config.model.pretrained
    carried: Pixels | None = None
    if (run := origin(config)) is not None:
        # A resumed run finds its backbone and pixel rule in its own folder, wherever they came from.
        return load_clip_folder(run)
    check_backbone(config)
    folder = local_folder(pretrained or "", "model.pretrained")
    if pretrained and (folder / "model.json").is_file():
        clip, carried = load_clip_folder(folder)
    elif pretrained and (weights := hub_weights(folder, "model.pretrained")) is not None:
        # The folder says which activation its weights need.
        clip = load_clip(str(folder / CONFIG), str(weights), quick_gelu=False, image_size=data.image_size)
    elif pretrained and folder.is_dir():
        raise UserError(
            f"model.pretrained: {pretrained} is a folder without model.json or {CONFIG}; give a run folder or a file"
        )
    else:
        clip = load_clip(
            config.model.backbone,
            None if pretrained == RANDOM else pretrained,
            quick_gelu=config.model.quick_gelu,
            image_size=data.image_size,
        )
    return clip, training_pixels(data, manifest.samples, carried, pretrained)


def make_dataset(
    config: TrainConfig,
    manifest: Manifest,
    pixels: Pixels,
    *,
    augment: bool,
    labels: np.ndarray | None = None,
    tokenize: Callable[[list[str]], Tensor] | None = None,
) -> ImageDataset:
    """Images of a manifest as a run sees them.

    `augment=False` is the plain view of validation; True means what the configuration says.
    """
    data = config.data
    changes = Augmentation(augment=data.augment, flip=data.flip, bicubic=data.augment_bicubic, seed=config.seed)
    reading = replace(reading_of(data), timeout_s=config.timeout_s)
    return ImageDataset(
        manifest.samples, pixels, reading, labels=labels, tokenize=tokenize, augmentation=changes if augment else None
    )


def make_loader(config: TrainConfig, dataset: ImageDataset, world: World) -> Any:
    """This rank's training batches."""
    return make_train_loader(
        dataset,
        batch_size=config.batch_size,
        rank=world.rank,
        world_size=world.size,
        accumulate=config.optim.accumulate,
        workers=config.data.workers,
        seed=config.seed,
        load=load_with(config.data.loader, world.device),
    )


def report_run(config: TrainConfig, world: World, module: nn.Module, loader: Any, data: str) -> None:
    """Say in one line what a run is about to do; `data` says what it trains on."""
    if not world.is_main:
        return
    precision = autocast_dtype(config.precision, world.device)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    training = sum(size for size, trains in sizes if trains)
    steps = loader.batches_per_epoch // config.optim.accumulate
    log.info(
        f"{world.device.type}{f' × {world.size}' if world.size > 1 else ''}, "
        f"{'fp32' if precision is None else str(precision).removeprefix('torch.')}; {backbone_in_words(config)}, "
        f"{training:,} of {sum(size for size, _ in sizes):,} parameters train; {data}; {steps:,} steps an epoch, "
        f"{steps * config.optim.epochs:,} in all"
    )


def backbone_in_words(config: TrainConfig) -> str:
    """Architecture and weights that a run starts from: `RN50 with openai`, `CLIP with runs/phase1`."""
    model = config.model
    weights = "random weights" if model.pretrained in (None, RANDOM) else model.pretrained
    if (run := origin(config)) is not None:
        weights = "weights of this run" if run == Path(config.output) else f"weights of {run}"
    given = model.pretrained or ""
    backbone = "CLIP" if given.startswith(HUB) or (given and Path(given).is_dir()) else model.backbone  # or its own
    return f"{backbone} with {weights}"


def write_start(
    config: TrainConfig, world: World, description: dict[str, Any], tensors: dict[str, dict[str, Tensor]]
) -> None:
    """Write the resolved configuration and the model folder's fixed files."""
    run = Path(config.output)
    if world.is_main and origin(config) is None:
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "config.yaml", yaml.safe_dump(asdict(replace(config, resume=None)), sort_keys=False))
        write_model(run, description, tensors)
    barrier()
