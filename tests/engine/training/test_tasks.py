"""The prompt task hands its settings to the pair loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pspg.engine.config import LossConfig, ModelConfig
from pspg.engine.distributed.world import start
from pspg.engine.evaluation.scoring import FeatureBatch
from pspg.engine.models.pspg import PsPG
from pspg.engine.training.losses import PromptLoss
from pspg.engine.training.tasks import PromptTask
from pspg.kernels.pairs import PairSelection
from pspg.kernels.spcl import ImageBatch, sample_pairs, spcl

NAMES = ["edema", "nodule", "cardiomegaly", "pneumonia", "pneumothorax", "effusion", "fracture", "mass"]


@pytest.mark.parametrize("pair", ["spcl", "pcl"])
def test_pairs_are_sampled_from_the_batch_and_repeat_with_its_seed(make_clip: Callable[..., Any], pair: Any) -> None:
    model = PsPG(make_clip(), ModelConfig(prompt_length=3, hidden_size=8, decoder_heads=2, dropout=0.0), NAMES)
    labels = torch.zeros(3, len(NAMES))
    labels[0, [0, 3]] = labels[1, [3, 5]] = 1
    features = model.image_features(torch.randn(3, 3, 32, 32).double())
    batch = FeatureBatch(["a", "b", "c"], features, labels, torch.arange(3))
    output = model.head(features, model.class_set, model.tower)

    def pair_part(seed: int, samples: int) -> tuple[torch.Tensor, Any]:
        config = PromptLoss(LossConfig(pair=pair, pair_samples=samples))
        task = PromptTask(model, config, start("cpu"), None, bank=None, precision="fp32")
        torch.manual_seed(seed)
        return task.loss(output, batch)[1]["pair"], torch.manual_seed(seed)

    got, generator = pair_part(1, 1)
    pairs = PairSelection(len(NAMES), sample_pairs(labels, len(NAMES), generator))
    images = ImageBatch(output.image_vectors, output.logit_scale, labels)
    target: Any = {"spcl": "batch", "pcl": "sample"}[pair]
    torch.testing.assert_close(got, spcl(model.tower, output.prompts, images, target=target, pairs=pairs).detach())
    assert got == pair_part(1, 1)[0] != pair_part(2, 1)[0]
    # More samples than there are other pairs: nothing is estimated.
    torch.testing.assert_close(pair_part(1, 4)[0], pair_part(1, 0)[0])
