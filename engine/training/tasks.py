"""The two training objectives, as the trainer sees them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from timm.layers import DropPath
from torch import Tensor, nn

from pspg.kernels.pairs import PaddedSample, PairSample, number_of_pairs, pad_sample
from pspg.kernels.spcl import sample_pairs

from ..data.batch import Batch
from ..distributed.collectives import all_gather_object, all_reduce_mean, in_order
from ..distributed.world import World
from ..evaluation.metrics import macro_auc
from ..evaluation.scoring import Scores, score_batches
from ..models.cast_weights import CastWeights, text_products
from ..models.clip import ImageFeatures
from ..models.features import FeatureBatch, frozen_features
from ..models.pspg import PromptHead, PsPG, PsPGOutput
from ..models.texts import PackedTexts, encode_tokens, pack_tokens
from ..models.trained_resnet import encode_training_images, image_products
from ..utils.device import autocast_dtype, pin
from ..utils.errors import UserError
from .cuda_graph import Outcome, outcome_of
from .examples import FirstImages, panel
from .losses import GlobalBatch, PromptLoss, contrastive_loss


class ContrastiveModel(nn.Module):
    """A CLIP called with images and texts.

    Args:
        clip: the open_clip model.
        text_drop_path: probability of dropping a residual branch of the text tower's last block in training, for a text
            at a time where texts go module by module; it rises linearly from 0 in the first block.
        sharded: weights are whole only while their own module runs (ZeRO stage 3): images go module by module, too.

    Attributes:
        impl: of the image tower's batch norms, and of the texts' attention and QuickGELU: triton, eager, or auto.
    """

    def __init__(self, clip: open_clip.CLIP, *, text_drop_path: float = 0.0, sharded: bool = False) -> None:
        super().__init__()
        self.clip, self._sharded = clip, sharded
        self.impl = "auto"
        if text_drop_path > 0:
            blocks = clip.transformer.resblocks
            for block, rate in zip(blocks, torch.linspace(0, text_drop_path, len(blocks)).tolist(), strict=True):
                # In place of a scale of the branches, which plain CLIPs do not have; it has no weights.
                block.ls_1, block.ls_2 = DropPath(rate), DropPath(rate)

    def forward(self, images: Tensor, *texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image features (B,D), text features (B,D), both raw, and the log temperature.

        Args:
            images: (B,3,h,w).
            texts: the tensors of `PackedTexts`; or tokens (B,77), which go module by module, as dropped branches and
                sharded weights need it.
        """
        # Channels last is the faster layout of convolutions; DeepSpeed does not take such weights, the images suffice.
        images = images.contiguous(memory_format=torch.channels_last)
        by_module = len(texts) == 1
        products = [*([] if by_module else text_products(self.clip)), *image_products(self.clip)]
        cast = CastWeights([] if self._sharded else products, images)
        if by_module:
            encoded = self.clip.encode_text(*texts)
        else:
            encoded = encode_tokens(self.clip, PackedTexts(*texts), cast, impl=self.impl)
        if self._sharded:
            features = self.clip.encode_image(images)
        else:
            features = encode_training_images(self.clip, images, impl=self.impl, cast=cast)
        # The loss reads the temperature after the forward, when a sharded parameter is no longer whole.
        return features, encoded, self.clip.logit_scale.clone()


