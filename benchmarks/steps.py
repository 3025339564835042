"""Whole training steps of both phases, image tower to optimizer.

Without dropout: the forms draw their masks in other orders, and could not be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pspg.engine.config import ModelConfig
from pspg.engine.models.clip import build_clip, clip_config
from pspg.engine.training.config import OptimConfig
from pspg.engine.training.cuda_graph import WARM_UP, Recorder, StepGraph
from pspg.engine.training.losses import contrastive_loss
from pspg.engine.training.tasks import ContrastiveModel
from pspg.engine.training.trainer import make_optimizer
from pspg.kernels.prompt_decoder.op import MOST_IMAGES

from .counting import flop_counter
from .gated import GradientStep, Oracle, Outcome, Provider, measure, outcome_of
from .harness import seconds_of, take_turns
from .rows import TOO_LARGE, Row, without_numbers
from .runs import DemoEpoch, Evaluation
from .suite import Job, Started
from .training_step import Setup, make_setup, repaired_loss

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def jobs(device: str) -> list[Job]:
    """Phase 2, evaluation, a demo epoch, phase 1."""
    providers: tuple[str, ...] = ("reference", "repaired", "eager")
    if device == "cuda":
        cases = [(108, 64), (14, 64), (28, 64), (193, 64), (108, 16), (108, 256)]
        providers = (*providers, "triton")
    else:
        cases = [(14, 16), (28, 8)]
    steps = [Phase2Step(rank=10 + k, C=c, B=b, providers=providers) for k, (c, b) in enumerate(cases)]
    forms, batch = (("eager", "triton"), 64) if device == "cuda" else (("eager",), 16)
    return [
        *steps,
        Evaluation(rank=20, B=batch, providers=forms),
        DemoEpoch(rank=21),
        Phase1Step(rank=22, B=64 if device == "cuda" else 8),
    ]


@dataclass(frozen=True, kw_only=True)
class Phase2Step:
    """One step of phase 2 in several forms, each against the literal reference in float32 or, where that does not fit,
    against the exact algebra in float32."""

    rank: int
    C: int
    B: int
    providers: tuple[str, ...]
    backbone: str = "RN50"
    model: ModelConfig = field(default_factory=ModelConfig)
    """of the head; its dropout is left out"""

    @property
    def key(self) -> str:
        return f"steps/phase2_step/C{self.C}-B{self.B}"

    def run(self, device: torch.device, without: Mapping[str, str], started: Started) -> list[Row]:
        dtype = low_precision(device)
        row = Row(
            job=self.key,
            suite="steps",
            operator="phase2_step",
            provider="",
            C=self.C,
            B=self.B,
            n=self._settings().prompt_length,
            device=device.type,
            dtype=NAMES[dtype],
            flops=self.flops(),
        )
        prepare = {name: partial(self.provider, name, device, dtype) for name in self.providers}
        return measure(row, prepare, partial(self.oracles, device, dtype), device, without, started, dtype=dtype)

    def provider(self, name: str, device: torch.device, dtype: torch.dtype) -> Provider:
        """The step of one form."""
        setup = self.setup(name, device, dtype)
        optimizer = make_optimizer(setup.head, OptimConfig())
        loss: Callable[[], Tensor] = partial(loss_of, setup, name, dtype)
        if device.type != "cuda":
            return GradientStep(loss, setup.head, device, optimizer=optimizer)
        detail: Callable[[], str] = str
        if name in ("eager", "triton"):
            loss = graph = GraphedLoss(setup, name, dtype)
            detail = graph.detail
        elif name == "repaired":
            torch._dynamo.reset()  # else the shapes of the case before make it compile for any shape
            loss = partial(loss_of, setup, name, dtype, torch.compile(repaired_loss, mode="reduce-overhead"))
        # The first repetition is a replay already, whose outcome is compared.
        return GradientStep(loss, setup.head, device, optimizer=optimizer, warm_up=WARM_UP + 1, detail=detail)

    def oracles(self, device: torch.device, dtype: torch.dtype, outcomes: Mapping[str, Outcome]) -> dict[str, Oracle]:
        """The same for every provider."""
        form = "reference" if "reference" in outcomes else "eager"
        if dtype == torch.float32 and form in outcomes:
            outcome = outcomes[form]
        else:
            setup = self.setup(form, device, torch.float32)
            loss = loss_of(setup, form, torch.float32)
            loss.backward()
            outcome = outcome_of(loss, setup.head)
        return dict.fromkeys(outcomes, Oracle(f"{form} (fp32)", outcome))

    def setup(self, form: str, device: torch.device, dtype: torch.dtype) -> Setup:
        """Weights and batch, the same for every form."""
        clip = clip_config(self.backbone)
        setup = make_setup(self.C, self.B, device, form, dtype, clip_settings=clip, model=self._settings())
        setup.head.impl = form_of(setup.head.impl, self.B)
        return setup

    def flops(self) -> int:
        """Of the exact algebra, nothing computed twice, counted on tensors without storage."""
        meta = torch.device("meta")
        with meta:
            setup = self.setup("eager", meta, torch.float32)
        setup.head.text_memory = 2**62
        with flop_counter() as counter:
            setup.loss().backward()
        return int(counter.get_total_flops())

    def _settings(self) -> ModelConfig:
        return replace(self.model, dropout=0.0)


def low_precision(device: torch.device) -> torch.dtype:
    """Dtype of the frozen towers and of autocast, as the engine's `precision: auto`."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def form_of(impl: str, images: int) -> str:
    """What the head is told: with more images than the decoder's kernels take, auto keeps all other kernels."""
    return "auto" if impl == "triton" and images > MOST_IMAGES else impl


