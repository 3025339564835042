"""Processes, DeepSpeed, and optimizer state gathered to whole tensors. The one file that imports deepspeed."""

from __future__ import annotations

import atexit
import inspect
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(device: str) -> World:
    """Join the process group that a launcher announced, or make a group of one.

    Args:
        device: auto, cpu or cuda.

    Raises:
        UserError: no GPU for a rank that was asked to use one.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for but torch sees no GPU; use device cpu or auto")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"device: local rank {local_rank} has no GPU, this machine has {torch.cuda.device_count()}; "
            "start fewer processes or use device cpu"
        )
    os.environ["DS_ACCELERATOR"] = "cuda" if use_cuda else "cpu"
    if use_cuda:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        # Once a process: DeepSpeed keeps the group for good, so a second run in this process joins the same one.
        _join("nccl" if use_cuda else "gloo")
    torch_device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), torch_device)


def _join(backend: str) -> None:
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend)
    else:
        # No launcher. A group of one needs no port, and with these set DeepSpeed does not look for MPI.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    atexit.register(dist.destroy_process_group)


class Engine:
    """A DeepSpeed engine around what trains, whose state is seen whole at any ZeRO stage.

    Args:
        module: what trains. Its weights must already be the ones to start from.
        batch_size: images a batch over all processes.
        accumulate: batches an optimizer step.
        clip_norm: largest gradient norm; 0: no clipping.
        autocast: dtype of torch autocast in the module's forward; None: full precision. Parameters keep their
            own dtype, so the weights of the module are the master weights.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        world: World,
        *,
        batch_size: int,
        accumulate: int,
        clip_norm: float,
        zero_stage: int,
        autocast: torch.dtype | None,
    ) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed
        import deepspeed.ops

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if world.device.type == "cpu":
            # Else the first call compiles a shared-memory collective for over a minute; gloo serves.
            deepspeed.ops.__compatible_ops__ = {}
        self.module = module
        self._scalars = [name for name, parameter in module.named_parameters() if parameter.ndim == 0]
        for name in self._scalars:
            # DeepSpeed cannot broadcast or clip 0-dimensional parameters; (1,) broadcasts alike in the forward.
            parameter = module.get_parameter(name)
            parameter.data = parameter.data.view(1)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": batch_size // world.size,
                "gradient_accumulation_steps": accumulate,
                "gradient_clipping": clip_norm,
                "zero_optimization": {"stage": zero_stage},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**31,
                "torch_autocast": {
                    "enabled": autocast is not None,
                    "dtype": str(autocast or torch.bfloat16).removeprefix("torch."),
                },
            },
        )
        self._partitioned = bool(self._engine.zero_optimization())
        self._optimizer = self._engine.optimizer.optimizer if self._partitioned else self._engine.optimizer
        if self._partitioned:
            self._link_state()

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`, averaged over the ranks and the accumulated batches."""
        self._engine.backward(loss)

    def step(self) -> None:
        """Update the weights and the schedule if this batch completes the accumulation."""
        self._engine.step()

    @property
    def lr(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def state(self, module: nn.Module | None = None) -> dict[str, Tensor]:
        """State dict of `module` (default: what trains; also a copy of it) on the CPU, in its stock shapes."""
        tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in (module or self.module).state_dict().items()
        }
        for name in self._scalars:
            tensors[name] = tensors[name].view(())
        return tensors

    def optimizer_state(self) -> dict[str, Tensor]:
        """Optimizer state as `<parameter>/<key>`, each tensor whole and on the CPU. Every rank must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            if self._partitioned:
                entries = next(iter(self._optimizer.state.values()))
            else:
                entries = self._optimizer.state[parameter]
            for key, value in entries.items():
                if not torch.is_tensor(value):
                    continue
                if self._partitioned and key != "step":
                    value = safe_get_full_optimizer_state(parameter, key)
                state[f"{name}/{key}"] = value.detach().to("cpu", copy=True)
        return state

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Take what `optimizer_state` returned, at any number of ranks and any ZeRO stage.

        Raises:
            UserError: the state belongs to other parameters.
        """
        from deepspeed.utils import safe_set_full_optimizer_state

        parameters = dict(self.module.named_parameters())
        entries: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
        for path, value in state.items():
            name, _, key = path.rpartition("/")
            if name not in entries:
                raise UserError(f"optimizer.safetensors: holds the state of an unknown parameter, {name}")
            entries[name][key] = value
        if not self._partitioned:
            for name, values in entries.items():
                device = parameters[name].device
                self._optimizer.state[parameters[name]] = {key: value.to(device) for key, value in values.items()}
            return
        for name, values in entries.items():
            for key, value in values.items():
                if key != "step":
                    safe_set_full_optimizer_state(parameters[name], value.to(parameters[name].device), key)
        for state_of_group in self._optimizer.state.values():
            if "step" in state_of_group:
                state_of_group["step"].copy_(next(iter(entries.values()))["step"])

    def _link_state(self) -> None:
        """Create the zero state of every flat group and tie each parameter to its slice of it.

        DeepSpeed ties them after the first group's first step, when the other groups have no state yet, and then never
        again; their state could be neither read nor set.
        """
        probe = nn.Parameter(torch.zeros(1, device=self._optimizer.param_groups[0]["params"][0].device))
        probe.grad = torch.zeros_like(probe)
        kind = type(self._optimizer)
        known = inspect.signature(kind).parameters
        trial = kind([probe], **{key: value for key, value in self._optimizer.defaults.items() if key in known})
        trial.step()
        for group in self._optimizer.param_groups:
            for flat in group["params"]:
                self._optimizer.state[flat] = {
                    key: torch.zeros_like(value if key == "step" else flat)
                    for key, value in trial.state[probe].items()
                    if torch.is_tensor(value)
                }
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def broadcast_buffers(module: nn.Module) -> None:
    """Give every rank rank 0's buffers (running means of batch normalisation drift apart)."""
    for buffer in module.buffers():
        dist.broadcast(buffer, 0)


def gather(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for every rank."""
    dist.barrier()
