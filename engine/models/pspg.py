"""PsPG assembled: frozen CLIP, prompt decoders, spatial fusion, logits (paper fig. 2); DualCoOp from the same parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspg.kernels.precision import at_least_fp32, no_autocast
from pspg.kernels.similarity import similarity_logits
from pspg.kernels.spcl import pair_features
from pspg.kernels.text_tower import Frame, Prefixes, TextTower, encode_prompts

from ..config import LossConfig, ModelConfig, check_head
from ..distributed.collectives import all_gather_rows, local_slice, split
from .clip import ImageFeatures, TextEncoder, image_features, text_tower
from .contexts import ContextLearner
from .frozen_image import FrozenImageTower
from .fusion import SpatialFusion
from .prompts import Vocabulary, make_prompt_learner, make_vocabulary
from .regions import SCALE, region_logits


class TextFeatures(NamedTuple):
    """The text side for one context; it is the same for every image scored with that context."""

    positive_prompts: Tensor
    """(C,n,W)"""
    positive: Tensor
    """(C,D), unit norm, float32 or better"""
    negative: Tensor
    """(C,D), unit norm, float32 or better; zeros where there are positive prompts only"""
    prefixes: Prefixes | None
    """states of the positive prompts' prefixes, for the pair loss; None where no gradient is recorded, or where ranks
    share the classes: each encodes the prefixes of its own pairs then"""


@dataclass
class PsPGOutput:
    """What one forward pass gives."""

    logits: Tensor
    """(B,2,C), index 0 positive; index 1 is 0 where there are positive prompts only"""
    pair_logits: Tensor | None
    """(B,P), pairs i < j row-major, where asked for"""
    positive_prompts: Tensor
    """(C,n,W)"""
    prefixes: Prefixes | None
    """as in `TextFeatures`"""
    image_vectors: Tensor | None
    """(B,D) fused image vectors; None under fusion regions, where each class has its own"""
    logit_scale: Tensor
    """scalar, log of the inverse temperature"""
    positive_features: Tensor
    """(C,D), unit norm"""
    negative_features: Tensor
    """(C,D), unit norm; zeros where there are positive prompts only"""


def probabilities(logits: Tensor) -> Tensor:
    """(B,C) probabilities of logits (B,2,C): softmax over positive and negative (paper eq. 2).

    With positive prompts only this is the sigmoid of the positive logit.
    """
    return torch.softmax(logits, dim=1)[:, 0]


def class_logits(
    fusion: SpatialFusion | None, logit_scale: Tensor, tokens: Tensor, positive: Tensor, negative: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Logits of images for classes whose text features are known: all that scoring needs of a model.

    Args:
        fusion: of the tokens; None: regions.
        logit_scale: scalar, log of the inverse temperature.
        tokens: (B,S,D), token 0 global.
        positive, negative: (C,D) text features of each side, as in `TextFeatures`.

    Returns:
        (B,2,C), index 0 positive, and the fused image vectors (B,D), which regions do not have; float32 or better.
    """
    if fusion is None:
        return region_logits(tokens[:, 1:], positive, negative), None
    vectors = fusion(tokens)
    return torch.stack([similarity_logits(vectors, side, logit_scale) for side in (positive, negative)], dim=1), vectors


class PromptHead(nn.Module):
    """Exactly what trains in phase 2; its state dict has the published names.

    Args:
        width: D, joint embedding width of the CLIP.
        text_width: W, width of its text tower.
        config: everything of the decoders, and fusion.

    Attributes:
        impl: form of the operators, as their `impl`.
        text_memory: bytes of the text tower's activations to hold at a time; None: the operators' default.
        channel_attention: fusion of an image's tokens; None under fusion regions, which has no parameters, and whose
            temperature is a constant: `logit_scale` does not train then.

    Raises:
        UserError: see `check_head`.
    """

    def __init__(self, width: int, text_width: int, config: ModelConfig) -> None:
        super().__init__()
        self.impl = "auto"
        self.text_memory: int | None = None
        check_head(config)
        self.prompt_learner = make_prompt_learner(width, text_width, config)
        self.channel_attention = None if config.fusion == "regions" else SpatialFusion(config.fusion)
        scale = 1 / 0.07 if self.channel_attention is not None else SCALE
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=self.channel_attention is not None)

    def text_features(self, context: Tensor, vocabulary: Vocabulary, tower: TextTower, ranks: int = 1) -> TextFeatures:
        """Prompts and text features of the classes.

        Args:
            context: (M,D) raw global features that the prompts attend to.
            ranks: how many ranks, this one among them, ask for the same. Where there are as many classes, each encodes
                the single prompts of its part of them: that costs a text tower less a class that others encode, and two
                collectives of (2,C,D). The decoders run on every rank, as classes attend to one another at each step.
        """
        prompts = self.prompt_learner(vocabulary.class_features, context, impl=self.impl)
        if 1 < ranks <= len(vocabulary):
            pieces = split(len(vocabulary), ranks)
            start, stop = local_slice(len(vocabulary))
            own, frame = prompts[:, start:stop], vocabulary.frame.rows(start, stop)
            sides, prefixes = self._encode(own, frame, tower, prefixes=False)
            sides = all_gather_rows(sides.transpose(0, 1), [stop - start for start, stop in pieces]).transpose(0, 1)
        else:
            sides, prefixes = self._encode(prompts, vocabulary.frame, tower, prefixes=torch.is_grad_enabled())
        # Without negative prompts their logit is 0: the softmax of (z, 0) is the sigmoid of z.
        negative = sides[1] if len(sides) == 2 else torch.zeros_like(sides[0])
        return TextFeatures(prompts[0], sides[0], negative, prefixes)

    def _encode(
        self, prompts: Tensor, frame: Frame, tower: TextTower, *, prefixes: bool
    ) -> tuple[Tensor, Prefixes | None]:
        """Unit features (G,C,D) of the single prompts, and the prefixes' states if asked for."""
        found = encode_prompts(tower, frame, prompts, prefixes=prefixes, memory=self.text_memory, impl=self.impl)
        with no_autocast(found.features):
            return F.normalize(at_least_fp32(found.features), dim=-1), found.prefixes

    def forward(
        self,
        features: ImageFeatures | tuple[Tensor, Tensor],
        vocabulary: Vocabulary,
        tower: TextTower,
        context: Tensor | None = None,
        ranks: int = 1,
        *,
        text: TextFeatures | None = None,
        pairs: bool = False,
    ) -> PsPGOutput:
        """Score B images for C classes.

        Args:
            features: global (B,D) and tokens (B,S,D) of the image tower.
            vocabulary: the classes.
            tower: frozen text tower.
            context: (M,D) global features that the prompts attend to; None: those of this batch (the paper).
            ranks: as in `text_features`.
            text: result of `text_features`, computed before; `context` is then not used.
            pairs: compute pair logits too.

        Raises:
            ValueError: pairs under fusion regions.
        """
        global_, tokens = features
        if text is None:
            text = self.text_features(global_ if context is None else context, vocabulary, tower, ranks)
        logits, vectors = class_logits(self.channel_attention, self.logit_scale, tokens, text.positive, text.negative)
        pair_logits = None
        if pairs:
            if vectors is None:
                raise ValueError("pairs: fusion regions makes no image vector to compare pairs with")
            pair_texts = pair_features(tower, vocabulary.frame, text.positive_prompts, impl=self.impl)
            pair_logits = similarity_logits(vectors, pair_texts, self.logit_scale)
        return PsPGOutput(
            logits=logits,
            pair_logits=pair_logits,
            positive_prompts=text.positive_prompts,
            prefixes=text.prefixes,
            image_vectors=vectors,
            logit_scale=self.logit_scale,
            positive_features=text.positive,
            negative_features=text.negative,
        )


