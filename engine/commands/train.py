"""`pspg-engine train`: check the settings, meet the other ranks, and train either phase."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.run import last_checkpoint
from ..data.bad_image import report_bad
from ..data.loaders.choose import pick_loader
from ..distributed.launcher import launcher_environment, run_marks
from ..distributed.watch import watch
from ..distributed.world import World, device_of, start
from ..models.fusions import FUSIONS
from ..models.pspg import check_head
from ..training.config import TrainConfig, check_fresh, check_run, graph_needs
from ..training.contrastive import build_contrastive
from ..training.losses import PromptLoss
from ..training.losses.pair import PAIR_LOSSES
from ..training.plan import plan
from ..training.prompt_learning import build_prompt
from ..training.trainer import Trainer
from ..utils.errors import UserError
from ..utils.freed_memory import freed_memory_kept
from ..utils.lock import one_writer
from ..utils.logging import OF_EACH
from ..utils.settings import as_settings

log = logging.getLogger(__name__)


def train(config: TrainConfig | Mapping[str, Any] | str | Path | None = None, **more: Any) -> dict[str, Any]:
    """Run one phase and return what `Trainer.fit` returns; nothing after a dry run.

    Args:
        config, more: settings, as `utils.settings.as_settings` takes them.

    Raises:
        UserError: whatever the user has to correct, before anything is written where possible.
    """
    config = as_settings(TrainConfig, config, **more)
    check_run(config)
    check_parts(config)
    config = replace(config, loss=PromptLoss(config.loss).config)
    if config.dry_run:
        info = launcher_environment()
        for line in plan(config, info, device_of(config.device, info)):
            log.info(line, extra=OF_EACH)
        return {}
    world = start(config.device, config.timeout_s, run=run_marks(f"train {config.output}", config))
    with _watch(config, world), _only_writer(config, world), freed_memory_kept(world.device):
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


@contextmanager
def _only_writer(config: TrainConfig, world: World) -> Iterator[None]:
    """Hold the run folder; the first process does so for all.

    Raises:
        UserError: another training holds it.
    """
    if not world.is_main:
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(one_writer(config.output))
        except UserError as error:
            error.local = True  # the others do not know
            raise
        yield


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
    """A watch over what the ranks do together."""
    run = Path(config.output)

    def tell_lost(line: str) -> None:
        try:
            last = last_checkpoint(run)
        except UserError:
            last = None
        kept = f"last good checkpoint: {last}, go on with --resume latest" if last else "there is no checkpoint yet"
        log.error(f"pspg-engine train: error: {line}; {kept}")

    return watch(world, config.timeout_s, tell_lost)


def make_trainer(config: TrainConfig, world: World) -> Trainer:
    """Trainer of a run, from its newest checkpoint if it is resumed.

    Raises:
        UserError: see `train`.
    """
    if config.cuda_graphs == "on" and world.device.type != "cuda":
        raise UserError("cuda_graphs: needs a GPU, torch sees none")
    need = graph_needs(config)
    if config.cuda_graphs == "on" and need:
        raise UserError(f"cuda_graphs: needs {need}")
    if config.model.text_drop_path and world.size > 1 and config.scope == "global":
        raise UserError("model.text_drop_path: is drawn by each process for its own texts; set scope to local")
    bicubic = config.data.augment and config.data.augment_bicubic
    torch_only = "data.augment_bicubic" if bicubic else None
    loader = pick_loader("data.loader", config.data.loader, world.device, torch_only=torch_only)
    config = replace(config, data=replace(config.data, loader=loader))
    run = Path(config.output)
    check_fresh(config)
    if (run / "model.safetensors").exists():
        raise UserError(f"output: {run} holds an exported or imported model; choose another folder")
    torch.manual_seed(config.seed)
    build = build_contrastive if config.task == "contrastive" else build_prompt
    return build(config, world)
