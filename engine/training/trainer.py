"""The training loop: epochs of DeepSpeed steps, validation, checkpoints, exact resume. It knows tasks, not models."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checkpoints.integrity import State
from ..checkpoints.run import good_checkpoint, last_checkpoint, load_tensors, save_checkpoint
from ..distributed.collectives import all_gather_object, barrier, broadcast_buffers
from ..distributed.deepspeed import Engine
from ..distributed.watch import advance
from ..distributed.world import World
from ..models.weights import check_fit
from ..utils.device import autocast_dtype, peak_bytes, reserved_bytes
from ..utils.errors import UserError
from ..utils.numerics import numerics
from .config import TrainConfig, check_fresh, graph_needs, loggers_of
from .cuda_graph import Recorder, StepGraph
from .fingerprint import FORK_CHANGES, FORKABLE, as_written, flat_settings
from .fork import check_same_parent, parent_checkpoint, read_fork, write_fork
from .images_ahead import ImagesAhead, with_next
from .optimizer import learning_rate, make_optimizer
from .profile import StepProfiler
from .remarks import Remarks
from .tasks import PromptTask
from .telemetry import LoaderWatch, Telemetry

log = logging.getLogger(__name__)


class Batches(Protocol):
    """Training batches whose order and pixels are a function of (seed, epoch) alone."""

    batches_per_epoch: int
    bad: dict[str, str]
    """id → reason of the samples left out so far on this rank"""

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Any]: ...


class Task(Protocol):
    """One training objective."""

    module: Any
    """nn.Module that trains; called with `inputs(batch)`"""

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        """Arguments of the module: moves the batch to the device and runs what is frozen."""

    def loss(self, output: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss to minimise and detached scalars to log."""

    def bad(self) -> dict[str, str]:
        """id → reason of the validation samples left out on this rank."""

    def validate(self, module: Any) -> dict[str, float]:
        """Metrics of the validation split with the weights of `module`; every rank calls it and gets the same."""

    def score(self, metrics: dict[str, float]) -> float | None:
        """Score of an epoch, of which the best has most; None: no validation, the last epoch is the best."""

    # Two more that a task may have. `scalars()`: detached scalars of its weights to log, read at log points only;
    # `picture()`: after a validation, a picture (h,w,3) of it for the loggers, or None.