def loss_of(
    setup: Setup, provider: str, dtype: torch.dtype, repaired: Callable[[Setup], Tensor] | None = None
) -> Tensor:
    """Loss of a step, its towers in `dtype`.

    Args:
        repaired: the repaired form, where it is compiled.
    """
    with torch.autocast(setup.images.device.type, dtype, enabled=dtype != torch.float32):
        return (repaired or repaired_loss)(setup) if provider == "repaired" else setup.loss()


class GraphedLoss:
    """The loss of a step whose forward and backward are recorded and replayed, as the trainer does it.

    Args:
        record: as of `StepGraph`.
    """

    def __init__(self, setup: Setup, provider: str, dtype: torch.dtype, record: Recorder | None = None) -> None:
        self.module: nn.Module = setup.head
        self._setup, self._provider, self._dtype = setup, provider, dtype
        self._graph = StepGraph(self, setup.images.device, record)

    def __call__(self) -> Tensor:
        found = self._graph(None)
        return loss_of(self._setup, self._provider, self._dtype) if found is None else found[0]

    def tensors(self, batch: None) -> dict[str, Tensor]:
        return {"images": self._setup.images, "labels": self._setup.labels}

    def step(self, batch: None, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        setup = replace(self._setup, images=tensors["images"], labels=tensors["labels"])
        return loss_of(setup, self._provider, self._dtype), {}

    def detail(self) -> str:
        """Whether it is a replay that is measured."""
        return f"no graph: {self._graph.refusal}" if self._graph.refusal else "CUDA graph"


@dataclass(frozen=True, kw_only=True)
class Phase1Step:
    """One contrastive step: both towers, forward and backward, and AdamW. There is one form of it, so no gate."""

    rank: int
    B: int
    backbone: str = "RN50"

    @property
    def key(self) -> str:
        return f"steps/phase1_step/B{self.B}"

    def run(self, device: torch.device, without: Mapping[str, str], started: Started) -> list[Row]:
        dtype = low_precision(device)
        row = Row(
            job=self.key,
            suite="steps",
            operator="phase1_step",
            provider="eager",
            B=self.B,
            device=device.type,
            dtype=NAMES[dtype],
            detail="one form: nothing to compare with",
            flops=self.flops(),
        )
        if "eager" in without:
            return [without_numbers(row, TOO_LARGE, without["eager"])]
        found = take_turns({"eager": partial(self.provider, device, dtype)}, device, started)
        return found["eager"].rows(row, ("both",))

    def provider(self, device: torch.device, dtype: torch.dtype) -> Callable[[int], dict[str, float]]:
        """Batch and model on the device; then one step a call."""
        torch.manual_seed(0)
        model, images, tokens = self._inputs(device)
        optimizer = make_optimizer(model, OptimConfig(name="adamw"))

        def step() -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                output = model(images, tokens)
            contrastive_loss(*output).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return lambda turn: {"both": seconds_of(step, device)}

    def flops(self) -> int:
        """Counted on tensors without storage."""
        meta = torch.device("meta")
        with meta:
            model, images, tokens = self._inputs(meta)
        with flop_counter() as counter:
            contrastive_loss(*model(images, tokens)).backward()
        return int(counter.get_total_flops())

    def _inputs(self, device: torch.device) -> tuple[ContrastiveModel, Tensor, Tensor]:
        """A model, images (B,3,h,w), and texts that fill the context."""
        config: dict[str, Any] = clip_config(self.backbone)
        side, text = config["vision_cfg"]["image_size"], config["text_cfg"]
        tokens = torch.randint(1, text["vocab_size"] - 2, (self.B, text["context_length"]))
        tokens[:, 0], tokens[:, -1] = text["vocab_size"] - 2, text["vocab_size"] - 1  # SOS, EOS
        model = ContrastiveModel(build_clip({**config, "quick_gelu": True})).to(device).train()
        return model, torch.randn(self.B, 3, side, side).to(device), tokens.to(device)
