"""The contract of prompt decoders, the prompt learner that holds one or two of them, and parts that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from pspg.kernels.precision import compute_dtype
from pspg.kernels.prompt_decoder import decode
from pspg.kernels.prompt_decoder.stacked import Stacked, affine

from ...config import ModelConfig


class DecoderSizes(NamedTuple):
    """Widths that a decoder's parameters depend on."""

    width: int
    """D, of class features, image features and the recurrent decoders' outputs"""
    hidden_size: int
    """H"""
    text_width: int
    """W, of the prompt vectors"""
    heads: int
    """attention heads; they divide H"""
    prompt_length: int
    """n"""


class PromptDecoder(nn.Module):
    """One decoder under the published names. It holds parameters only; `operator` runs several decoders at once.

    Args:
        sizes: its widths.
    """

    name: ClassVar[str]
    """value of `model.decoder`"""
    output: ClassVar[str]
    """name of the layer that makes prompt vectors of what `operator` returns"""
    dropout: ClassVar[bool] = True
    """apply `model.dropout` to what `operator` returns, in training"""
    prompts: ClassVar[tuple[str, ...]] = ("dual", "shared", "positive")
    """values of `model.prompts` that it goes with"""
    needs_prefix: ClassVar[bool] = False
    """prompts always stand before the class name, whatever `model.prefix` says"""
    uses_context: ClassVar[bool] = True
    """scores depend on the images that the prompts attend to"""
    takes_present: ClassVar[bool] = False
    """`operator` takes `present` as `decode` does, so that ranks record a batch of which some image cannot be read"""
    method: ClassVar[str] = "PsPG"
    """name of the method in reports, if the fusion says the same"""
    about: ClassVar[str | None] = None
    """what the method does, for model cards, after its name; None: the text on PsPG"""
    published: ClassVar[tuple[str, int] | None] = None
    """a parameter that only this decoder has in the published layout, and its dimension that is H; None: it has no
    place there"""
    published_length: ClassVar[str | None] = None
    """a parameter with n·W rows, where the published layout tells n"""

    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()

    @classmethod
    def operator(
        cls, decoders: Sequence[dict[str, Tensor]], class_features: Tensor, context: Tensor, **settings: Any
    ) -> Tensor:
        """Outputs of several decoders; arguments and result as `pspg.kernels.prompt_decoder.decode`."""
        return decode(decoders, class_features, context, kind=cls.name, **settings)

    @classmethod
    def random_factors(cls, drop_path: float, decoders: int, prompt_length: int, like: Tensor) -> dict[str, Any]:
        """Further arguments of `operator` in training, drawn for each step; `like` is (C,D)."""
        return {}

    @classmethod
    def learner(cls, width: int, text_width: int, config: ModelConfig) -> nn.Module:
        """Prompt learner of a configuration, freshly initialised; D and W are the widths of the CLIP."""
        return PromptLearner(cls, width, text_width, config)

    def weights(self) -> dict[str, Tensor]:
        """Parameters by published name, for `operator`."""
        return dict(self.named_parameters())

    @property
    def projection(self) -> nn.Linear:
        """The layer `output`: to W, or to n·W where one row of `operator`'s result is all n vectors."""
        layer = self.get_submodule(self.output)
        assert isinstance(layer, nn.Linear)
        return layer


class PromptLearner(nn.Module):
    """One or two decoders: class features and image context in, prompts out.

    Args:
        kind: class of the decoders.
        width, text_width: D and W of the CLIP.
        config: n, H, heads, dropout, drop path, and `prompts`. dual: a decoder for positive and one for negative
            prompts; shared: one decoder with an output projection for each; positive: no negative prompts.
    """

    def __init__(self, kind: type[PromptDecoder], width: int, text_width: int, config: ModelConfig) -> None:
        super().__init__()
        self.kind, self.prompt_length, self.heads = kind, config.prompt_length, config.decoder_heads
        self.dropout, self.drop_path = config.dropout if kind.dropout else 0.0, config.drop_path
        sizes = DecoderSizes(width, config.hidden_size, text_width, config.decoder_heads, config.prompt_length)
        self.pos_decoder = kind(sizes)
        self.neg_decoder = kind(sizes) if config.prompts == "dual" else None
        self.neg_output: nn.Linear | None = None
        if config.prompts == "shared":
            projection = self.pos_decoder.projection
            self.neg_output = nn.Linear(projection.in_features, projection.out_features)
            initialise(self.neg_output)

    def start(self, token_embedding: Tensor) -> None:
        """Initialise what depends on the CLIP's token embedding (vocabulary, W): nothing here."""

    def forward(
        self, class_features: Tensor, context: Tensor, *, present: Tensor | None = None, impl: str = "auto"
    ) -> Tensor:
        """Positive prompts and, if any, negative ones, (2,C,n,W) or (1,C,n,W).

        Args:
            class_features: (C,D).
            context: (B,D) raw global features of the images that the prompts attend to.
            present: (B,) bool, images that count, for decoders that take it; None: all.
            impl: implementation of the decoder, as in `decode`.
        """
        decoders = [decoder for decoder in (self.pos_decoder, self.neg_decoder) if decoder is not None]
        more: dict[str, Any] = {} if present is None else {"present": present}
        if self.training and self.drop_path:
            more |= self.kind.random_factors(self.drop_path, len(decoders), self.prompt_length, class_features)
        outputs = self.kind.operator(
            [decoder.weights() for decoder in decoders],
            class_features,
            context,
            prompt_length=self.prompt_length,
            heads=self.heads,
            impl=impl,
            **more,
        )
        outputs = F.dropout(outputs, self.dropout, self.training)
        projections = [decoder.projection for decoder in decoders]
        if self.neg_output is not None:
            projections, outputs = [*projections, self.neg_output], outputs.expand(2, *outputs.shape[1:])
        dtype = compute_dtype(outputs)
        parts = [{"weight": projection.weight, "bias": projection.bias} for projection in projections]
        stacked = Stacked(parts, dtype, cast=("weight", "bias"))
        prompts = affine(outputs.to(dtype).flatten(1, -2), stacked["weight"], stacked["bias"])
        return prompts.view(len(projections), len(class_features), self.prompt_length, -1)


class SelfAttention(nn.Module):
    """Attention across classes, a linear layer, and the LayerNorm that both share; holds parameters only."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(hidden_size, heads)
        self.fc = nn.Linear(hidden_size, hidden_size)
        self.layer_norm = nn.LayerNorm(hidden_size)


class RecurrentDecoder(PromptDecoder):
    """Parameters that the GRU and the LSTM decoder share; the recurrent cell is registered under the decoder's name."""

    output = "output_proj"
    cell: ClassVar[type[nn.Module]]

    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__(sizes)
        width, hidden_size, text_width, heads, _ = sizes
        self.add_module(self.name, self.cell(width, hidden_size))
        self.encoder_proj = nn.Linear(width, hidden_size)
        self.self_attention = SelfAttention(hidden_size, heads)
        self.encoder_attention = nn.MultiheadAttention(hidden_size, heads)
        self.fc = nn.Linear(hidden_size, width)
        self.output_proj = nn.Linear(width, text_width)
        initialise(self)


def initialise(module: nn.Module) -> None:
    """Linear weights (attention out-projections too) from a normal of deviation 0.02 truncated at ±2, zero biases.

    Recurrent cells and attention in-projections keep torch's initialisation.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
