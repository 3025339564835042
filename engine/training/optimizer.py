"""Optimizer of a run: groups of parameters, and the learning rate by step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .config import OptimConfig


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameters with and without weight decay: biases, norms and the temperature (at most 1-D) go without.

    A residual has a learning rate and a decay of its own.
    """
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    parameters = [parameter for name, parameter in named if not name.startswith("residual.")]
    lr, decay = config.lr, config.weight_decay
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "lr": lr, "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
        {
            "params": [p for name, p in named if name.startswith("residual.")],
            "lr": lr if config.residual_lr is None else config.residual_lr,
            "weight_decay": decay if config.residual_decay is None else config.residual_decay,
        },
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum or AdamW over `parameter_groups`."""
    groups = parameter_groups(module, config)
    for group in groups:
        group["initial_lr"] = group["lr"]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)


def learning_rate(step: int, steps_per_epoch: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0: linear warm-up, then cosine or constant.

    The cosine counts from the end of the warm-up or, with `cosine_from: start`, from step 0, and is entered late.
    """
    epochs = min(5, config.epochs / 2) if config.warmup_epochs is None else config.warmup_epochs
    warmup = round(epochs * steps_per_epoch)
    if step < warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup
    if config.schedule == "constant":
        return config.lr
    start = warmup if config.cosine_from == "warmup" else 0
    progress = (step - start) / max(config.epochs * steps_per_epoch - start, 1)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
