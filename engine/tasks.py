"""The two training objectives, as the trainer sees them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from .config import LossConfig
from .data.torch_loader import Batch
from .distributed import World, gather
from .evaluation.metrics import macro_auc
from .inference import Scores, frozen_features, score
from .losses import contrastive_loss, prompt_loss
from .models.pspg import PromptHead, PsPG, PsPGOutput
from .trainer import autocast_dtype


class ContrastiveModel(nn.Module):
    """A CLIP called with images and tokens."""

    def __init__(self, clip: open_clip.CLIP) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image features (B,D), text features (B,D), both raw, and the log temperature."""
        return self.clip.encode_image(images), self.clip.encode_text(tokens), self.clip.logit_scale


class ContrastiveTask:
    """Phase 1: contrastive fine-tuning on image-report pairs (paper 3.1).

    Args:
        clip: the open_clip model to train.
        world: this process.
        validation: batches of the validation split, in a fixed order; None: no validation.
        precision: fp32, bf16, fp16 or auto.
    """

    def __init__(self, clip: open_clip.CLIP, world: World, validation: Iterable[Batch] | None, precision: str) -> None:
        self.module = ContrastiveModel(clip)
        self.score_name = None if validation is None else "val_score"
        self._world, self._validation = world, validation
        self._autocast = autocast_dtype(precision, world.device)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        batch = batch.to(self._world.device, non_blocking=True)
        assert batch.tokens is not None
        return batch.images, batch.tokens

    def loss(self, output: tuple[Tensor, Tensor, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = contrastive_loss(*output)
        return loss, {"temperature": output[2].detach().exp().reciprocal().mean()}

    @torch.no_grad()
    def validate(self, module: nn.Module) -> dict[str, float]:
        """Mean contrastive loss of the validation batches; the score is its negative."""
        if self._validation is None:
            return {}
        module.eval()
        total, images = torch.zeros((), device=self._world.device), 0
        for number, batch in enumerate(self._validation):
            if number % self._world.size == self._world.rank:
                with torch.autocast(self._world.device.type, self._autocast, enabled=self._autocast is not None):
                    output = module(*self.inputs(batch))
                total += contrastive_loss(*output) * len(batch.ids)
                images += len(batch.ids)
        parts = gather((total.item(), images))
        loss = sum(part[0] for part in parts) / sum(part[1] for part in parts)
        return {"val_loss": loss, "val_score": -loss}


class PromptTask:
    """Phase 2: prompt learning with frozen towers (paper 3.2).

    Args:
        model: its towers are frozen, its head trains.
        loss: the loss's configuration.
        world: this process.
        validation: labelled batches in a fixed order; None: no validation.
        bank: (M,D) context of validation under `evaluation.context: bank`; None: each batch is its own context.
        precision: fp32, bf16, fp16 or auto.
    """

    def __init__(
        self,
        model: PsPG,
        loss: LossConfig,
        world: World,
        validation: Iterable[Any] | None,
        *,
        bank: Tensor | None,
        precision: str,
    ) -> None:
        self.module = model.head
        self.score_name = None if validation is None else "val_macro_auc"
        self._model, self._loss, self._world = model, loss, world
        self._validation, self._bank = validation, bank
        self._autocast = autocast_dtype(precision, world.device)

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        features = frozen_features(self._model, batch, self._world.device, self._autocast)
        return features, self._model.vocabulary, self._model.tower

    def loss(self, output: PsPGOutput, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        labels = batch.labels.to(self._world.device, non_blocking=True)
        return prompt_loss(output, labels, self._model.tower, self._model.vocabulary, self._loss)

    def validate(self, module: PromptHead) -> dict[str, float]:
        """Macro AUC over classes with both label values."""
        if self._validation is None:
            return {}
        module.eval()
        mine = [
            (
                number,
                score(
                    self._model,
                    module,
                    [self._model.vocabulary],
                    [batch],
                    self._world.device,
                    self._autocast,
                    context=self._bank,
                ),
            )
            for number, batch in enumerate(self._validation)
            if number % self._world.size == self._world.rank
        ]
        every: list[tuple[int, Scores]] = sorted((pair for part in gather(mine) for pair in part), key=lambda p: p[0])
        scores = Scores.join([part for _, part in every])
        assert scores.labels is not None
        return {"val_macro_auc": macro_auc(scores.labels, scores.probabilities)}
