"""Whole steps of phase 2 behind the gate, and their text side alone.

Without dropout: implementations draw their masks in other orders, and could not be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pspg.engine.config import ModelConfig
from pspg.engine.models.clip import clip_config
from pspg.engine.training.config import OptimConfig
from pspg.engine.training.cuda_graph import WARM_UP, Recorder, StepGraph, outcome_of
from pspg.engine.training.cuda_graph import Outcome as Recorded
from pspg.engine.training.optimizer import make_optimizer
from pspg.kernels.prompt_decoder.op import MOST_IMAGES
from pspg.kernels.spcl import sample_pairs

from .gate import Outcome, excess
from .harness import Call, Counts, Sizes, Verdict, check_kernels, flop_counter, seconds_of
from .jobs import Entry
from .machine import DTYPES
from .setup import Setup, loss_of, make_setup, repaired_loss

LABELS = 3
"""positive labels an image in `text_side`, whatever the number of classes: else the positive pairs grow with C², too"""
SAMPLES = 8
"""pairs a class of `sampled`, as `loss.pair_samples`"""


class GradientStep:
    """Loss, backward and, if there is one, the optimizer, as a call of the harness; the first outcome is kept.

    A loss without a gradient function has left the gradients already.

    Args:
        loss: differentiable scalar.
        module: what trains.
        optimizer: over the module's parameters; None: the step ends with the gradients.
        warm_up: passes before the first repetition, with the weights as they are.
    """

    def __init__(
        self,
        loss: Callable[[], Tensor],
        module: nn.Module,
        device: torch.device,
        optimizer: torch.optim.Optimizer | None = None,
        warm_up: int = 0,
    ) -> None:
        self.loss, self._module, self._device = loss, module, device
        self._optimizer, self._warm_up = optimizer, warm_up
        self.outcome: Outcome = {}

    def __call__(self, turn: int) -> dict[str, float]:
        if turn == 0:
            self.warm_up()
        torch.manual_seed(turn)
        seconds = seconds_of(self._backward, self._device)
        if turn == 0:
            self.outcome = _outcome(self._value, self._module)
        if self._optimizer is not None:
            seconds += seconds_of(self._optimizer.step, self._device)
        return {"both": seconds}

    def first(self) -> Outcome:
        """Loss and gradients of the first repetition, without the optimizer."""
        torch.manual_seed(0)
        self._backward()
        return _outcome(self._value, self._module)

    def warm_up(self) -> None:
        """The passes before the first repetition."""
        for _ in range(self._warm_up):
            self._backward()

    def whole(self) -> None:
        """One step."""
        self._backward()
        if self._optimizer is not None:
            self._optimizer.step()

    def _backward(self) -> None:
        self._module.zero_grad(set_to_none=True)
        value = self.loss()
        if value.requires_grad:
            value.backward()
        self._value = value.detach()


def _outcome(loss: Tensor, module: nn.Module) -> Outcome:
    """Copies of a loss and of the gradients that its backward left in a module."""
    gradients = {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"loss": {"loss": loss.detach().clone()}, "gradients": gradients}


class Phase2:
    """See `harness.Case`. A step of phase 2, or its text side and loss alone: image features given, no optimizer.

    Args:
        clip: CLIP in open_clip's format.
        model: of the head; its dropout is left out.
        literal: classes up to which the literal equations are the oracle even if they are not measured.
    """

    def __init__(
        self,
        sizes: Sizes,
        dtype: torch.dtype,
        device: torch.device,
        clip: Mapping[str, Any],
        model: ModelConfig,
        *,
        text_side: bool = False,
        literal: int = 14,
    ) -> None:
        self.sizes, self.dtype, self.device = sizes, dtype, device
        self._text_side, self._literal, self._clip = text_side, literal >= sizes.C, clip
        self._model = replace(model, prompt_length=sizes.n, dropout=0.0)
        self.steps: dict[str, GradientStep] = {}

    def prepare(self, impl: str) -> Call:
        check_kernels(impl, self.device)
        self.steps[impl] = self.make(impl, self.dtype, self.device)
        return self.steps[impl]

    def verdicts(self, ran: Sequence[str]) -> dict[str, Verdict]:
        """Compare with the literal equations in float32 or, where they are too dear, with the exact algebra.

        The literal equations in float32 are compared with the exact algebra, too. In float32 its oracle is in float64.
        """
        affordable = self._literal and "reference" not in self.steps
        literal = "reference" if "reference" in ran or affordable else "eager"
        outcomes: dict[tuple[str, bool], Outcome] = {}
        found = {}
        for impl in ran:
            exact = self.dtype == torch.float32
            oracle, sampled = "eager" if exact and impl == "reference" else literal, impl == "sampled"
            wide = torch.float64 if exact and oracle == "eager" else torch.float32
            if (oracle, sampled) not in outcomes:
                known = oracle in ran and wide == self.dtype and not sampled
                outcomes[oracle, sampled] = self.steps[oracle].outcome if known else self.outcome(oracle, wide, sampled)
            error, what = excess(self.steps[impl].outcome, outcomes[oracle, sampled], self.dtype)
            graph = getattr(self.steps[impl].loss, "detail", "")
            detail = [what if error > 1 else "", f"against {oracle}, {str(wide)[6:]}", graph]
            found[impl] = Verdict(error, "; ".join(filter(None, detail)))
        return found

    def counts(self) -> Counts:
        meta = torch.device("meta")
        with meta:
            setup = self.setup("eager", torch.float32, meta)
        with flop_counter() as counter:
            setup.loss().backward()
        return {"both": (int(counter.get_total_flops()), None)}

    def make(self, impl: str, dtype: torch.dtype, device: torch.device) -> GradientStep:
        setup = self.setup(impl, dtype, device)
        if self._text_side:
            loss = self.loss(impl, setup, dtype)
            return GradientStep(loss, setup.head, device, warm_up=int(device.type == "cuda"))
        return whole_step(setup, impl, dtype)

    def loss(self, impl: str, setup: Setup, dtype: torch.dtype) -> Callable[[], Tensor]:
        """Loss of an implementation; that of `sampled` draws its pairs anew."""
        if impl != "sampled":
            return partial(loss_of, setup, impl, dtype)
        count = SAMPLES * self.sizes.C
        return lambda: loss_of(setup, impl, dtype, sample=sample_pairs(setup.labels.cpu(), count))

    def outcome(self, impl: str, dtype: torch.dtype, sampled: bool) -> Outcome:
        """Loss and gradients of an ordinary step, `sampled` of the pairs that the first repetition draws."""
        setup = self.setup(impl, dtype, self.device)
        loss = self.loss("sampled" if sampled else impl, setup, dtype)
        return GradientStep(loss, setup.head, self.device).first()

    def setup(self, impl: str, dtype: torch.dtype, device: torch.device) -> Setup:
        """Weights and batch; with more images than the decoder's kernels take, auto keeps all other kernels."""
        s = self.sizes
        setup = make_setup(s.C, s.B, device, impl, dtype, clip_settings=self._clip, model=self._model)
        if impl == "triton" and s.B > MOST_IMAGES:
            setup.head.impl = "auto"
        if self._text_side:
            features = setup.features()
            setup.image_tower = lambda images: features
            setup.labels = (torch.rand(s.B, s.C).argsort(dim=1) < min(LABELS, s.C)).float().to(device)
        return setup