class ContrastiveTask:
    """Phase 1: contrastive fine-tuning on image-report pairs (paper 3.1).

    Args:
        clip: the open_clip model to train.
        world: this process.
        validation: this rank's batches of the validation split, in a fixed order; None: no validation.
        precision: fp32, bf16, fp16 or auto.
        sharded: weights are whole only while their own module runs.
        text_drop_path: see `ContrastiveModel`.
    """

    def __init__(
        self,
        clip: open_clip.CLIP,
        world: World,
        validation: Iterable[Batch] | None,
        precision: str,
        *,
        sharded: bool = False,
        text_drop_path: float = 0.0,
    ) -> None:
        self.module = ContrastiveModel(clip, text_drop_path=text_drop_path, sharded=sharded)
        self._world, self._validation = world, validation
        self._by_module = sharded or text_drop_path > 0
        self._autocast = autocast_dtype(precision, world.device)
        self._room = 0

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return self._arguments(batch, by_module=self._by_module)

    def _arguments(self, batch: Batch, *, by_module: bool = False) -> tuple[Tensor, ...]:
        assert batch.tokens is not None
        # The tokens are still on the CPU: packing them waits for nothing.
        texts = (batch.tokens,) if by_module else tuple(map(pin, pack_tokens(batch.tokens)))
        device = self._world.device
        return batch.to(device, True).images, *(tensor.to(device, non_blocking=True) for tensor in texts)

    def tensors(self, batch: Batch) -> dict[str, Tensor] | None:
        """Pixels and packed texts, with rows for as many tokens as any batch had so far and some more."""
        assert batch.tokens is not None
        return self._packed(batch, token_count(batch.tokens))

    def _packed(self, batch: Batch, count: int) -> dict[str, Tensor] | None:
        """The same with room for `count` tokens at least."""
        assert batch.tokens is not None
        if self._by_module:
            return None
        if count > self._room:
            self._room = min(round_up(count * 9 // 8, 64), max(batch.tokens.numel(), count))
        texts = pack_tokens(batch.tokens, self._room)
        return {"pixels": batch.pixels, **{name: pin(tensor) for name, tensor in texts._asdict().items()}}

    def step(self, batch: Batch, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and loss, without the hooks that DeepSpeed has put on the module."""
        images = self._images(batch, tensors["pixels"])
        with torch.autocast(self._world.device.type, self._autocast, enabled=self._autocast is not None):
            output = self.module.forward(images, *(tensors[name] for name in PackedTexts._fields))
        return self.loss(output, batch)

    def _images(self, batch: Any, pixels: Tensor) -> Tensor:
        """(B,3,h,w) of the pixels in place of the batch's own."""
        images: Tensor = replace(batch, pixels=pixels).images
        return images

    def outcome(self, batch: Batch, tensors: dict[str, Tensor], *, reduce: bool) -> Outcome:
        loss, parts, gradients = outcome_of(*self.step(batch, tensors), self.module)
        return loss, parts, all_reduce_mean(gradients) if reduce else gradients

    def loss(self, output: tuple[Tensor, Tensor, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return contrastive_loss(*output), temperature(output[2])

    def bad(self) -> dict[str, str]:
        return bad_images(self._validation)

    @torch.no_grad()
    def validate(self, module: nn.Module) -> dict[str, float]:
        """Mean contrastive loss of the validation batches."""
        if self._validation is None:
            return {}
        module.eval()
        mine: list[tuple[int, Tensor, int]] = []
        for batch in self._validation:
            with torch.autocast(self._world.device.type, self._autocast, enabled=self._autocast is not None):
                output = module(*self._arguments(batch))
            mine.append((batch.place, contrastive_loss(*output).double() * len(batch.ids), len(batch.ids)))
        # Summed in the order of the batches, whichever ranks they were on: the same bits for any number of ranks.
        parts = in_order(all_gather_object([(number, (loss.item(), images)) for number, loss, images in mine]))
        if not parts:
            raise UserError("data.val: no image could be read")
        loss = sum(total for total, _ in parts) / sum(images for _, images in parts)
        if not math.isfinite(loss):
            raise UserError(f"training diverged: the validation loss is {loss}; lower optim.lr or set optim.clip_norm")
        return {"val_loss": loss}

    def score(self, metrics: dict[str, float]) -> float | None:
        """The smaller the loss, the better."""
        return -metrics["val_loss"] if metrics else None


class PromptTask:
    """Phase 2: prompt learning with frozen towers (paper 3.2).

    Args:
        model: its towers are frozen, its head trains.
        loss: the loss.
        world: this process.
        validation: this rank's labelled batches, in a fixed order; None: no validation.
        bank: (M,D) context of validation under `evaluation.context: bank`; None: each batch is its own context.
        precision: fp32, bf16, fp16 or auto.
    """

    def __init__(
        self,
        model: PsPG,
        loss: PromptLoss,
        world: World,
        validation: Iterable[Any] | None,
        *,
        bank: Tensor | None,
        precision: str,
    ) -> None:
        self.module = model.head
        self._model, self._loss, self._world = model, loss, world
        self._validation, self._bank = validation, bank
        self._autocast = autocast_dtype(precision, world.device)
        self._room = 0
        self._first: Scores | None = None

    def features(self, batch: Any) -> ImageFeatures:
        """Features of the frozen image tower, on the device."""
        return frozen_features(self._model, batch, self._world.device, self._autocast)

    def pixels(self, batch: Any) -> Tensor | None:
        """Pixels of a batch whose step can be recorded; None: it cannot, on any rank."""
        found: Tensor = batch.pixels
        return found

    def with_pixels(self, batch: Any, pixels: Tensor) -> Any:
        return replace(batch, pixels=pixels)

    def gathered(self, batch: Any, features: ImageFeatures) -> dict[str, Tensor]:
        """What a step reads of the images of other ranks, by name."""
        return {}

    def with_features(self, batch: Any, known: dict[str, Tensor]) -> Any:
        """The batch with features of its images, and what was gathered, in place of pixels."""
        features = ImageFeatures(*(known[name] for name in ImageFeatures._fields))
        return FeatureBatch(batch.ids, features, batch.labels, batch.index)

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        return self.features(batch), self._model.class_set, self._model.tower

    def loss(self, output: PsPGOutput, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self._prompt_loss(output, batch.labels, self._sample(batch.labels))

    def _sample(self, labels: Tensor) -> PairSample | None:
        """Pairs for the pair loss, from labels on the host: nothing waits for the device. None: all of them.

        They depend on the seed last set, not on what was drawn since.
        """
        if not self._loss.config.pair_samples or not self._loss.needs_pairs:
            return None
        generator = torch.Generator().manual_seed(torch.initial_seed())
        count = self._loss.config.pair_samples * len(self._model.class_set)
        return sample_pairs(labels, count, generator, positives=count)

    def _padded_sample(self, labels: Tensor) -> PaddedSample | None:
        """`_sample` with as many pairs as the largest so far and some more, so that the number hardly ever changes."""
        sample, classes = self._sample(labels), labels.shape[1]
        if sample is None:
            return None
        if len(sample.first) > self._room:
            self._room = min(round_up(len(sample.first) * 5 // 4, 64), number_of_pairs(classes))
        return pad_sample(sample, self._room, classes)

    def _prompt_loss(
        self, output: PsPGOutput, labels: Tensor, sample: PairSample | None, global_batch: GlobalBatch | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        labels, model = labels.to(self._world.device, non_blocking=True), self._model
        # DeepSpeed's autocast ends with the forward, but the pair prompts are encoded here.
        with self._precision():
            return self._loss(
                output,
                labels,
                model.tower,
                sample=sample,
                global_batch=global_batch,
                memory=self.module.text_memory,
                impl=self.module.impl,
            )

    def tensors(self, batch: Any) -> dict[str, Tensor] | None:
        """Pixels or cached features, labels, and the pairs where they are sampled."""
        if batch.labels is None:
            return None
        sample = self._padded_sample(batch.labels)
        return {**image_tensors(batch), "labels": batch.labels, **({} if sample is None else sample._asdict())}

    def step(self, batch: Any, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and loss, without the hooks that DeepSpeed has put on the module."""
        with self._precision():
            output = self.module.forward(*self.inputs(with_tensors(batch, tensors)))
        return self._prompt_loss(output, tensors["labels"], sample_of(tensors))

    def outcome(self, batch: Any, tensors: dict[str, Tensor], *, reduce: bool) -> Outcome:
        loss, parts, gradients = outcome_of(*self.step(batch, tensors), self.module)
        return loss, parts, all_reduce_mean(gradients) if reduce else gradients

    def _precision(self) -> torch.autocast:
        return torch.autocast(self._world.device.type, self._autocast, enabled=self._autocast is not None)

    def bad(self) -> dict[str, str]:
        return bad_images(self._validation)

    def validate(self, module: PromptHead) -> dict[str, float]:
        """Macro AUC over classes with both label values."""
        if self._validation is None:
            return {}
        module.eval()
        mine = score_batches(
            self._model,
            module,
            [self._model.class_set],
            self._validation,
            self._world.device,
            self._autocast,
            context=self._bank,
        )
        parts: list[Scores] = in_order(all_gather_object(mine))
        if not parts:
            raise UserError("data.val: no image could be read")
        scores = Scores.join(parts)
        assert scores.labels is not None
        self._first = scores.of(self._validation.ids) if isinstance(self._validation, FirstImages) else None
        return {"val_macro_auc": macro_auc(scores.labels, scores.probabilities)}

    def scalars(self) -> dict[str, Tensor]:
        """The temperature of the fusion."""
        return temperature(self.module.logit_scale)

    def picture(self) -> NDArray[np.uint8] | None:
        """The first validation images with their labels and scores; None: they were not kept."""
        if self._first is None or not isinstance(self._validation, FirstImages) or not self._first.ids:
            return None
        assert self._first.labels is not None
        names = self._model.class_set.names
        return panel(self._validation.pixels, self._first.labels, self._first.probabilities, names)

    def score(self, metrics: dict[str, float]) -> float | None:
        """Validation Macro AUC."""
        return metrics["val_macro_auc"] if metrics else None


def temperature(logit_scale: Tensor) -> dict[str, Tensor]:
    """The scalar that phase 1 logs."""
    return {"temperature": logit_scale.detach().exp().reciprocal().mean()}


def token_count(tokens: Tensor) -> int:
    """Tokens of texts (B,77) up to their EOS, the largest id."""
    return int((tokens.argmax(dim=-1) + 1).sum())


def image_tensors(batch: Any) -> dict[str, Tensor]:
    """What a step reads of the images of a batch: their features, or pixels."""
    return batch.features._asdict() if isinstance(batch, FeatureBatch) else {"pixels": batch.pixels}


def with_tensors(batch: Any, tensors: dict[str, Tensor]) -> Any:
    """The batch with those of `image_tensors` replaced."""
    if isinstance(batch, FeatureBatch):
        return replace(batch, features=ImageFeatures(*(tensors[name] for name in ImageFeatures._fields)))
    return replace(batch, pixels=tensors["pixels"])


def sample_of(tensors: dict[str, Tensor]) -> PaddedSample | None:
    """The pairs among the tensors of a step; None: all of them."""
    return PaddedSample(*(tensors[name] for name in PairSample._fields)) if PairSample._fields[0] in tensors else None


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def bad_images(batches: object) -> dict[str, str]:
    """id → reason of the images that a loader has left out; empty for anything else."""
    return dict(getattr(batches, "bad", {}))
