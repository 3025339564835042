"""One phase-2 step on tensors without storage: every operator and every kernel launch, with the bytes that are alive.

What runs is the code of a training step: autocast, forward, backward, the scaling of gradients that follows a recorded
graph, the optimizer. Tensors are fake ones of the CPU, so that autocast and autograd work without a GPU. An operator of
the project (`pspg::…`) runs its host code, whose launches are recorded; scaled-dot-product attention is the kernel that
torch takes on a GPU for heads wider than 256.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest.mock import patch

import torch
from open_clip import CLIP
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry

from pspg import engine, kernels
from pspg.engine.models.cast_weights import CastWeights
from pspg.engine.models.clip import build_clip, clip_config
from pspg.engine.models.decoders._base import PromptLearner
from pspg.engine.models.frozen_image import FrozenImageTower
from pspg.engine.models.pspg import PromptHead
from pspg.engine.models.texts import encode_tokens, pack_tokens
from pspg.engine.models.trained_resnet import encode_training_images
from pspg.engine.training.config import OptimConfig
from pspg.engine.training.losses import contrastive_loss
from pspg.engine.training.optimizer import make_optimizer
from pspg.engine.training.tasks import ContrastiveModel
from pspg.kernels.launch import Launch, record, tensor_of, tensors_of
from pspg.kernels.spcl.chunked_loss import chunked_loss, sum_of_chunks
from pspg.kernels.text_tower import TextTower, default_memory
from pspg.kernels.text_tower.folding import folded_layer
from pspg.kernels.text_tower.prefix_cache import encode_prefixes

from ..setup import Setup, loss_of, make_setup
from .share import Share

ARCHITECTURE = 90
Count = Callable[[Mapping[str, Any]], float]
"""of a launch with the given arguments"""
_SOURCES = tuple(str(Path(next(iter(package.__path__)))) for package in (engine, kernels))
IMAGE, DECODERS, PREFIXES, SINGLES = "image tower", "decoders", "prefixes", "single prompts"
PAIRS, LOSSES, BACKWARD, OPTIMIZER = "pair chunks", "losses", "outer backward", "optimizer"
PARTS = (IMAGE, DECODERS, PREFIXES, SINGLES, PAIRS, LOSSES, BACKWARD, OPTIMIZER)
_PARTS: tuple[tuple[CodeType, str], ...] = (
    (sum_of_chunks.__code__, PAIRS),
    (chunked_loss.__code__, PAIRS),
    (encode_prefixes.__code__, PREFIXES),
    (PromptHead.encode.__code__, SINGLES),
    (encode_tokens.__code__, SINGLES),
    (CastWeights.__init__.__code__, SINGLES),
    (PromptLearner.forward.__code__, DECODERS),
    (FrozenImageTower.forward.__code__, IMAGE),
    (CLIP.encode_image.__code__, IMAGE),
    (encode_training_images.__code__, IMAGE),
)
"""function → part of the step that runs within it; the first that is on the stack counts"""
_FREE = frozenset(
    ["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "scalar_tensor"]
)
"""operators that start no kernel"""
FILLS = frozenset(
    [f"{form}{name}{like}" for name in ("zeros", "ones", "full") for form in ("", "new_") for like in ("", "_like")]
    + ["zero_", "fill_", "arange"]
)
"""operators that write a tensor and read none"""
_KERNELS = {
    "sort": 4,
    "convolution_backward": 2,
    "native_batch_norm": 3,  # sums, statistics, the norm: of bf16 cuDNN's are not taken
    "native_batch_norm_backward": 2,
    "select_backward": 2,
    "slice_backward": 2,
    "_scaled_dot_product_efficient_attention_backward": 2,
}
"""operators of several kernels"""
_LOOK_UPS = frozenset(["index_select", "embedding", "gather", "index"])
"""operators that read no more than they write"""
_TWICE = frozenset(["native_batch_norm", "native_batch_norm_backward"])
"""operators that read their inputs twice: for sums over all rows, and for what these sums make of each"""


@dataclass(frozen=True)
class Operation:
    """An operator that starts kernels, or a launch of a Triton kernel."""

    name: str
    """of the operator in torch, as mm; of the kernel's function"""
    part: str
    where: str
    """the line of the project that it was called from; in the backward of torch's own operators: autograd"""
    read: int
    """bytes of the distinct tensors that go in"""
    written: int
    """bytes that come out, or are overwritten; of a kernel whose case does not say what it writes they are in `read`"""
    flops: float
    shapes: tuple[tuple[int, ...], ...]
    """of the tensors that go in"""
    dtype: torch.dtype
    """of the last of them"""
    result: torch.dtype
    """dtype of what comes out first, or is overwritten"""
    live: int
    """bytes that are alive behind it"""
    constants: tuple[int, ...]
    """numbers of the tensors that go in and were there before the step: weights, class features, images"""
    kernels: int = 1
    trips: float = 0.0
    """turns of a Triton kernel's loop, over all programs, where its case states them"""
    launch: Launch | None = None
    """of a Triton kernel, its tensors replaced by their shapes"""
    overlapped: bool = False
    """set up while the kernel before it ends"""

    def __str__(self) -> str:
        return (
            f"{self.name} {'·'.join('×'.join(map(str, shape)) for shape in self.shapes)} at {self.where}, {self.part}"
        )


