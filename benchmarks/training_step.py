"""One phase-2 training step of the full-size RN50 model, in several forms.

reference  the literal equations: 77 tokens a prompt, keys and values projected anew at every step, image tower as
           open_clip has it
repaired   the reference as a careful engineer would tidy it: fused attention, frozen towers in low precision on a
           GPU, and there torch.compile with CUDA graphs
eager      the exact algebra in torch, the engine's default on a CPU
triton     the exact algebra with Triton kernels, the engine's default on a GPU
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pspg.engine.config import LossConfig, ModelConfig, OptimConfig
from pspg.engine.losses import prompt_loss
from pspg.engine.models.clip import ImageFeatures, build_clip, clip_config, image_features, text_tower
from pspg.engine.models.frozen_image import FrozenImageTower
from pspg.engine.models.prompts import Vocabulary
from pspg.engine.models.pspg import PromptHead
from pspg.engine.trainer import make_optimizer
from pspg.kernels.asymmetric_loss import asymmetric_loss
from pspg.kernels.pair_loss import pair_loss
from pspg.kernels.similarity import similarity_logits
from pspg.kernels.spcl import PairSample
from pspg.kernels.text_tower import TextTower, pair_indices, pair_prompts, single_prompts
from pspg.kernels.text_tower.reference import layer_norm, mlp

IMPLS = ("reference", "repaired", "eager", "triton")


@dataclass
class Setup:
    """A model with random weights, a class list and a batch."""

    image_tower: Callable[[Tensor], ImageFeatures]
    tower: TextTower
    head: PromptHead
    vocabulary: Vocabulary
    images: Tensor
    """(B,3,h,h), h = 224 at full size"""
    labels: Tensor
    """(B,C)"""

    def loss(self, sample: PairSample | None = None) -> Tensor:
        """ASL + SPCL (preset `paper`) of the batch, in the form that the head is set to.

        Args:
            sample: pairs that SPCL is estimated from; None: all.
        """
        output = self.head(self.features(), self.vocabulary, self.tower)
        return prompt_loss(
            output,
            self.labels,
            self.tower,
            self.vocabulary,
            LossConfig(),
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
    """Random weights and a random batch, the same for every form, and `classes` classes of random embeddings.

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
    vocabulary = Vocabulary(
        [f"class {number}" for number in range(classes)],
        torch.randn(classes, joint),
        table[0, 0],
        table[1, 0],
        table[2:],
        [0] * classes,
    )
    head.impl = impl if impl in ("eager", "triton") else "reference"
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
    return Setup(visual, tower, head.to(device).train(), vocabulary.to(device), images.to(device), labels.to(device))


def make_step(setup: Setup, impl: str, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """One step, image tower to optimizer, as a call without arguments."""
    loss: Callable[[], Tensor] = (lambda: repaired_loss(setup)) if impl == "repaired" else setup.loss
    if impl == "repaired" and device.type == "cuda":
        loss = torch.compile(loss, mode="reduce-overhead")
    optimizer = make_optimizer(setup.head, OptimConfig())

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def repaired_loss(setup: Setup) -> Tensor:
    """The reference's loss with fused attention in the text tower: whole sequences of 77 tokens, all pairs at once."""
    features, head, frame = setup.features(), setup.head, setup.vocabulary.frame
    prompts = head.prompt_learner(setup.vocabulary.class_features, features.global_, impl="reference")
    vectors = head.channel_attention(features.tokens)
    tokens = setup.tower.context_length
    logits = torch.stack(
        [
            similarity_logits(
                vectors, _encode(setup.tower, *single_prompts(side, frame, tokens=tokens)), head.logit_scale
            )
            for side in prompts
        ],
        dim=1,
    )
    first, second = pair_indices(len(setup.vocabulary), vectors.device)
    pairs = _encode(setup.tower, *pair_prompts(prompts[0], frame, first, second, tokens=tokens))
    spcl = pair_loss(pairs, vectors, head.logit_scale, setup.labels, impl="reference")
    return asymmetric_loss(logits, setup.labels) + spcl


def _encode(tower: TextTower, embeddings: Tensor, pooled: Tensor) -> Tensor:
    """Text features (N,D) of sequences (N,T,W), with torch's fused causal attention."""
    x = embeddings + tower.positional_embedding[: embeddings.shape[1]]
    for layer in tower.layers:
        y = layer_norm(tower, x, layer.ln_1_weight, layer.ln_1_bias)
        q, k, v = (
            part.unflatten(-1, (tower.heads, -1)).transpose(1, 2)
            for part in F.linear(y, layer.in_proj_weight, layer.in_proj_bias).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.linear(attended, layer.out_proj_weight, layer.out_proj_bias)
        x = x + mlp(tower, layer, layer_norm(tower, x, layer.ln_2_weight, layer.ln_2_bias))
    x = x[torch.arange(len(x), device=x.device), pooled]
    return layer_norm(tower, x, tower.ln_final_weight, tower.ln_final_bias) @ tower.projection


def exact_flops(classes: int, batch: int) -> int:
    """FLOPs of a step in the exact algebra with nothing computed twice, counted by torch on tensors without storage."""
    with torch.device("meta"):
        setup = make_setup(classes, batch, torch.device("meta"), "eager", torch.float32)
    setup.head.text_memory = 2**62
    # Attention as plain products, which the counter knows on every device; of baddbmm it knows one form only.
    known = {torch.ops.aten.baddbmm_: lambda into, left, right, **_: 2 * math.prod(left) * right[-1]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=known) as counter:
        setup.loss().backward()
    return counter.get_total_flops()
