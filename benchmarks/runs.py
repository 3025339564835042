"""What a user waits for, through the engine's own entry points: scoring a batch, and an epoch of the demo."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pspg.engine.cli import parse
from pspg.engine.commands.train import _build_prompt
from pspg.engine.config import ModelConfig
from pspg.engine.data.batch import Batch
from pspg.engine.data.phantoms.dataset import PhantomConfig, write_phantoms
from pspg.engine.distributed.world import World, start
from pspg.engine.evaluation.scoring import score
from pspg.engine.models.clip import build_clip, clip_config
from pspg.engine.models.pspg import PsPG
from pspg.engine.training.config import TrainConfig
from pspg.engine.training.trainer import Trainer
from pspg.engine.utils.device import autocast_dtype

from .gated import Oracle, Outcome, measure
from .harness import seconds_of, take_turns
from .machine import peak_bytes
from .rows import TOO_LARGE, Row, without_numbers
from .suite import Started

ROOT = Path(__file__).parents[1]
PAPER = "paper: below 3.1 GiB of GPU memory"
"""for evaluating PadChest's 108 classes, footnote 4"""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of a batch of images that is its own context: image tower, prompts, text tower, logits.

    The text features are compared with those of the literal equations in float32.
    """

    rank: int
    B: int
    providers: tuple[str, ...]
    C: int = 108
    backbone: str = "RN50"
    model: ModelConfig = field(default_factory=ModelConfig)

    @property
    def key(self) -> str:
        return f"steps/evaluation/C{self.C}-B{self.B}"

    def run(self, device: torch.device, without: Mapping[str, str], started: Started) -> list[Row]:
        autocast = autocast_dtype("auto", device)
        row = Row(
            job=self.key,
            suite="steps",
            operator="evaluation",
            provider="",
            direction="forward",
            C=self.C,
            B=self.B,
            n=self.model.prompt_length,
            device=device.type,
            dtype="fp32" if autocast is None else "bf16",
        )
        prepare = {name: partial(Scoring, self, name, device) for name in self.providers}
        dtype = autocast or torch.float32
        return measure(row, prepare, partial(self.oracles, device), device, without, started, dtype=dtype)

    def oracles(self, device: torch.device, outcomes: Mapping[str, Outcome]) -> dict[str, Oracle]:
        """The same for every provider."""
        scoring = Scoring(self, "reference", device, frozen=False)
        return dict.fromkeys(outcomes, Oracle("reference (fp32)", scoring.text_features(None)))


class Scoring:
    """A provider: `engine.inference.score` of one batch.

    Args:
        frozen: with the towers in their inference form, in bf16 on a GPU.
    """

    outcome: Outcome | None = None
    detail = ""

    def __init__(self, job: Evaluation, impl: str, device: torch.device, *, frozen: bool = True) -> None:
        torch.manual_seed(0)
        clip = build_clip({**clip_config(job.backbone), "quick_gelu": True})
        self._model = PsPG(clip, job.model, [f"finding {number}" for number in range(job.C)]).to(device).eval()
        self._device, self._autocast = device, autocast_dtype("auto", device)
        side = clip_config(clip)["vision_cfg"]["image_size"]
        pixels = torch.randint(0, 256, (job.B, side, side), dtype=torch.uint8)
        names = [str(number) for number in range(job.B)]
        self._batch = Batch(names, torch.arange(job.B), pixels.to(device), None, None, mean=0.5, std=0.25)
        self._context = torch.randn(job.B, self._model.tower.projection.shape[1]).to(device)
        if frozen:
            self._model.freeze(self._autocast)
        self._model.head.impl = impl
        self._peak = 0

    def __call__(self, turn: int) -> dict[str, float]:
        seconds = seconds_of(self._score, self._device)
        self._peak = max(self._peak, peak_bytes(self._device))
        self.detail = f"{self._peak / 2**30:.2f} GiB with all weights; {PAPER}"
        if turn == 0:
            self.outcome = self.text_features(self._autocast)
        return {"forward": seconds}

    def text_features(self, autocast: torch.dtype | None) -> Outcome:
        """Positive and negative, for a random context."""
        model = self._model
        with torch.inference_mode(), torch.autocast(self._device.type, autocast, enabled=autocast is not None):
            text = model.head.text_features(self._context, model.vocabulary, model.tower)
        return {"text features": {"positive": text.positive, "negative": text.negative}}

    def _score(self) -> None:
        model = self._model
        score(model, model.head, [model.vocabulary], [self._batch], self._device, self._autocast, context=None)


@dataclass(frozen=True, kw_only=True)
class DemoEpoch:
    """One epoch of configs/demo.yaml on phantoms drawn for it: training on cached features, validation, checkpoint.

    The backbone is the demo's with random weights. There is one form of it, so no gate.
    """

    rank: int
    train: int = 1024
    val: int = 128

    @property
    def key(self) -> str:
        return f"steps/demo_epoch/N{self.train}"

    def run(self, device: torch.device, without: Mapping[str, str], started: Started) -> list[Row]:
        with tempfile.TemporaryDirectory() as folder:
            config = self.config(Path(folder), device)
            row = Row(
                job=self.key,
                suite="steps",
                operator="demo_epoch",
                provider="eager" if device.type == "cpu" else "triton",
                B=config.batch_size,
                n=config.model.prompt_length,
                device=device.type,
                dtype="fp32" if device.type == "cpu" else "bf16",
            )
            if row.provider in without:
                return [without_numbers(row, TOO_LARGE, without[row.provider])]
            write_phantoms(PhantomConfig(train=self.train, val=self.val, test=0), Path(folder, "phantoms"), workers=1)
            epochs = Epochs(config, start(device.type), device)
            found = take_turns({row.provider: lambda: epochs}, device, started)[row.provider]
        images = epochs.images
        (row,) = found.rows(replace(row, C=epochs.classes), ("both",))
        if row.p50 is None:
            return [row]
        detail = f"{images / row.p50:.0f} images/s of {images} phantoms, features cached before; with validation"
        return [replace(row, detail=f"{detail} of {self.val} and a checkpoint; one form: nothing to compare with")]

    def config(self, folder: Path, device: torch.device) -> TrainConfig:
        """The demo's, for one epoch, without a phase 1; the loader works in this process, which may start no others."""
        phantoms = folder / "phantoms"
        changes: dict[str, Any] = {
            "model.backbone": ROOT / "configs" / "demo_clip.json",
            "model.pretrained": "null",
            "data.train": phantoms / "train.jsonl",
            "data.val": phantoms / "val.jsonl",
            "data.class_names": phantoms / "seen.txt",
            "data.workers": 0,
            "optim.epochs": 1,
            "optim.warmup_epochs": 0,
            "output": folder / "run",
            "device": device.type,
        }
        words = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
        _, config = parse(["train", "--config", str(ROOT / "configs" / "demo.yaml"), *words])
        assert isinstance(config, TrainConfig)
        return replace(config, loss=config.loss.resolved())


class Epochs:
    """A call of the harness: a run of one epoch, from scratch each time; building it is not timed."""

    def __init__(self, config: TrainConfig, world: World, device: torch.device) -> None:
        self._config, self._world, self._device = config, world, device
        self.images, self.classes = 0, 0

    def __call__(self, turn: int) -> dict[str, float]:
        trainer = self._trainer(turn)
        self.images = trainer.steps_per_epoch * self._config.batch_size
        return {"both": seconds_of(trainer.fit, self._device)}

    def _trainer(self, turn: int) -> Trainer:
        torch.manual_seed(self._config.seed)
        trainer = _build_prompt(replace(self._config, output=f"{self._config.output}{turn}"), self._world)
        self.classes = len(trainer.contract["data.class_names"])
        return trainer
