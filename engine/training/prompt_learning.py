"""Phase 2 from its configuration: prompt learning with frozen towers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..checkpoints.model_folder import bank_tensors, describe, load_bank, load_head
from ..data.dataset import ImageDataset
from ..data.labels import label_matrix, select_classes
from ..data.leaks import check_apart
from ..data.loaders.choose import load_with
from ..data.loaders.evaluation import EvalLoader, make_eval_loader
from ..data.manifest import Manifest, load_label_names, load_manifest
from ..data.pixels import Pixels
from ..distributed.world import World
from ..models.clip import ImageFeatures
from ..models.hub import local_folder
from ..models.pspg import PsPG
from ..utils.device import autocast_dtype
from ..utils.errors import UserError
from ..utils.names import data_name
from .config import TrainConfig
from .examples import FirstImages
from .feature_cache import CachedBatches, cache_features
from .fingerprint import data_digest, resume_fingerprint
from .fork import origin
from .global_batch import GlobalPromptTask
from .losses import PromptLoss
from .losses.pair import PAIR_LOSSES
from .residual import ResidualTask
from .setup import load_backbone, make_dataset, make_loader, report_run, share_batches, shares_batch, write_start
from .tasks import PromptTask
from .trainer import Trainer

log = logging.getLogger(__name__)


def build_prompt(config: TrainConfig, world: World) -> Trainer:
    """Trainer of phase 2.

    Raises:
        UserError: unusable data, backbone, class names or settings.
    """
    data, begun = config.data, origin(config)
    manifest = labelled_manifest(config, data.train)
    names, columns = select_classes(manifest.label_names or [], data.class_names)
    labels = label_matrix(manifest.samples, columns, uncertain=data.uncertain, blank=data.blank)
    if world.is_main:
        _report_classes(names, labels)
    clip, pixels = load_backbone(config, manifest)
    model = PsPG(clip, config.model, names, shared=world.size > 1)
    if config.model.pretrained_head and begun is None:
        folder = local_folder(config.model.pretrained_head, "model.pretrained_head")
        load_head(model, folder, other_classes=True)
    # Before the model leaves the CPU: the files hold what was loaded, not what inference makes of it.
    training = f"{len(manifest.samples)} images labelled with {len(names)} classes, {data_name(data.train)}"
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
        return cache_features(model, in_order(dataset, **own), world.device, autocast, title=title)

    dataset = make_dataset(config, manifest, pixels, labels=labels, augment=True)
    features = _bank(config, manifest, pixels, features_of) if begun is None else None
    bank = load_bank((begun or Path()) / "bank.safetensors", model) if features is None else features.global_
    loader: Any
    if data.cache_features:
        loader = features_of(dataset, "caching features").train_loader(
            batch_size=config.batch_size, accumulate=config.optim.accumulate, seed=config.seed, **own
        )
    else:
        loader = make_loader(config, dataset, world)
    validation: Iterable[Any] | None = None
    if data.val:
        held_out = labelled_manifest(config, data.val)
        check_apart(manifest, held_out)
        _, held_columns = select_classes(held_out.label_names or [], names)
        held_labels = label_matrix(held_out.samples, held_columns, uncertain=data.uncertain, blank=data.blank)
        plain = make_dataset(config, held_out, pixels, labels=held_labels, augment=False)
        if data.cache_features:
            cached = features_of(plain, "caching validation features")
            validation = cached.eval_batches(config.evaluation.batch_size, **own)
            # Batches in memory no longer know what was left out of them.
            loader.bad.update(cached.bad)
        else:
            validation = in_order(plain, **own)
            if config.log_images and world.is_main:  # the first batch is the first rank's
                validation = FirstImages(validation, config.log_images)
    if features is not None:
        write_start(config, world, description, {"clip": towers, "bank": bank_tensors(features)})
    task = _task(config, world, model, validation, bank.to(world.device))
    report_run(config, world, model, loader, _data(config, labels))
    fingerprint = resume_fingerprint(config, {"data.train": data_digest(manifest, labels), "data.class_names": names})
    return Trainer(config, task, share_batches(config, world, loader), world, fingerprint)


def _task(config: TrainConfig, world: World, model: PsPG, validation: Iterable[Any] | None, bank: Tensor) -> PromptTask:
    parts = (model, PromptLoss(config.loss), world, validation)
    settings: dict[str, Any] = {
        "bank": bank if config.evaluation.context == "bank" else None,
        "precision": config.precision,
    }
    shared = shares_batch(config, world)
    if config.task == "residual":
        if shared:
            raise UserError("scope: task residual runs on several processes under scope local, or on one")
        return ResidualTask(*parts, context=bank, **settings)
    if shared:
        may_miss = config.data.on_bad_image == "skip" and not config.data.cache_features
        return GlobalPromptTask(*parts, may_miss=may_miss, **settings)
    return PromptTask(*parts, **settings)


def labelled_manifest(config: TrainConfig, path: str) -> Manifest:
    """A manifest whose samples have labels."""
    data = config.data
    names = None if data.label_names is None else load_label_names(data.label_names)
    return load_manifest(path, image_root=data.image_root, label_names=names, need="labels")


def _bank(
    config: TrainConfig,
    manifest: Manifest,
    pixels: Pixels,
    features_of: Callable[[ImageDataset, str], CachedBatches],
) -> ImageFeatures:
    """Features of a seeded choice of training images, not augmented."""
    count = min(config.evaluation.bank_size, len(manifest.samples))
    chosen = np.random.default_rng(config.seed).choice(len(manifest.samples), count, replace=False)
    subset = replace(manifest, samples=[manifest.samples[i] for i in sorted(chosen)])
    return features_of(make_dataset(config, subset, pixels, augment=False), "context bank").features


def _data(config: TrainConfig, labels: np.ndarray) -> str:
    """What a run trains on, in words."""
    images, classes = labels.shape
    positives = int((labels == 1).any(axis=0).sum())
    pairs = f", {classes * (classes - 1) // 2:,} pairs" if PAIR_LOSSES[config.loss.pair].needs_pairs else ""
    return f"{images:,} images, {positives} of {classes} classes with positives{pairs}"


def _report_classes(names: list[str], labels: np.ndarray) -> None:
    """Name the classes that have one label value only: they train, but validation cannot score them."""
    single = [
        name for name, column in zip(names, labels.T, strict=True) if not (column == 1).any() or not (column == 0).any()
    ]
    if single:
        log.info(
            f"{len(single)} of {len(names)} classes have one label value only in training: {', '.join(single[:10])}"
        )