def whole_step(setup: Setup, impl: str, dtype: torch.dtype) -> GradientStep:
    """A step as the trainer runs it: on a GPU a CUDA graph, the tuned baseline compiled."""
    device = setup.images.device
    cuda = device.type == "cuda"
    loss: Callable[[], Tensor] = partial(loss_of, setup, impl, dtype)
    if cuda and impl in ("eager", "triton"):
        loss = GraphedLoss(setup, impl, dtype)
    elif cuda and impl == "repaired":
        torch._dynamo.reset()  # else the shapes of the case before make it compile for any shape
        loss = partial(loss_of, setup, impl, dtype, torch.compile(repaired_loss, mode="reduce-overhead"))
    optimizer = make_optimizer(setup.head, OptimConfig())
    # With the warm-up the first repetition is a replay already, whose outcome is compared.
    return GradientStep(loss, setup.head, device, optimizer, warm_up=WARM_UP + 1 if cuda else 0)


class GraphedLoss:
    """The loss of a step whose forward and backward are recorded and replayed, as the trainer does it.

    A replay puts its gradients on the parameters.

    Args:
        record: as of `StepGraph`.
    """

    def __init__(self, setup: Setup, impl: str, dtype: torch.dtype, record: Recorder | None = None) -> None:
        self.module: nn.Module = setup.head
        self._setup, self._impl, self._dtype = setup, impl, dtype
        self._graph = StepGraph(self, setup.images.device, record)

    def __call__(self) -> Tensor:
        found = self._graph(None)
        if found is None:
            return loss_of(self._setup, self._impl, self._dtype)
        loss, _, gradients = found
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def tensors(self, batch: None) -> dict[str, Tensor]:
        return {"images": self._setup.images, "labels": self._setup.labels}

    def outcome(self, batch: None, tensors: dict[str, Tensor], *, reduce: bool = False) -> Recorded:
        setup = replace(self._setup, images=tensors["images"], labels=tensors["labels"])
        return outcome_of(loss_of(setup, self._impl, self._dtype), {}, self.module)

    @property
    def detail(self) -> str:
        """True if a replay is measured."""
        return f"no graph: {self._graph.refusal}" if self._graph.refusal else "CUDA graph"


def _phase2(sizes: Sizes, dtype: str, device: torch.device) -> Phase2:
    return Phase2(sizes, DTYPES[dtype], device, clip_config("RN50"), ModelConfig())


def _text_side(s: Sizes, dtype: str, device: torch.device) -> Phase2:
    """The image tower runs once, so a small one serves; no token embedding is looked up."""
    clip = {
        "embed_dim": s.D,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": s.W, "heads": s.heads, "layers": s.layers},
    }
    model = ModelConfig(hidden_size=s.H)
    return Phase2(s, DTYPES[dtype], device, clip, model, text_side=True, literal=32)


def entries() -> dict[str, Entry]:
    """Entries of the registry."""
    step, widths = {"C": 108, "B": 64, "n": 16}, {"W": 512, "layers": 12, "heads": 8, "D": 1024, "H": 512}
    return {
        "phase2_step": Entry("steps", step, ("reference", "repaired", "eager", "triton"), _phase2),
        "text_side": Entry("steps", {**step, **widths}, ("reference", "eager", "sampled", "triton"), _text_side),
    }