@dataclass
class Step:
    """A traced step."""

    classes: int
    batch: int
    operations: list[Operation]
    peak_bytes: int
    """most bytes alive at a time: weights of towers and head, optimizer state, inputs, activations, gradients"""
    peak_at: Operation = field(repr=False)
    """the operation that reached it"""


def trace_step(classes: int, batch: int, *, memory: int | None = None, share: Share | None = None) -> Step:
    """Trace a step of the full-size RN50 model.

    Args:
        classes: C.
        batch: B.
        memory: bytes of text activations to hold; None: what a GPU's default is.
        share: one rank's part of the step; None: one process has it all.
    """
    meta = torch.device("meta")
    with meta:
        setup = make_setup(classes, batch, meta, "triton", torch.bfloat16)
        if share is not None:
            setup.images = setup.images[: share.images].clone()
    with FakeTensorMode():
        setup = _on_fake_cpu(setup)
        setup.head.text_memory = memory or default_memory(torch.device("cuda"))
        for layer in setup.tower.layers:
            folded_layer(layer)  # made once for all steps

        def loss() -> Tensor:
            return loss_of(setup, "triton", torch.bfloat16) if share is None else share.loss(setup)

        return _trace(setup.head, _tensors(setup), loss, classes, batch)


def trace_contrastive(images: int, tokens: int = 64) -> Step:
    """Trace a step of phase 1 of the full-size RN50 CLIP; of the batch of several ranks only the loss is left out.

    Logits of own rows against all rows, which cost next to nothing, are those against own rows alone.

    Args:
        tokens: of a report, with its EOS.
    """
    packed = pack_tokens(torch.arange(tokens).expand(images, tokens))
    with torch.device("meta"):
        clip = build_clip({**clip_config("RN50"), "quick_gelu": True}).train()
    with FakeTensorMode():
        _fake_module(clip)
        model = ContrastiveModel(clip)
        texts = tuple(_fake(tensor) for tensor in packed)
        side = clip_config("RN50")["vision_cfg"]["image_size"]
        pixels = torch.empty(images, 3, side, side)

        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return contrastive_loss(*model(pixels, *texts))

        return _trace(model, [*_state(model), pixels, *texts], loss, 0, images)


def _trace(
    module: nn.Module, alive: list[Tensor], loss_of_step: Callable[[], Tensor], classes: int, batch: int
) -> Step:
    """Trace forward, backward and optimizer of `module`; `alive` are the tensors that are there before."""
    log = _Log()
    optimizer = make_optimizer(module, OptimConfig())
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes its state
    optimizer.zero_grad(set_to_none=True)
    log.keep([*alive, *tree_iter(list(optimizer.state.values()))])
    attention = patch.object(nn.functional, "scaled_dot_product_attention", _attention_of_a_gpu)
    with log, attention, record(ARCHITECTURE, log.launched):
        loss = loss_of_step()
        with log.within(BACKWARD):
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        loss = loss.detach()
        # As `Engine.accumulate` hands a replay's gradients over.
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with log.within(OPTIMIZER):
            optimizer.step()
    return Step(classes, batch, log.operations, log.peak, log.operations[log.peak_at])


