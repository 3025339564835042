"""Phase 2's loss: a classification loss and a pair loss (paper eq. 9); nothing here waits for the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from pspg.kernels.pairs import PairSample
from pspg.kernels.text_tower import TextTower

from ...config import LossConfig
from ...models.pspg import PsPGOutput
from .classification import CLASSIFICATION_LOSSES
from .pair import PAIR_LOSSES
from .pair._base import GlobalBatch, PairInputs


def resolve(config: LossConfig) -> LossConfig:
    """A copy with every null filled from the preset.

    Raises:
        UserError: no such loss.
    """
    published, pair = config.preset == "published", PAIR_LOSSES[config.pair]
    fill: dict[str, Any] = {
        "classification_weight": 0.1 if published else 1.0,
        "classification_reduction": "sum",
        "pair_weight": pair.published_weight if published else 1.0,
        "pair_reduction": "mean" if published else pair.paper_reduction,
    }
    return replace(config, **{key: value for key, value in fill.items() if getattr(config, key) is None})


class PromptLoss:
    """Weighted sum of a classification loss and a pair loss.

    Args:
        config: losses, weights and reductions; nulls are filled from its preset.

    Attributes:
        config: without nulls.
        needs_pairs: whether the pair loss encodes pair prompts.

    Raises:
        UserError: no such loss.
    """

    def __init__(self, config: LossConfig) -> None:
        self.config = resolve(config)
        self._classification = CLASSIFICATION_LOSSES[config.classification](self.config)
        self._pair = PAIR_LOSSES[config.pair]()
        self.needs_pairs = self._pair.needs_pairs

    def __call__(
        self,
        output: PsPGOutput,
        labels: Tensor,
        tower: TextTower,
        *,
        sample: PairSample | None = None,
        global_batch: GlobalBatch | None = None,
        memory: int | None = None,
        impl: str = "auto",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of B images.

        Args:
            output: of the head.
            labels: (B,C) in {1, 0, -1}. -1 is left out of classification and ranking, and counts as 0 in label pairs.
            tower: frozen text tower.
            sample: pairs that SPCL or PCL is estimated from; None: all.
            global_batch: what the B images are a share of; `output.image_vectors` are then those of all M. None: B is
                all.
            memory, impl: as in `spcl`; `impl` picks the implementation of the asymmetric loss, too.

        Returns:
            Weighted sum, and the detached unweighted parts `classification` and, if any, `pair`.

        Raises:
            ValueError: SPCL or PCL of an output without image vectors.
        """
        total, parts = self.classification(output, labels, global_batch, impl=impl)
        pair, part = self.pairs(output, labels, tower, sample, global_batch, memory=memory, impl=impl)
        return total if pair is None else total + pair, {**parts, **part}

    def classification(
        self, output: PsPGOutput, labels: Tensor, global_batch: GlobalBatch | None = None, *, impl: str = "auto"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted classification loss, and the detached unweighted one; arguments as of the whole."""
        config = self.config
        assert config.classification_weight is not None
        assert config.classification_reduction is not None
        reduction = config.classification_reduction if global_batch is None else "sum"
        loss = self._classification(output.logits, labels, reduction=reduction, impl=impl)
        if global_batch is not None and config.classification_reduction == "mean":
            loss = loss / (global_batch.labels >= 0).sum().clamp(min=1)
        return config.classification_weight * loss, {"classification": loss.detach()}

    def pairs(
        self,
        output: PsPGOutput,
        labels: Tensor,
        tower: TextTower,
        sample: PairSample | None = None,
        global_batch: GlobalBatch | None = None,
        *,
        memory: int | None = None,
        impl: str = "auto",
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The weighted pair loss, None without one, and the detached unweighted one; arguments as of the whole.

        Raises:
            ValueError: SPCL or PCL of an output without image vectors.
        """
        assert self.config.pair_weight is not None
        assert self.config.pair_reduction is not None
        reduction = self.config.pair_reduction
        pair = self._pair(PairInputs(output, labels, tower, reduction, sample, global_batch, memory=memory, impl=impl))
        return (None, {}) if pair is None else (self.config.pair_weight * pair, {"pair": pair.detach()})
