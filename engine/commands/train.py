"""`pspg-engine train`: from a configuration to the task, the loader and the trainer of one run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import yaml
from torch import Tensor

from ..checkpoints.model_folder import describe, load_bank, load_clip_folder, load_head, write_model
from ..checkpoints.run import last_checkpoint
from ..data.augment import Augmentation
from ..data.bad_image import report_bad
from ..data.dataset import ImageDataset
from ..data.labels import label_matrix, select_classes
from ..data.loaders.choose import load_with, pick_loader, pixel_source
from ..data.loaders.evaluation import EvalLoader, make_eval_loader
from ..data.loaders.training import make_train_loader
from ..data.manifest import Manifest, load_label_names, load_manifest
from ..data.pixels import Pixels
from ..data.statistics import reading_of, training_pixels
from ..distributed.collectives import barrier
from ..distributed.watch import watch
from ..distributed.world import World, start
from ..models.clip import load_clip, tokenize
from ..models.fusions import FUSIONS
from ..models.pspg import PsPG, check_head
from ..training.config import TrainConfig, check_train, graph_needs
from ..training.feature_cache import CachedBatches, cache_features
from ..training.global_batch import GlobalContrastiveTask, GlobalPromptTask, SharedBatches
from ..training.losses import PromptLoss
from ..training.losses.pair import PAIR_LOSSES
from ..training.tasks import ContrastiveTask, PromptTask
from ..training.trainer import Trainer, check_fresh
from ..utils.device import autocast_dtype
from ..utils.errors import UserError
from ..utils.files import check_output, write_text

log = logging.getLogger(__name__)

# Settings that a run may change when it is resumed: where and how fast, not what is computed.
MUTABLE = {
    "output",
    "resume",
    "timeout_s",
    "device",
    "zero_stage",
    "save_every",
    "log_every",
    "cuda_graphs",
    "text_memory",
    "data.workers",
    "data.cache",
    "data.train",
    "data.val",
    "data.image_root",
    "data.label_names",
    "data.class_names",
    "model.pretrained",
    "model.pretrained_head",
    "evaluation.bootstrap",
    "evaluation.threshold",
}


def train(config: TrainConfig) -> dict[str, Any]:
    """Run one phase and return what `Trainer.fit` returns.

    Raises:
        UserError: whatever the user has to correct, before anything is written where possible.
    """
    check_train(config)
    check_parts(config)
    config = replace(config, loss=PromptLoss(config.loss).config)
    world = start(config.device, config.timeout_s)
    with _watch(config, world):
        trainer = make_trainer(config, world)
        try:
            result = trainer.fit()
        except UserError as error:
            error.local = True
            raise
        bad = trainer.bad()
    if world.is_main:
        log.info(f"finished at step {result['step']}: {config.output}")
        report_bad(bad)
    return result


def check_parts(config: TrainConfig) -> None:
    """Refuse decoders, fusions and losses that do not go together.

    Raises:
        UserError: naming the key and what to do.
    """
    check_head(config.model)
    loss, fusion = config.loss, FUSIONS[config.model.fusion]
    with_pairs = [name for name in PAIR_LOSSES.names() if PAIR_LOSSES[name].needs_pairs]
    if loss.pair in with_pairs and not fusion.image_vector:
        others = [name for name in PAIR_LOSSES.names() if name not in with_pairs]
        raise UserError(
            f"loss.pair: {loss.pair} compares pairs of classes with one vector an image, and model.fusion "
            f"{fusion.name} makes none; use {' or '.join(others)}"
        )
    if loss.pair_samples and loss.pair not in with_pairs:
        raise UserError(
            f"loss.pair_samples: loss.pair {loss.pair} has no pairs to sample; use {' or '.join(with_pairs)}"
        )


def _watch(config: TrainConfig, world: World) -> AbstractContextManager[Any]:
    """Over what the ranks do together."""
    run = Path(config.output)

    def tell_lost(line: str) -> None:
        try:
            last = last_checkpoint(run)
        except UserError:
            last = None
        kept = f"last good checkpoint: {last}, go on with --resume latest" if last else "there is no checkpoint yet"
        log.info(f"pspg-engine train: error: {line}; {kept}")

    return watch(world, config.timeout_s, tell_lost)


def make_trainer(config: TrainConfig, world: World) -> Trainer:
    """What trains a run, from its newest checkpoint if it is resumed.

    Raises:
        UserError: see `train`.
    """
    if config.cuda_graphs == "on" and world.device.type != "cuda":
        raise UserError("cuda_graphs: needs a GPU, torch sees none")
    need = graph_needs(config, world.size)
    if config.cuda_graphs == "on" and need:
        raise UserError(f"cuda_graphs: needs {need}")
    loader = pick_loader("data.loader", config.data.loader, world.device)
    config = replace(config, data=replace(config.data, loader=loader))
    run = Path(config.output)
    check_output(run)
    check_fresh(config)
    if (run / "model.safetensors").exists():
        raise UserError(f"output: {run} holds an exported or imported model; choose another folder")
    torch.manual_seed(config.seed)
    build = _build_contrastive if config.task == "contrastive" else _build_prompt
    return build(config, world)


def _build_contrastive(config: TrainConfig, world: World) -> Trainer:
    data = config.data
    manifest = load_manifest(data.train, image_root=data.image_root, need="text")
    clip, pixels = _backbone(config, manifest)
    clip.train()
    # A partial of a module's function: loader processes that are not forked must be able to import it.
    words = partial(tokenize, context_length=clip.context_length)
    dataset = _dataset(config, manifest, pixels, tokenize=words, augment=True)
    validation = None
    if data.val:
        held_out = load_manifest(data.val, image_root=data.image_root, need="text")
        validation = make_eval_loader(
            _dataset(config, held_out, pixels, tokenize=words, augment=False),
            batch_size=config.evaluation.batch_size,
            rank=world.rank,
            world_size=world.size,
            workers=data.workers,
            load=load_with(data.loader, world.device),
        )
    loader = _loader(config, dataset, world)
    training = f"{len(manifest.samples)} image-report pairs ({data.train})"
    _write_start(config, world, describe("clip", clip, pixels, training=training), {})
    shared = _shares_batch(config, world)
    task = (GlobalContrastiveTask if shared else ContrastiveTask)(
        clip.to(world.device), world, validation, config.precision, sharded=config.zero_stage == 3
    )
    fingerprint = _resume_fingerprint(config, {"data.train": data_digest(manifest)})
    batches = SharedBatches(loader, config.batch_size // world.size, world.rank) if shared else loader
    return Trainer(config, task, batches, world, fingerprint)


def _build_prompt(config: TrainConfig, world: World) -> Trainer:
    data, run = config.data, Path(config.output)
    manifest = _labelled(config, data.train)
    names, columns = select_classes(manifest.label_names or [], data.class_names)
    labels = label_matrix(manifest.samples, columns, uncertain=data.uncertain, blank=data.blank)
    if world.is_main:
        _report_classes(names, labels)
    clip, pixels = _backbone(config, manifest)
    model = PsPG(clip, config.model, names)
    if config.model.pretrained_head and last_checkpoint(run) is None:
        load_head(model, Path(config.model.pretrained_head))
    # Before the model leaves the CPU: the files hold what was loaded, not what inference makes of it.
    training = f"{len(manifest.samples)} images labelled with {len(names)} classes ({data.train})"
    description = describe("pspg", clip, pixels, head=config.model, class_names=names, training=training)
    towers = {name: tensor.detach().clone() for name, tensor in clip.state_dict().items()}
    autocast = autocast_dtype(config.precision, world.device)
    model.to(world.device).freeze(autocast)
    if config.text_memory is not None:
        model.head.text_memory = config.text_memory * 2**20

    own = {"rank": world.rank, "world_size": world.size}

    def in_order(dataset: ImageDataset, **share: int) -> EvalLoader:
        size, load = config.evaluation.batch_size, load_with(data.loader, world.device)
        return make_eval_loader(dataset, batch_size=size, workers=data.workers, load=load, **share)

    def features_of(dataset: ImageDataset, title: str) -> CachedBatches:
        return cache_features(model, in_order(dataset), world.device, autocast, title=title)

    dataset = _dataset(config, manifest, pixels, labels=labels, augment=True)
    resumed = last_checkpoint(run) is not None
    bank = load_bank(run / "bank.safetensors", model) if resumed else _bank(config, manifest, pixels, features_of)
    loader: Any
    if data.cache_features:
        loader = features_of(dataset, "caching features").train_loader(
            batch_size=config.batch_size, accumulate=config.optim.accumulate, seed=config.seed, **own
        )
    else:
        loader = _loader(config, dataset, world)
    validation: Iterable[Any] | None = None
    if data.val:
        held_out = _labelled(config, data.val)
        _, held_columns = select_classes(held_out.label_names or [], names)
        held_labels = label_matrix(held_out.samples, held_columns, uncertain=data.uncertain, blank=data.blank)
        plain = _dataset(config, held_out, pixels, labels=held_labels, augment=False)
        if data.cache_features:
            cached = features_of(plain, "caching validation features")
            validation = cached.eval_batches(config.evaluation.batch_size, **own)
            # Batches in memory no longer know what was left out of them.
            loader.bad.update(cached.bad)
        else:
            validation = in_order(plain, **own)
    if not resumed:
        _write_start(config, world, description, {"clip": towers, "bank": {"bank": bank.cpu()}})
    shared = _shares_batch(config, world)
    task = (GlobalPromptTask if shared else PromptTask)(
        model,
        PromptLoss(config.loss),
        world,
        validation,
        bank=bank.to(world.device) if config.evaluation.context == "bank" else None,
        precision=config.precision,
    )
    fingerprint = _resume_fingerprint(config, {"data.train": data_digest(manifest, labels), "data.class_names": names})
    batches = SharedBatches(loader, config.batch_size // world.size, world.rank) if shared else loader
    return Trainer(config, task, batches, world, fingerprint)


def _shares_batch(config: TrainConfig, world: World) -> bool:
    return config.scope == "global" and world.size > 1


def _labelled(config: TrainConfig, path: str) -> Manifest:
    data = config.data
    names = None if data.label_names is None else load_label_names(data.label_names)
    return load_manifest(path, image_root=data.image_root, label_names=names, need="labels")


def _backbone(config: TrainConfig, manifest: Manifest) -> tuple[open_clip.CLIP, Pixels]:
    """CLIP to start from, and the pixel rule: of the settings, else of the backbone, else of the training images."""
    data, run = config.data, Path(config.output)
    pretrained = config.model.pretrained
    carried: Pixels | None = None
    if last_checkpoint(run) is not None:
        # A resumed run finds its backbone and pixel rule in its own folder, wherever they came from.
        clip, carried = load_clip_folder(run)
        return clip, carried
    if pretrained and (Path(pretrained) / "model.json").is_file():
        clip, carried = load_clip_folder(Path(pretrained))
    elif pretrained and Path(pretrained).is_dir():
        raise UserError(f"model.pretrained: {pretrained} is a folder without model.json; give a run folder or a file")
    else:
        clip = load_clip(
            config.model.backbone, pretrained, quick_gelu=config.model.quick_gelu, image_size=data.image_size
        )
    return clip, training_pixels(data, manifest.samples, carried, pretrained)


def _dataset(
    config: TrainConfig,
    manifest: Manifest,
    pixels: Pixels,
    *,
    augment: bool,
    labels: np.ndarray | None = None,
    tokenize: Callable[[list[str]], Tensor] | None = None,
) -> ImageDataset:
    """`augment=False` is the plain view of validation; True means what the configuration says."""
    data = config.data
    augmentation = Augmentation(augment=data.augment, flip=data.flip, seed=config.seed) if augment else None
    return ImageDataset(
        manifest.samples, pixels, reading_of(data), labels=labels, tokenize=tokenize, augmentation=augmentation
    )


def _loader(config: TrainConfig, dataset: ImageDataset, world: World) -> Any:
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


def _bank(
    config: TrainConfig,
    manifest: Manifest,
    pixels: Pixels,
    features_of: Callable[[ImageDataset, str], CachedBatches],
) -> Tensor:
    """Global features (M,D) of a seeded choice of training images, not augmented."""
    count = min(config.evaluation.bank_size, len(manifest.samples))
    chosen = np.random.default_rng(config.seed).choice(len(manifest.samples), count, replace=False)
    subset = replace(manifest, samples=[manifest.samples[i] for i in sorted(chosen)])
    return features_of(_dataset(config, subset, pixels, augment=False), "context bank").features.global_


def data_digest(manifest: Manifest, labels: np.ndarray | None = None) -> str:
    """Digest of what is trained on: ids in order, with the label matrix or the texts."""
    digest = hashlib.sha256()
    for sample in manifest.samples:
        digest.update(json.dumps([sample.id, sample.text if labels is None else None]).encode())
    if labels is not None:
        digest.update(np.ascontiguousarray(labels).tobytes())
    return digest.hexdigest()


def _report_classes(names: list[str], labels: np.ndarray) -> None:
    """Name the classes that have one label value only: they train, but validation cannot score them."""
    single = [
        name for name, column in zip(names, labels.T, strict=True) if not (column == 1).any() or not (column == 0).any()
    ]
    if single:
        log.info(
            f"{len(single)} of {len(names)} classes have one label value only in training: {', '.join(single[:10])}"
        )


def _write_start(
    config: TrainConfig, world: World, description: dict[str, Any], tensors: dict[str, dict[str, Tensor]]
) -> None:
    """Write the resolved configuration and the model folder's fixed files."""
    run = Path(config.output)
    if world.is_main and last_checkpoint(run) is None:
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "config.yaml", yaml.safe_dump(asdict(replace(config, resume=None)), sort_keys=False))
        write_model(run, description, tensors)
    barrier()


def _resume_fingerprint(config: TrainConfig, extra: dict[str, Any]) -> dict[str, Any]:
    """Flat `key → value` of the settings that make two runs the same computation."""
    flat: dict[str, Any] = {}
    for key, value in asdict(config).items():
        entries = {f"{key}.{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {key: value}
        flat.update({name: entry for name, entry in entries.items() if name not in MUTABLE})
    data = config.data
    source = pixel_source(data.loader, cached=data.cache is not None, augmented=data.augment or data.flip > 0)
    return {**flat, "data.loader": source, **extra}
