"""PsPG assembled: frozen CLIP, prompt decoders, spatial fusion, logits (paper fig. 2); DualCoOp from the same parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspg.kernels.precision import at_least_fp32, no_autocast
from pspg.kernels.similarity import similarity_logits
from pspg.kernels.spcl import pair_features
from pspg.kernels.text_tower import Prompts, PromptTemplate, TextTower, encode_prompts

from ..config import LossConfig, ModelConfig
from ..utils.errors import UserError
from .class_set import ClassSet, make_class_set
from .clip import ImageFeatures, TextEncoder, image_features, text_tower
from .decoders import DECODERS
from .frozen_image import FrozenImageTower
from .fusions import FUSIONS
from .residual import ClassResidual, own_mixing, related_mixing


class TextFeatures(NamedTuple):
    """The text side for one context; it is the same for every image scored with that context."""

    prompts: Prompts
    """positive prompts; with their prefix cache, for the pair loss, where a gradient is recorded and one process
    encodes all classes"""
    positive: Tensor
    """(C,D), unit norm, float32 or better"""
    negative: Tensor
    """(C,D), unit norm, float32 or better; zeros where there are positive prompts only"""


@dataclass
class PsPGOutput:
    """Output of one forward pass."""

    logits: Tensor
    """(B,2,C), index 0 positive; index 1 is 0 where there are positive prompts only"""
    pair_logits: Tensor | None
    """(B,P), pairs i < j row-major, where asked for"""
    prompts: Prompts
    """prompts, as in `TextFeatures`"""
    image_vectors: Tensor | None
    """(B,D) fused image vectors; None where each class has its own"""
    logit_scale: Tensor
    """scalar, log of the inverse temperature"""
    positive_features: Tensor
    """(C,D), unit norm"""
    negative_features: Tensor
    """(C,D), unit norm; zeros where there are positive prompts only"""


def probabilities(logits: Tensor, lines: Tensor | None = None) -> Tensor:
    """(B,C) probabilities of logits (B,2,C): softmax over positive and negative (paper eq. 2).

    With positive prompts only this is the sigmoid of the positive logit.

    Args:
        logits: (B,2,C).
        lines: (2,C) slopes and intercepts of a calibration, which the log-odds go through; None: as they are.
    """
    if lines is None:
        return torch.softmax(logits, dim=1)[:, 0]
    slope, intercept = lines.to(logits)
    return torch.sigmoid(slope * (logits[:, 0] - logits[:, 1]) + intercept)


def method_name(config: ModelConfig) -> str:
    """Name of the method that a decoder and a fusion make together, for reports."""
    decoder, fusion = DECODERS[config.decoder], FUSIONS[config.fusion]
    return decoder.method if decoder.method == fusion.method else PsPG.__name__


def check_head(model: ModelConfig) -> None:
    """Refuse prompt heads that cannot be built.

    Raises:
        UserError: naming the key and what to do.
    """
    if model.hidden_size % model.decoder_heads:
        raise UserError(
            f"model.decoder_heads: {model.decoder_heads} heads do not divide model.hidden_size {model.hidden_size}"
        )
    allowed = DECODERS[model.decoder].prompts
    if model.prompts not in allowed:
        raise UserError(
            f"model.prompts: {model.prompts} does not go with model.decoder {model.decoder}; use {' or '.join(allowed)}"
        )


class Encode(Protocol):
    """Encodes the single prompts of all classes; `PromptHead.encode` does, or something that shares the work out."""

    def __call__(self, prompts: Tensor, template: PromptTemplate, tower: TextTower) -> tuple[Tensor, Prompts]:
        """Unit features (G,C,D) of prompts (G,C,n,W), and the positive prompts."""


class PromptHead(nn.Module):
    """Exactly what trains in phase 2; its state dict has the published names.

    Args:
        width: D, joint embedding width of the CLIP.
        text_width: W, width of its text tower.
        config: everything of the decoders, and fusion.
        classes: K training classes, whose residuals it holds unless under `residual: none`.

    Attributes:
        impl: implementation of the operators, as their `impl`.
        text_memory: bytes of the text tower's activations to hold at a time; None: the operators' default.
        channel_attention: fusion of an image's tokens.
        residual: of the text features; None under `residual: none`.

    Raises:
        UserError: see `check_head`.
    """

    def __init__(self, width: int, text_width: int, config: ModelConfig, classes: int = 0) -> None:
        super().__init__()
        self.impl = "auto"
        self.text_memory: int | None = None
        check_head(config)
        self.prompt_learner = DECODERS[config.decoder].learner(width, text_width, config)
        self.channel_attention = FUSIONS[config.fusion]()
        self.logit_scale = nn.Parameter(
            torch.tensor(math.log(self.channel_attention.scale)),
            requires_grad=self.channel_attention.trains_temperature,
        )
        sides = 1 if config.prompts == "positive" else 2
        self.residual = None if config.residual == "none" else ClassResidual(sides, classes, width)

    def text_features(
        self,
        context: Tensor,
        class_set: ClassSet,
        tower: TextTower,
        encode: Encode | None = None,
        present: Tensor | None = None,
    ) -> TextFeatures:
        """Prompts and text features of the classes.

        Args:
            context: (M,D) raw global features that the prompts attend to.
            encode: in place of `self.encode`.
            present: (M,) bool, of the context what counts; None: all. Not every decoder takes it.
        """
        more = {} if present is None else {"present": present}
        prompts = self.prompt_learner(class_set.class_features, context, impl=self.impl, **more)
        sides, positive = (encode or self.encode)(prompts, class_set.template, tower)
        if self.residual is not None:
            sides = self.residual(sides, class_set.mixing)
        # Without negative prompts their logit is 0: the softmax of (z, 0) is the sigmoid of z.
        features, *others = sides.unbind()
        return TextFeatures(positive, features, others[0] if others else torch.zeros_like(features))

    def encode(
        self, prompts: Tensor, template: PromptTemplate, tower: TextTower, *, keep_cache: bool | None = None
    ) -> tuple[Tensor, Prompts]:
        """Unit features (G,C,D) of the single prompts, and the positive prompts.

        Args:
            prompts: (G,C,n,W).
            template: embeddings around the prompts.
            tower: frozen text tower.
            keep_cache: keep the positive prompts' prefix cache for the pair loss; None: where a gradient is recorded.
        """
        keep = torch.is_grad_enabled() if keep_cache is None else keep_cache
        found = encode_prompts(tower, template, prompts, keep_cache=keep, memory=self.text_memory, impl=self.impl)
        with no_autocast(found.features):
            return F.normalize(at_least_fp32(found.features), dim=-1), found.prompts

    def forward(
        self,
        features: ImageFeatures | tuple[Tensor, Tensor],
        class_set: ClassSet,
        tower: TextTower,
        context: Tensor | None = None,
        encode: Encode | None = None,
        present: Tensor | None = None,
        *,
        text: TextFeatures | None = None,
        pairs: bool = False,
    ) -> PsPGOutput:
        """Score B images for C classes.

        Args:
            features: global (B,D) and tokens (B,S,D) of the image tower.
            class_set: the classes.
            tower: frozen text tower.
            context: (M,D) global features that the prompts attend to; None: those of this batch (the paper).
            encode, present: as in `text_features`.
            text: result of `text_features`, computed before; `context` is then not used.
            pairs: compute pair logits too.

        Raises:
            ValueError: pairs of a fusion that makes no image vectors.
        """
        global_, tokens = features
        if text is None:
            text = self.text_features(global_ if context is None else context, class_set, tower, encode, present)
        logits, vectors = self.channel_attention.class_logits(self.logit_scale, tokens, text.positive, text.negative)
        pair_logits = None
        if pairs:
            if vectors is None:
                raise ValueError(
                    f"pairs: fusion {self.channel_attention.name} makes no image vector to compare pairs with"
                )
            pair_texts = pair_features(tower, text.prompts, impl=self.impl)
            pair_logits = similarity_logits(vectors, pair_texts, self.logit_scale)
        return PsPGOutput(
            logits=logits,
            pair_logits=pair_logits,
            prompts=text.prompts,
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
        shared: all ranks build this model alike, on the CPU, and each encodes a part of the class names.

    Raises:
        UserError: names or prompts that the text tower cannot take.
    """

    prompt_learner: Any

    def __init__(
        self,
        clip: open_clip.CLIP,
        config: ModelConfig,
        names: Sequence[str],
        *,
        class_encoder: TextEncoder | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.loss_config = LossConfig()
        """loss that the weights were made for; informative"""
        self.clip = clip.eval().requires_grad_(False)
        self.tower = text_tower(clip)
        self._class_encoder = class_encoder
        text_width, width = self.tower.projection.shape
        head = PromptHead(width, text_width, config, len(names))
        self.prompt_learner = head.prompt_learner
        self.channel_attention = head.channel_attention
        self.residual = head.residual
        self.logit_scale = head.logit_scale
        # In a tuple, so that it is not registered: its parts already are, under their published names.
        self._head = (head,)
        self._image_tower: tuple[FrozenImageTower] | None = None
        self.training_names = list(names)
        self.class_set = self._make_class_set(names, shared)
        self.training_set = self.class_set
        """the classes that the head was trained on"""
        self._place(self.class_set)
        self.to(self.tower.projection.dtype)
        self.prompt_learner.start(clip.token_embedding.weight)

    @property
    def head(self) -> PromptHead:
        """Everything that trains, as one module; it shares this model's parameters."""
        return self._head[0]

    def set_classes(self, names: Sequence[str]) -> None:
        """Score another class list from now on.

        Raises:
            UserError: names that the text tower cannot take.
        """
        self.class_set = self.class_set_of(names)

    def class_set_of(self, names: Sequence[str]) -> ClassSet:
        """Constants of another class list, where the model is.

        Raises:
            UserError: names that the text tower cannot take.
        """
        class_set = self._make_class_set(names)
        self._place(class_set)
        return class_set.to(self.logit_scale.device, self.logit_scale.dtype)

    def freeze(self, dtype: torch.dtype | None = None) -> PsPG:
        """Prepare both towers for inference, on the device where the model is; call it after `.to(device)`.

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

    def _make_class_set(self, names: Sequence[str], shared: bool = False) -> ClassSet:
        source = self.clip if self._class_encoder is None else self._class_encoder
        prefix = self.config.prefix or DECODERS[self.config.decoder].needs_prefix
        return make_class_set(source, names, prefix, prompt_length=self.config.prompt_length, shared=shared)

    def _place(self, class_set: ClassSet) -> None:
        """Tell the classes which of the training classes' residuals they have."""
        class_set.place_among(self.training_names)
        if self.config.residual == "class":
            class_set.mixing = own_mixing(class_set.rows, len(self.training_names))
        elif self.config.residual == "related":
            features = class_set.class_features, self.training_set.class_features.to(class_set.rows.device)
            class_set.mixing = related_mixing(class_set.rows, *features)

    def train(self, mode: bool = True) -> PsPG:
        super().train(mode)
        self.head.train(mode)
        self.clip.eval()
        return self

    def forward(self, images: Tensor, *, context: Tensor | None = None, pairs: bool = False) -> PsPGOutput:
        """Score images (B,3,h,w); `context` and `pairs` as in `PromptHead.forward`."""
        return self.head(self.image_features(images), self.class_set, self.tower, context=context, pairs=pairs)
