"""A phase-2 training step with random weights, by default of the full-size RN50 model, in several implementations.

reference  the literal equations: 77 tokens a prompt, keys and values projected anew at every step, image tower as
           open_clip has it
repaired   the reference as a careful engineer would tidy it: fused attention, frozen towers in low precision on a
           GPU, and there torch.compile with CUDA graphs
eager      the exact algebra in torch, the engine's default on a CPU
triton     the exact algebra with Triton kernels, the engine's default on a GPU
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pspg.engine.config import LossConfig, ModelConfig
from pspg.engine.models.class_set import ClassSet
from pspg.engine.models.clip import ImageFeatures, build_clip, clip_config, image_features, text_tower
from pspg.engine.models.frozen_image import FrozenImageTower
from pspg.engine.models.fusions._spatial import SpatialFusion
from pspg.engine.models.pspg import PromptHead
from pspg.engine.training.losses import PromptLoss
from pspg.kernels.asymmetric_loss import asymmetric_loss
from pspg.kernels.pairs import PairSample, pair_indices
from pspg.kernels.similarity import similarity_logits
from pspg.kernels.text_tower import TextTower

from . import repaired
from .harness import flop_counter

IMPLS = ("reference", "repaired", "eager", "triton")


@dataclass
class Setup:
    """A model with random weights, a class list and a batch."""

    image_tower: Callable[[Tensor], ImageFeatures]
    tower: TextTower
    head: PromptHead
    class_set: ClassSet
    images: Tensor
    """(B,3,h,h), h = 224 at full size"""
    labels: Tensor
    """(B,C)"""

    def loss(self, sample: PairSample | None = None, pair: Literal["spcl", "none"] = "spcl") -> Tensor:
        """ASL + SPCL (preset `paper`) of the batch, in the implementation that the head is set to.

        Args:
            sample: pairs that SPCL is estimated from; None: all.
            pair: none leaves SPCL out.
        """
        output = self.head(self.features(), self.class_set, self.tower)
        return PromptLoss(LossConfig(pair=pair))(
            output,
            self.labels,
            self.tower,
            sample=sample,
            memory=self.head.text_memory,
            impl=self.head.impl,
        )[0]

    def features(self) -> ImageFeatures:
        with torch.no_grad():
            return self.image_tower(self.images)


def make_setup(
    classes: int,
    batch: int,
    device: torch.device,
    impl: str,
    dtype: torch.dtype,
    *,
    clip_settings: Mapping[str, Any] | None = None,
    model: ModelConfig | None = None,
) -> Setup:
    """Random weights and a random batch, the same for every implementation, and `classes` classes of random embeddings.

    Args:
        dtype: of the frozen towers.
        clip_settings: CLIP in open_clip's format; None: the full-size RN50.
        model: of the head; None: the paper's, n = 16.
    """
    torch.manual_seed(0)
    config = {**(clip_settings or clip_config("RN50")), "quick_gelu": True}
    clip = build_clip(config).requires_grad_(False).eval()
    tower = text_tower(clip)
    width, joint = tower.projection.shape
    head = PromptHead(joint, width, model or ModelConfig())
    table = 0.02 * torch.randn(2 + classes, 1, width)
    class_set = ClassSet(
        [f"class {number}" for number in range(classes)],
        torch.randn(classes, joint),
        table[0, 0],
        table[1, 0],
        table[2:],
        [0] * classes,
    )
    head.impl = {"repaired": "reference", "sampled": "eager"}.get(impl, impl)
    if device.type == "meta":
        head.text_memory = 2**62  # counted, nothing may run twice
    side = config["vision_cfg"]["image_size"]
    images, labels = torch.randn(batch, 3, side, side), (torch.rand(batch, classes) < 0.1).float()
    clip.to(device)
    visual: Callable[[Tensor], ImageFeatures]
    if impl == "reference":
        visual = lambda images: image_features(clip, images)  # noqa: E731
    else:
        visual = FrozenImageTower(clip, dtype)
        tower = text_tower(clip).to(dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    kept = torch.float64 if dtype == torch.float64 else torch.float32  # master weights
    head, class_set = head.to(device, kept).train(), class_set.to(device, kept)
    return Setup(visual, tower, head, class_set, images.to(device, kept), labels.to(device))


def repaired_loss(setup: Setup) -> Tensor:
    """The reference's loss as `repaired` computes it."""
    features, head, template, tower = setup.features(), setup.head, setup.class_set.template, setup.tower
    prompts = head.prompt_learner(setup.class_set.class_features, features.global_, impl="reference")
    fusion, scale = head.channel_attention, head.logit_scale
    assert isinstance(fusion, SpatialFusion)
    vectors = fusion(features.tokens)
    sides = repaired.single_features(tower, template, prompts)
    logits = torch.stack([similarity_logits(vectors, side, scale) for side in sides], dim=1)
    pairs = pair_indices(len(setup.class_set), vectors.device)
    return asymmetric_loss(logits, setup.labels) + repaired.spcl(
        tower, template, prompts[0], vectors, scale, setup.labels, pairs
    )


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast to a half precision; nothing for others."""
    return torch.autocast(device.type, dtype) if dtype in (torch.bfloat16, torch.float16) else nullcontext()


def loss_of(
    setup: Setup,
    impl: str,
    dtype: torch.dtype,
    repaired: Callable[[Setup], Tensor] = repaired_loss,
    sample: PairSample | None = None,
) -> Tensor:
    """Loss of an implementation, its towers in `dtype`; `repaired` is the tuned baseline, perhaps compiled."""
    with autocast(setup.images.device, dtype):
        return repaired(setup) if impl == "repaired" else setup.loss(sample)


def exact_flops(classes: int, batch: int, pair: Literal["spcl", "none"] = "spcl") -> int:
    """FLOPs of a step in the exact algebra with nothing computed twice, counted by torch on tensors without storage."""
    meta = torch.device("meta")
    with meta:
        setup = make_setup(classes, batch, meta, "eager", torch.float32)
    with flop_counter() as counter:
        setup.loss(pair=pair).backward()
    return counter.get_total_flops()
