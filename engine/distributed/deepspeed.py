"""The DeepSpeed engine, its state gathered to whole tensors. The one file that imports deepspeed."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.errors import UserError
from .loss_scale import LossScale
from .world import World

SHARDED = {
    # By default weights stay whole up to 10^5 elements, and all of a model of under 10^9 from forward to backward.
    "stage3_param_persistence_threshold": 4096,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 5_000_000,
    "reduce_bucket_size": 50_000_000,
}
"""DeepSpeed's settings under ZeRO stage 3, in elements"""


class Engine:
    """A DeepSpeed engine around what trains, whose state is seen whole at any ZeRO stage.

    Args:
        module: what trains. Its weights must already be the ones to start from.
        batch_size: images a batch over all processes.
        accumulate: batches an optimizer step.
        clip_norm: largest gradient norm; 0: no clipping.
        zero_stage: 3 leaves each rank a shard of every weight. They are whole only while the submodule that holds them
            runs, called through this engine, by all ranks alike; and under `whole`.
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
        self._sharded = zero_stage == 3
        # Meta tensors take no memory.
        self._plain = deepcopy(module).to("meta") if self._sharded else module
        self._accumulate = accumulate
        linear = F.linear
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": batch_size // world.size,
                "gradient_accumulation_steps": accumulate,
                "gradient_clipping": clip_norm,
                "zero_optimization": {"stage": zero_stage, **(SHARDED if self._sharded else {})},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 2**31,
                "torch_autocast": {
                    "enabled": autocast is not None,
                    "dtype": str(autocast or torch.bfloat16).removeprefix("torch."),
                },
            },
        )
        # ZeRO stage 3 replaces it in the whole process, by a function that holds no whole weights until the backward.
        self._linear, F.linear = F.linear, linear
        self._partitioned = bool(self._engine.zero_optimization())
        if world.size == 1 and not self._partitioned:
            # One rank's gradients are the average; reducing them copies all of them out of a flat buffer and back.
            self._engine.enable_backward_allreduce = False
        self._optimizer = self._engine.optimizer.optimizer if self._partitioned else self._engine.optimizer
        self._scheduler = scheduler
        self._loss_scale = LossScale() if self._partitioned and autocast == torch.float16 else None
        if self._partitioned:
            # In the stead of the loss scale; also left by an engine in fp16 that this process had before.
            self._engine.optimizer.torch_autocast_gradscaler = None
        if self._loss_scale is not None:
            self._engine.optimizer.check_grad_overflow = True
            self._engine.optimizer.override_loss_scale(self._loss_scale.scale)
        if self._partitioned:
            self._link_state()

    def __call__(self, *inputs: Any) -> Any:
        linear, F.linear = F.linear, self._linear
        try:
            return self._engine(*inputs)
        finally:
            F.linear = linear

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`, averaged over the ranks and the accumulated batches."""
        self._engine.backward(loss)

    def accumulate(self, gradients: Sequence[Tensor | None], *, reduced: bool = False) -> None:
        """Accumulate gradients that a recorded step has computed, as `backward` of its loss does; without ZeRO.

        Where every batch is a step they are taken as they are, and must last until `step`.

        Args:
            gradients: by the parameters that train, None for those without.
            reduced: they are means over the ranks already.
        """
        parameters = [parameter for _, parameter in self._trained()]
        known = [(p, gradient) for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
        fresh = [gradient for _, gradient in known]
        if self._accumulate > 1:
            fresh = list(torch._foreach_mul(fresh, 1 / self._accumulate))
        before = [(p.grad, new) for (p, _), new in zip(known, fresh, strict=True) if p.grad is not None]
        if before:
            torch._foreach_add_(*map(list, zip(*before, strict=True)))
        for (parameter, _), new in zip(known, fresh, strict=True):
            parameter.grad = new if parameter.grad is None else parameter.grad
        if self._engine.enable_backward_allreduce and not reduced:
            self._engine.allreduce_gradients()

    def step(self, *, norm: bool = False) -> Tensor | None:
        """Update the weights and the schedule if this batch completes the accumulation.

        Where a gradient of fp16 overflows, on any rank, no rank updates a weight; the schedule goes on.

        Args:
            norm: also return the norm of the gradient before clipping, a scalar that nothing has waited for.
        """
        found = self._gradient_norm() if norm and not self._partitioned else None
        completes = self._engine.is_gradient_accumulation_boundary()
        self._engine.step()
        if norm and self._partitioned:  # it sums over shards while it steps
            found = torch.as_tensor(self._engine.get_global_grad_norm())
        if self._loss_scale is not None and completes:
            self._follow_overflow(self._loss_scale)
        return found

    def _follow_overflow(self, loss_scale: LossScale) -> None:
        overflow = bool(self._engine.optimizer.overflow)
        if overflow:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the first step may be one that is left out
                self._scheduler.step()  # DeepSpeed leaves it out under ZeRO alone
        loss_scale.update(overflow)
        self._engine.optimizer.override_loss_scale(loss_scale.scale)

    def _gradient_norm(self) -> Tensor:
        gradients = [parameter.grad for _, parameter in self._trained() if parameter.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        scaler = self._scaler()
        return total if scaler is None else total / scaler.scale(torch.ones_like(total))

    @property
    def lr(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The module with whole weights, for ranks to call alone; under ZeRO stage 3 a copy. Every rank must enter."""
        if self._sharded:
            self._plain.to_empty(device=next(self.module.parameters()).device)
            with self._gathered(), torch.no_grad():
                for own, copy in zip(_tensors(self.module), _tensors(self._plain), strict=True):
                    copy.copy_(own)
        yield self._plain
        if self._sharded:
            self._plain.to("meta")

    def _gathered(self) -> AbstractContextManager[Any]:
        if not self._sharded:
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(self.module.parameters()))
        return gathered

    def state(self, module: nn.Module | None = None) -> dict[str, Tensor]:
        """State dict of `module` (default: what trains; also a copy of it) on the CPU, in its stock shapes.

        Every rank must call it.
        """
        with self._gathered():
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
        for name, parameter in self._trained():
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
        parameters = dict(self._trained())
        keys = {f"{name}/{key}": name for name in parameters for key in self._state_keys()}
        unfit = sorted(
            {*(keys.keys() ^ state.keys())}
            | {
                path
                for path, name in keys.items()
                if path in state and not path.endswith("/step") and state[path].shape != _shape(parameters[name])
            }
        )
        if unfit:
            listing = ", ".join(unfit[:5]) + (f" and {len(unfit) - 5} more" if len(unfit) > 5 else "")
            raise UserError(f"optimizer.safetensors: missing, unexpected or of another shape: {listing}")
        entries: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
        for path, name in keys.items():
            entries[name][path.rpartition("/")[2]] = state[path]
        if not self._partitioned:
            for name, values in entries.items():
                device = parameters[name].device
                self._optimizer.state[parameters[name]] = {key: value.to(device) for key, value in values.items()}
            return
        for name, values in entries.items():
            for key, value in values.items():
                if key != "step":
                    self._set_state(parameters[name], value.to(parameters[name].device), key)
        for state_of_group in self._optimizer.state.values():
            if "step" in state_of_group:
                state_of_group["step"].copy_(next(iter(entries.values()))["step"])

    def _set_state(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not self._sharded:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # Its function for whole tensors fails where the ranks do not divide their elements.
        shard = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = F.pad(value.flatten(), (0, shard * dist.get_world_size() - value.numel()))
        safe_set_local_optimizer_state(parameter, padded[shard * dist.get_rank() :][:shard], key)

    def scaler_state(self) -> dict[str, Any] | None:
        """State of the loss scaler of fp16; None without one."""
        scaler = self._scaler()
        return None if scaler is None else scaler.state_dict()

    def load_scaler(self, state: dict[str, Any] | None) -> None:
        """Take what `scaler_state` returned; a run in another precision than before starts its own."""
        scaler = self._scaler()
        if scaler is not None and state is not None:
            scaler.load_state_dict(state)
        if self._loss_scale is not None:
            self._engine.optimizer.override_loss_scale(self._loss_scale.scale)

    def _scaler(self) -> Any:
        return self._loss_scale if self._partitioned else self._engine.torch_autocast_z0_gradscaler

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    def _state_keys(self) -> list[str]:
        return list(self._trial_state(torch.device("cpu")))

    def _trial_state(self, device: torch.device) -> dict[str, Tensor]:
        """State that this kind of optimizer gives one element."""
        probe = nn.Parameter(torch.zeros(1, device=device))
        probe.grad = torch.zeros_like(probe)
        kind = type(self._optimizer)
        known = inspect.signature(kind).parameters
        trial = kind([probe], **{key: value for key, value in self._optimizer.defaults.items() if key in known})
        trial.step()
        return {key: value for key, value in trial.state[probe].items() if torch.is_tensor(value)}

    def _link_state(self) -> None:
        """Create the zero state of every flat group and tie each parameter to its slice of it.

        DeepSpeed ties them after the first group's first step, when the other groups have no state yet, and then never
        again; their state could be neither read nor set.
        """
        groups = [group["params"] for group in self._optimizer.param_groups]
        if self._sharded:
            groups = [self._engine.optimizer.fp32_partitioned_groups_flat]  # in its groups only while it steps
        for flat in chain(*groups):
            self._optimizer.state[flat] = {
                key: torch.zeros_like(value if key == "step" else flat)
                for key, value in self._trial_state(flat.device).items()
            }
        if not self._sharded:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())