def step_seed(seed: int, batch: int, rank: int) -> int:
    """Seed of the random draws (dropout) of one batch: a function of its arguments, so resuming needs no state."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{batch}/{rank}".encode()).digest()[:8]) >> 1


class Trainer:
    """Trains a task's module and keeps the run folder.

    Args:
        config: the resolved configuration; `output` is the run folder.
        task: the objective.
        loader: training batches.
        world: this process.
        fingerprint: what a checkpoint must have been made with to be continued, `key → JSON value`.
    """

    def __init__(
        self, config: TrainConfig, task: Task, loader: Batches, world: World, fingerprint: dict[str, Any]
    ) -> None:
        self.config, self.task, self.loader, self.world = config, task, loader, world
        self.run = Path(config.output)
        self.steps_per_epoch = loader.batches_per_epoch // config.optim.accumulate
        self.fingerprint = {**fingerprint, "optimizer steps an epoch": self.steps_per_epoch}
        self.epoch, self.step = 0, 0
        self.best: dict[str, Any] = {"best_step": None, "best_score": None}
        checkpoint, state = self._resume_from() or (None, None)
        if checkpoint:
            load_into(task.module, checkpoint / "model.safetensors")
        optimizer = make_optimizer(task.module, config.optim)
        if state:
            assert state.epoch is not None
            self.epoch, self.step = state.epoch, state.step
            self.best = {"best_step": state.best_step, "best_score": state.best_score}
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: learning_rate(step, self.steps_per_epoch, config.optim) / config.optim.lr,
            last_epoch=self.step - 1,
        )
        self.engine = Engine(
            task.module,
            optimizer,
            scheduler,
            world,
            batch_size=config.batch_size,
            accumulate=config.optim.accumulate,
            clip_norm=config.optim.clip_norm,
            zero_stage=config.zero_stage,
            autocast=autocast_dtype(config.precision, world.device),
        )
        recordable = config.cuda_graphs != "off" and world.device.type == "cuda" and graph_needs(config) is None
        self.graph: StepGraph | None = None
        self.ahead: ImagesAhead | None = None
        if recordable:
            self.record()
        self.average: AveragedModel | None = None
        if config.optim.ema_decay:
            self.average = AveragedModel(
                task.module, multi_avg_fn=get_ema_multi_avg_fn(config.optim.ema_decay), use_buffers=False
            )
            # The copy is evaluated outside DeepSpeed, whose hooks came along with it.
            self.average.module._forward_pre_hooks.clear()
            self.average.module._forward_hooks.clear()
            # The first update of a fresh average copies the weights; a restored one must go on averaging.
            self.average.n_averaged.fill_(self.step)
        if checkpoint and state:
            self.engine.load_optimizer_state(load_tensors(checkpoint / "optimizer.safetensors"))
            if self.average is not None:
                load_into(self.average.module, checkpoint / "ema.safetensors")
            self.engine.load_scaler(state.scaler)
        self.telemetry = Telemetry(
            self.run,
            active=world.is_main,
            step=self.step,
            loggers=loggers_of(config),
            settings=flat_settings(config) if world.is_main else {},
            metrics=("loss", "val_loss" if config.task == "contrastive" else "val_macro_auc"),
        )
        self.profiler = StepProfiler(config.profile, self.run, world.rank)
        epochs = config.optim.epochs
        self.remarks = Remarks(epochs, epochs * self.steps_per_epoch, self.step, active=world.is_main)
        cache = "" if config.data.cache else ", or decode them once: pspg-engine prepare cache, data.cache"
        self.waits = LoaderWatch(f"raise data.workers ({config.data.workers}){cache}", active=world.is_main)

    def record(self, recorder: Recorder | None = None) -> None:
        """Record steps from now on.

        Ranks that share a batch average gradients within the recording where every batch is a step; else the engine
        does so, once a step.

        Args:
            recorder: as of `StepGraph`.
        """
        task: Any = self.task
        together = self.config.scope == "global" and self.world.size > 1
        ranks = {"together": together, "reduce": together and self.config.optim.accumulate == 1}
        if self.config.images_ahead and isinstance(task, PromptTask) and not self.config.data.cache_features:
            self.ahead = ImagesAhead(task, self.world.device, recorder, **ranks)
        else:
            self.graph = StepGraph(task, self.world.device, recorder, **ranks)

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch.

        Returns:
            `step`, `best_step`, `best_score`, and the metrics of the last validation this call made.

        Raises:
            UserError: the loss is no longer finite.
        """
        metrics: dict[str, float] = {}
        failed = True
        try:
            self.profiler.step()
            while self.epoch < self.config.optim.epochs and not self._waited_long():
                self._train_epoch()
                broadcast_buffers(self.evaluated)
                metrics = self._validate()
            failed = False
        finally:
            self.profiler.stop()
            self.telemetry.close(failed=failed)
            if self.graph is not None:
                self.graph.close()
            if self.ahead is not None:
                self.ahead.graph.close()
        return {"step": self.step, **self.best, **metrics}

    def _waited_long(self) -> bool:
        """As many epochs have passed without a better one as the settings allow."""
        patience, best = self.config.optim.patience, self.best["best_step"]
        if not patience or best is None:
            return False
        fork = read_fork(self.run)
        since = max(best, 0 if fork is None else fork.step)  # what the parent waited for does not count
        if self.epoch - since // self.steps_per_epoch < patience:
            return False
        if self.world.is_main:
            log.info(f"no better epoch for {patience}: training ends after epoch {self.epoch} (optim.patience)")
        return True

    def bad(self) -> dict[str, str]:
        """id → reason of the samples left out, in training and validation, on every rank."""
        return {
            name: why
            for part in all_gather_object({**self.loader.bad, **self.task.bad()})
            for name, why in part.items()
        }

    @property
    def evaluated(self) -> Any:
        """The weights that are validated and published: the average if there is one."""
        return self.task.module if self.average is None else self.average.module

    def _train_epoch(self) -> None:
        accumulate = self.config.optim.accumulate
        start = (self.step - self.epoch * self.steps_per_epoch) * accumulate
        last = self.steps_per_epoch * accumulate
        sums: dict[str, Tensor] = {}
        pending = 0
        # Ranks that share one batch draw the same dropout.
        rank = 0 if self.config.scope == "global" else self.world.rank
        self.task.module.train()
        self.telemetry.epoch(
            self.epoch,
            self.config.optim.epochs,
            last * self.config.batch_size,
            start * self.config.batch_size,
        )
        batches = self.waits.watch(self.loader.batches(self.epoch, start))
        pairs = with_next(batches, ahead=self.ahead is not None)
        for number, (batch, following) in enumerate(pairs, start + 1):
            advance()
            torch.manual_seed(step_seed(self.config.seed, self.epoch * last + number, rank))
            replayed, graph = None, self.graph
            if self.ahead is not None:
                replayed, graph = self.ahead(batch, following), self.ahead.graph
            elif graph is not None:
                replayed = graph(batch)
            if replayed is None:
                loss, parts = self.task.loss(self.engine(*self.task.inputs(batch)), batch)
                self.engine.backward(loss)
                loss = loss.detach()  # nothing of this step's graph may live while another is recorded
            else:
                loss, parts, gradients = replayed
                self.engine.accumulate(gradients, reduced=graph is not None and graph.reduce)
                del gradients  # they keep the memory of a recording, which the next step may replace
            # What a row needs of this step is computed only where a row is written.
            whole, upcoming = number % accumulate == 0, self.step + 1
            save = whole and self.config.save_every and upcoming % self.config.save_every == 0 and number < last
            due = whole and (upcoming % self.config.log_every == 0 or number == last or save)
            lr = self.engine.lr
            norm = self.engine.step(norm=bool(due))
            for key, value in {"loss": loss, **parts}.items():
                sums[key] = sums[key] + value if key in sums else value.clone()
            pending += 1
            self.telemetry.batch(self.config.batch_size)
            if not whole:
                continue
            self.step += 1
            if self.average is not None:
                self.average.update_parameters(self.task.module)
            if due:
                self._log(sums, pending, lr, norm)
                sums, pending = {}, 0
            self.profiler.step()
            if save:
                self._save()
        self.telemetry.end_epoch()
        self.epoch += 1

    def _log(self, sums: dict[str, Tensor], batches: int, lr: float, norm: Tensor | None) -> None:
        """Read the sums (here the host waits for the device), average them over ranks, and stop on a lost run."""
        read = {key: value.double() / batches for key, value in sums.items()}
        if norm is not None:
            read["gradient_norm"] = norm.double().to(self.world.device)
        read |= {key: value.double() for key, value in getattr(self.task, "scalars", dict)().items()}
        values = torch.stack(list(read.values()))
        clock = time.perf_counter()
        own = values.tolist()
        device_wait = time.perf_counter() - clock
        of_ranks = all_gather_object((own, self._fingers()))
        if len({fingers for _, fingers in of_ranks}) > 1:
            raise UserError(
                f"the ranks' weights differ after step {self.step}, which they cannot on GPUs of one kind; "
                "set cuda_graphs to off"
            )
        means = torch.tensor([values for values, _ in of_ranks], dtype=torch.float64).mean(0).tolist()
        row: dict[str, Any] = {"step": self.step, "epoch": self.epoch, "lr": lr}
        row.update(zip(read, means, strict=True))
        row["images_per_s"] = self.telemetry.images_per_second()
        row["loader_wait"] = self.waits.share(device_wait)
        self.telemetry.log(row)
        if not math.isfinite(row["loss"]):
            raise UserError(f"training diverged: the loss is {row['loss']} at step {self.step}; {self._advice()}")
        self.remarks.logged(row, batches)

    def _fingers(self) -> int:
        """Sum of the bits of the weights, where ranks compute the same gradients on their own; else 0.

        Summed as integers, in whatever order, it is the same for the same weights.
        """
        graph = self.graph if self.ahead is None else self.ahead.graph
        if graph is None or not graph.reduce:
            return 0
        weights = [weight.detach() for weight in self.task.module.parameters() if weight.dtype == torch.float32]
        return int(torch.stack([weight.view(torch.int32).sum() for weight in weights]).sum())

    def _advice(self) -> str:
        last = last_checkpoint(self.run)
        return "lower optim.lr or set optim.clip_norm" + (f" (last good checkpoint: {last})" if last else "")

    def _validate(self) -> dict[str, float]:
        """Validate, remember the best epoch, log and save."""
        with self.engine.whole() as trained:
            metrics = self.task.validate(trained if self.average is None else self.average.module)
        graph = self.graph if self.ahead is None else self.ahead.graph
        if graph is not None:
            graph.runs_beside()
        score, best = self.task.score(metrics), self.best["best_score"]
        if score is not None and math.isfinite(score) and (best is None or score > best):
            self.best = {"best_step": self.step, "best_score": score}
        memory = all_gather_object((peak_bytes(self.world.device), reserved_bytes(self.world.device)))
        peaks, reserved = (list(column) for column in zip(*memory, strict=True))
        row: dict[str, Any] = {"step": self.step, "epoch": self.epoch - 1, **metrics, "peak_bytes": peaks}
        if all(reserved):
            row["reserved_bytes"] = reserved
        self.telemetry.log(row)
        picture = getattr(self.task, "picture", lambda: None)() if self.world.is_main else None
        if picture is not None:
            self.telemetry.picture("examples", picture, self.step)
        best_step = self.best["best_step"]
        best_epoch = None if best_step is None else best_step // self.steps_per_epoch
        self.remarks.validated(self.epoch, self.engine.lr, metrics, best_epoch)
        self._save()
        return metrics

    def _save(self) -> None:
        tensors = {"model": self.engine.state(), "optimizer": self.engine.optimizer_state()}
        if not all(tensor.isfinite().all() for tensor in tensors["model"].values()):
            raise UserError(f"training diverged: weights are not finite after step {self.step}; {self._advice()}")
        if self.average is not None:
            tensors["ema"] = self.engine.state(self.average.module)
        if self.world.is_main:
            state = {
                "step": self.step,
                "epoch": self.epoch,
                **self.best,
                "scaler": self.engine.scaler_state(),
                "contract": self.fingerprint,
                "numerics": numerics(),
            }
            save_checkpoint(self.run, self.step, tensors, state)
        advance()
        barrier()

    def _resume_from(self) -> tuple[Path, State] | None:
        check_fresh(self.config)
        found = None if self.config.resume is None else good_checkpoint(self.run)
        if found is None and self.config.fork is not None:
            return self._fork()
        if self.world.is_main and self.config.resume is not None:
            log.info(f"resuming from {found[0]}" if found else f"{self.run} holds no checkpoint yet: starting fresh")
        if found:
            check_same_parent(self.config)
            self._check_state(*found)
        return found

    def _fork(self) -> tuple[Path, State]:
        """Begin the run as a fork, once everything about it is checked; its first checkpoint."""
        checkpoint, state = parent_checkpoint(self.config)
        self._check_state(checkpoint, state, FORKABLE)
        if self.world.is_main:
            write_fork(self.config, checkpoint, state, self.fingerprint)
        barrier()
        return self.run / "checkpoints" / checkpoint.name, state

    def _how_to_change(self, key: str) -> str:
        if key in FORKABLE:
            return f"--fork {self.run} starts a run from it in which this may change, or resume with the same settings"
        return "resume with the same settings or start another run"

    def _check_state(self, checkpoint: Path, state: State, may_differ: Collection[str] = ()) -> None:
        """Refuse a state that this run cannot have written, or that it may not fork.

        Raises:
            UserError: impossible numbers, or other settings.
        """
        steps = self.steps_per_epoch
        if state.epoch is None or state.contract is None:
            raise UserError(f"{checkpoint / 'state.json'}: is not the state of a training run")
        for key, value in self.fingerprint.items():
            if state.contract.get(key) != value and key not in may_differ:
                advice = f"a fork may change {FORK_CHANGES}" if may_differ else self._how_to_change(key)
                theirs, ours = as_written(state.contract.get(key)), as_written(value)
                raise UserError(f"{key}: {checkpoint} was made with {theirs}, this run asks for {ours}; {advice}")
        if not state.epoch * steps <= state.step <= (state.epoch + 1) * steps or state.epoch > self.config.optim.epochs:
            raise UserError(
                f"{checkpoint / 'state.json'}: step {state.step} after {state.epoch} epochs, and an epoch has {steps}; "
                "the file is damaged"
            )


def load_into(module: nn.Module, file: Path) -> None:
    """Load a checkpoint's weights, also into scalars that DeepSpeed holds as one-element vectors.

    Raises:
        UserError: unreadable, or keys or shapes do not fit.
    """
    own, tensors = module.state_dict(), load_tensors(file)
    scalars = {name: tensor.view(()) for name, tensor in own.items() if tensor.shape == (1,) and name in tensors}
    check_fit({**own, **{name: t for name, t in scalars.items() if tensors[name].ndim == 0}}, tensors, file)
    with torch.no_grad():
        for name, target in own.items():
            target.copy_(tensors[name].view(target.shape))
