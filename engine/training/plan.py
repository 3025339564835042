"""What a run would do, told without starting it: `pspg-engine train … --dry_run`."""

from __future__ import annotations

import socket

import torch
from torch import nn

from pspg.kernels.text_tower import default_memory

from ..checkpoints.model_folder import read_description
from ..data.labels import select_classes
from ..data.manifest import load_manifest
from ..data.sampler import EpochSampler, share_of
from ..distributed.launcher import RankInfo
from ..models.clip import build_clip, clip_config
from ..models.hub import CONFIG, local_folder
from ..models.pspg import PromptHead
from ..utils.device import autocast_dtype
from .config import TrainConfig
from .fork import origin
from .optimizer import make_optimizer
from .prompt_learning import labelled_manifest
from .setup import backbone_in_words

MIB = 2**20


def plan(config: TrainConfig, info: RankInfo | None, device: torch.device) -> list[str]:
    """Lines of one rank: its place, device and share of a batch; of rank 0 also parameters and bytes of every rank.

    No process group is joined, no image or weight is read; rank 0 reads the training manifest. Of activations
    only those of the text tower in phase 2 are counted, which holds them by budget.

    Raises:
        UserError: the ranks cannot share the batch, or manifest, classes or backbone are unusable.
    """
    rank, size = (info.rank, info.world_size) if info else (0, 1)
    share = share_of(config.batch_size, size)
    place = f"rank {rank} of {size} on {socket.gethostname()}"
    if info:
        place += f" (local {info.local_rank} of {info.local_world_size}), rank 0 at {info.address}:{info.port}"
    lines = [f"{place}: {device}, {share} of the {config.batch_size} images of a batch"]
    return lines if rank else [*lines, *_whole(config, size, device)]


def _whole(config: TrainConfig, size: int, device: torch.device) -> list[str]:
    """Lines about all ranks."""
    autocast, data, classes = autocast_dtype(config.precision, device), config.data, 0
    if config.task == "contrastive":
        samples = load_manifest(data.train, image_root=data.image_root, need="text").samples
    else:
        manifest = labelled_manifest(config, data.train)
        samples, classes = manifest.samples, len(select_classes(manifest.label_names or [], data.class_names)[0])
    accumulate = config.optim.accumulate
    batches = EpochSampler(len(samples), batch_size=config.batch_size, world_size=size, accumulate=accumulate)
    steps = batches.batches_per_epoch // accumulate
    with torch.device("meta"):
        clip = build_clip(_architecture(config))
        trained = clip if config.task == "contrastive" else _head(config, clip, classes)
    optimizer = make_optimizer(trained, config.optim)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    training, stage = sum(p.numel() for p in parameters), config.zero_stage
    frozen = 0 if trained is clip else sum(p.numel() for p in clip.parameters())
    tensors = 2 if config.optim.name == "adamw" else int(config.optim.momentum > 0)
    # Gradients are summed whole before ZeRO 1 and 2 keep a part of them.
    bytes_of = {
        "weights": 4 * training / (size if stage == 3 else 1),
        "gradients": 4 * training / (size if stage >= 2 else 1),
        "optimizer state": 4 * tensors * training / (size if stage else 1),
        "average of the weights": 4 * training if config.optim.ema_decay else 0,
        # The CLIP as it was loaded, and the towers as inference has them.
        "frozen towers": (4 + (2 if autocast else 4)) * frozen,
        "text activations": _text_budget(config, device) if config.task == "prompt" else 0,
    }
    left = "those of images" if bytes_of["text activations"] else "activations"
    listing = ", ".join(f"{name} {count / MIB:,.1f}" for name, count in bytes_of.items() if count)
    return [
        f"task {config.task}, {backbone_in_words(config)}: {training:,} parameters train, {frozen:,} are frozen; "
        f"{'fp32' if autocast is None else str(autocast).removeprefix('torch.')}, {config.optim.name}, ZeRO {stage}, "
        f"scope {config.scope}",
        f"{len(samples):,} images{f' with {classes} classes' if classes else ''}, {config.batch_size} images a batch, "
        f"{steps:,} steps an epoch, {steps * config.optim.epochs:,} in all",
        f"MiB of each rank, by formula: {listing}, {sum(bytes_of.values()) / MIB:,.1f} in all; {left} come on top",
        "dry run: nothing was started",
    ]


def _text_budget(config: TrainConfig, device: torch.device) -> int:
    """Bytes of the text tower's activations that phase 2 holds at a time, gradients beside them not counted."""
    return default_memory(device) if config.text_memory is None else config.text_memory * MIB


def _architecture(config: TrainConfig) -> dict[str, object]:
    """Of the run that is continued or forked, of the model that is started from, or by name."""
    folder = origin(config)
    if folder is None and config.model.pretrained:
        folder = local_folder(config.model.pretrained, "model.pretrained")
    if folder is not None and (folder / "model.json").is_file():
        found: dict[str, object] = read_description(folder)["clip"]
        return found
    if folder is not None and (folder / CONFIG).is_file():
        return clip_config(str(folder / CONFIG))
    return clip_config(config.model.backbone)


def _head(config: TrainConfig, clip: nn.Module, classes: int) -> nn.Module:
    width, joint = clip.text_projection.shape  # type: ignore[misc]
    head = PromptHead(joint, width, config.model, classes)
    if config.task == "residual":
        assert head.residual is not None
        return head.residual
    return head