class _Log(TorchDispatchMode):
    """Lists operations, and follows which storages are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.peak = self.peak_at = self._live = 0
        self._sizes: dict[int, int] = {}
        self._constants: dict[int, int] = {}
        *self._counts, self._writes = _kernel_facts()
        self._outer: str | None = None

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What runs here belongs to a part, but for the pair chunks' own backward."""
        self._outer = part
        yield
        self._outer = None

    def keep(self, tensors: list[Any]) -> None:
        """Count tensors that are alive from the start, and number them."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._follow(tensor)
                self._constants.setdefault(_storage(tensor), len(self._constants))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "pspg":
            # Torch would call what stands for the operator here; this is what it does.
            with self:
                return OPDEFS[function._schema.name]._init_fn(*args, **kwargs)
        before = [tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)]
        result = function(*args, **kwargs)
        after = [tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor)]
        for tensor in after:
            self._follow(tensor)
        name = function._schema.name.partition("::")[2]
        overwrites = function._schema.is_mutable
        storages = {_storage(tensor) for tensor in before}
        view = bool(after) and not overwrites and all(_storage(tensor) in storages for tensor in after)
        if function.namespace != "aten" or name in _FREE or view or not (after or overwrites):
            return result
        read, written = _bytes(before), _bytes(after)
        if name.startswith("_fused"):  # parameters, gradients, momentum
            written = read // 3 * 2
        elif name.startswith("_foreach_copy"):
            read, written = _bytes(args[1]), _bytes(args[0])
        elif overwrites:
            written = kwargs["out"].nbytes if "out" in kwargs else _bytes(before[:1])
        if name in FILLS:
            read = 0
        elif name == "copy_":
            read = _bytes(before[1:])
        elif name in _LOOK_UPS:
            read = min(read, written)
        elif name in _TWICE:
            read *= 2
        count = flop_registry.get(function._overloadpacket, _baddbmm if name == "baddbmm_" else None)
        kernels = _KERNELS.get(name, 1) + (name == "convolution" and args[2] is not None)
        if name.startswith(("_foreach", "_fused")):
            kernels = _multi_tensor_launches(args)
        flops = 0.0 if count is None else float(count(*args, **kwargs, out_val=result))
        dtype = before[0].dtype if overwrites else after[0].dtype
        self._add(name, before, result=dtype, read=read, written=written, flops=flops, kernels=kernels)
        return result

    def launched(self, launch: Launch) -> None:
        """List a launch of a Triton kernel."""
        name = launch.kernel.fn.__name__
        given = [tensors_of(key, value) for key, value in launch.arguments.items()]
        tensors = list({id(tensor): tensor for found in given for tensor in found.values()}.values())
        flops, trips = (count[name](launch.arguments) if name in count else 0.0 for count in self._counts)
        written = _bytes(
            launch.arguments[key] for key in self._writes.get(name, ()) if launch.arguments[key] is not None
        )
        arguments = {key: _without_tensors(value) for key, value in launch.arguments.items()}
        launch = replace(launch, arguments=arguments)  # which would keep the tensors alive
        dtype = tensors[-1].dtype
        counts = {"read": _bytes(tensors) - written, "written": written, "flops": flops, "trips": trips}
        overlapped = launch.options.get("launch_pdl", False)
        self._add(name, tensors, result=dtype, **counts, launch=launch, overlapped=bool(overlapped))

    def _add(self, name: str, tensors: list[Tensor], **numbers: Any) -> None:
        part, where = self._place()
        self.operations.append(
            Operation(
                name,
                part,
                where,
                shapes=tuple(tuple(tensor.shape) for tensor in tensors[:8]),
                dtype=tensors[-1].dtype if tensors else torch.float32,
                live=self._live,
                constants=tuple(
                    self._constants[_storage(tensor)] for tensor in tensors if _storage(tensor) in self._constants
                ),
                **numbers,
            )
        )

    def _place(self) -> tuple[str, str]:
        """Part and line of the project of what is running."""
        frame: FrameType | None = sys._getframe(2)
        codes, where = set(), ""
        while frame is not None:
            codes.add(frame.f_code)
            path = frame.f_code.co_filename
            if not where and path.startswith(_SOURCES) and not path.endswith("launch.py"):
                where = f"{Path(path).parent.name}/{Path(path).name}:{frame.f_lineno}"
            frame = frame.f_back
        if self._outer and _PARTS[0][0] not in codes:
            return self._outer, where or "autograd"
        return next((part for code, part in _PARTS if code in codes), LOSSES), where or "autograd"

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = self._sizes[key] = (storage.nbytes() + 511) // 512 * 512  # the allocator's unit
        self._live += size
        weakref.finalize(storage, self._gone, key)
        if self._live > self.peak:
            self.peak, self.peak_at = self._live, len(self.operations)

    def _gone(self, key: int) -> None:
        self._live -= self._sizes.pop(key)


def _attention_of_a_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Scaled-dot-product attention as the memory-efficient kernel, which is what wide heads get on a GPU."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, attn_mask, keep, dropout_p, is_causal, scale=scale)[0]


def _on_fake_cpu(setup: Setup) -> Setup:
    """The same with tensors of the CPU that have no storage, for those of the meta device."""

    for module in (setup.image_tower, setup.head, setup.class_set):
        assert isinstance(module, nn.Module)
        _fake_module(module)
    tower = setup.tower
    values = {name: tree_map_only(Tensor, _fake, getattr(tower, name)) for name in TextTower.__dataclass_fields__}
    return replace(setup, tower=TextTower(**values), images=_fake(setup.images), labels=_fake(setup.labels))


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def _fake_module(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(_fake(parameter), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _fake(buffer)


def _without_tensors(argument: Any) -> Any:
    """An argument of a launch, shapes in place of tensors."""
    if isinstance(argument, tuple):
        return type(argument)(*map(_without_tensors, argument))
    tensor = tensor_of(argument)
    return argument if tensor is None else tensor.shape


def _tensors(setup: Setup) -> list[Tensor]:
    modules = [setup.image_tower, setup.head, setup.class_set]
    found = [tensor for module in modules if isinstance(module, nn.Module) for tensor in _state(module)]
    return [*found, *setup.tower.tensors(), setup.images, setup.labels]


def _state(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _kernel_facts() -> tuple[dict[str, Any], ...]:
    """Kernel → FLOPs, turns of its loop, parameters that it writes, of a launch, as the operators' cases state them."""
    facts: tuple[dict[str, Any], ...] = {}, {}, {}
    for operator in ("asymmetric_loss", "batch_norm", "pair_loss", "prompt_decoder", "text_tower"):
        for case in import_module(f"pspg.kernels.{operator}.cases").CASES:
            for known, more in zip(facts, (case.flops, case.trips, case.writes), strict=True):
                known.update(more)
    return facts


def _multi_tensor_launches(lists: Sequence[Any]) -> int:
    """Launches of an operator on lists of tensors: 320 blocks of 65,536 elements, 36 to 110 tensors, at a time."""
    depth = sum(isinstance(entry, list | tuple) and bool(entry) for entry in lists)
    tensors = next(entry for entry in lists if isinstance(entry, list | tuple))
    blocks = sum(math.ceil(tensor.numel() / 2**16) for tensor in tensors)
    return max(math.ceil(blocks / 320), math.ceil(len(tensors) / {1: 110, 2: 64, 3: 48}.get(depth, 36)))


def _baddbmm(into: Any, left: Tensor, right: Tensor, **_: Any) -> int:
    return 2 * left.numel() * right.shape[-1]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct tensors; along an expanded dimension there is one row."""
    views = {}
    for tensor in tensors:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        size = torch.Size(size for size, step in steps if step).numel() * tensor.element_size()
        views[_storage(tensor), tensor.storage_offset(), tensor.shape] = size
    return sum(views.values())