class PsPG(nn.Module):
    """Frozen CLIP, prompt head and class list.

    CLIP stays in eval mode, without gradients, whatever `train()` says. What trains carries its published names
    (`prompt_learner.…`, `channel_attention.conv.weight`, `logit_scale`), the towers are under `clip.`.

    Args:
        clip: made by `build_clip` or `load_clip`; it is frozen here.
        config: everything but the backbone is used.
        names: C class names.
        class_encoder: text encoder for class features and token embeddings; None: the CLIP's own.

    Raises:
        UserError: names or prompts that the text tower cannot take.
    """

    def __init__(
        self,
        clip: open_clip.CLIP,
        config: ModelConfig,
        names: Sequence[str],
        *,
        class_encoder: TextEncoder | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.loss_config = LossConfig()
        """loss that the weights were made for; informative"""
        self.clip = clip.eval().requires_grad_(False)
        self.tower = text_tower(clip)
        self._class_encoder = class_encoder
        text_width, width = self.tower.projection.shape
        head = PromptHead(width, text_width, config)
        self.prompt_learner = head.prompt_learner
        self.channel_attention = head.channel_attention
        self.logit_scale = head.logit_scale
        # In a tuple, so that it is not registered: its parts already are, under their published names.
        self._head = (head,)
        self._image_tower: tuple[FrozenImageTower] | None = None
        self.vocabulary = self._make_vocabulary(names)
        self.to(self.tower.projection.dtype)
        if isinstance(self.prompt_learner, ContextLearner) and config.context_init == "template":
            self.prompt_learner.start_from_templates(clip.token_embedding.weight)

    @property
    def head(self) -> PromptHead:
        """What trains, as one module; it shares this model's parameters."""
        return self._head[0]

    def set_classes(self, names: Sequence[str]) -> None:
        """Score another class list from now on.

        Raises:
            UserError: names that the text tower cannot take.
        """
        self.vocabulary = self.vocabulary_of(names)

    def vocabulary_of(self, names: Sequence[str]) -> Vocabulary:
        """Constants of another class list, where the model is.

        Raises:
            UserError: names that the text tower cannot take.
        """
        return self._make_vocabulary(names).to(self.logit_scale.device, self.logit_scale.dtype)

    def freeze(self, dtype: torch.dtype | None = None) -> PsPG:
        """Put both towers into their inference form, on the device where the model is; call it after `.to(device)`.

        The CLIP itself stays as it is: class features are made with it, and exports hold it.

        Args:
            dtype: low precision of both towers; None: that of their weights.
        """
        self._image_tower = (FrozenImageTower(self.clip, dtype),)
        if dtype is not None:
            self.tower = self.tower.to(dtype)
        return self

    @torch.no_grad()
    def image_features(self, images: Tensor) -> ImageFeatures:
        """Features of images (B,3,h,w), without gradients."""
        return image_features(self.clip, images) if self._image_tower is None else self._image_tower[0](images)

    def _make_vocabulary(self, names: Sequence[str]) -> Vocabulary:
        source = self.clip if self._class_encoder is None else self._class_encoder
        # Contexts are the same for all classes: what follows them must tell classes apart.
        prefix = self.config.prefix or self.config.decoder == "context"
        return make_vocabulary(source, names, prefix, prompt_length=self.config.prompt_length)

    def train(self, mode: bool = True) -> PsPG:
        super().train(mode)
        self.head.train(mode)
        self.clip.eval()
        return self

    def forward(self, images: Tensor, *, context: Tensor | None = None, pairs: bool = False) -> PsPGOutput:
        """Score images (B,3,h,w); `context` and `pairs` as in `PromptHead.forward`."""
        return self.head(self.image_features(images), self.vocabulary, self.tower, context=context, pairs=pairs)
