"""The published implementation's own numbers, tensor by tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from pspg.engine.checkpoints.published import import_published
from pspg.engine.config import LossConfig
from pspg.engine.models.clip import ImageFeatures, image_features, with_unit_token
from pspg.engine.models.pspg import PsPG, PsPGOutput
from pspg.engine.training.losses import PromptLoss
from pspg.kernels.pairs import pair_indices
from pspg.kernels.spcl import pair_features
from pspg.kernels.text_tower import Prompts, pair_prompts, single_prompts
from tests.engine.checkpoints.golden import LR, MOMENTUM, WEIGHT_DECAY, read_golden, weights


@dataclass
class Golden:
    """A reference file, the model made from it, and what that model computes."""

    tensors: dict[str, Tensor]
    names: list[str]
    model: PsPG
    features: ImageFeatures
    output: PsPGOutput

    def check(self, key: str, value: Tensor, tolerance: float = 1e-9) -> None:
        torch.testing.assert_close(value, self.tensors[key].to(value.dtype), rtol=0, atol=tolerance)

    def loss(self, **config: Any) -> tuple[Tensor, dict[str, Tensor]]:
        settings = LossConfig(preset="published", **config)
        model = self.model
        return PromptLoss(settings)(self.output, self.tensors["labels"], model.tower)


@pytest.fixture(params=["gru", "gru_prefix", "transformer", "mlp"])
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Golden:
    tensors, metadata = read_golden(request.param)
    file = tmp_path / "published.safetensors"
    save_file(weights(tensors), file, metadata)
    names = json.loads(metadata["names"])
    model = import_published(file, names)
    if request.param == "gru":
        # Another CLIP than the others', without its image encoder: its features come from the file.
        tokens = tensors["image_tokens"].transpose(1, 2)[:, 1:]
        features = with_unit_token(tensors["image_global"], tokens)
    else:
        features = image_features(model.clip, tensors["images"].double())
    output = model.head(features, model.class_set, model.tower, pairs=True)
    return Golden(tensors, names, model, features, output)


def test_settings_come_from_the_file(golden: Golden, request: pytest.FixtureRequest) -> None:
    config, file = golden.model.config, request.node.callspec.id
    decoder, prefix = file.split("_")[0], file.endswith("_prefix")
    assert (config.decoder, config.prompts) == (decoder, "dual")
    assert (config.prompt_length, config.hidden_size, config.decoder_heads, config.prefix) == (4, 32, 4, prefix)
    assert config.fusion == "gate_before_norm"
    assert golden.model.loss_config.preset == "published"
    assert golden.model.class_set.names == golden.names
    assert {parameter.dtype for parameter in golden.model.parameters()} == {torch.float64}


def test_image_tokens(golden: Golden) -> None:
    golden.check("image_global", golden.features.global_)
    expected = golden.tensors["image_tokens"].transpose(1, 2)
    torch.testing.assert_close(golden.features.tokens[:, 1:], expected[:, 1:], rtol=0, atol=1e-9)
    unit = normalize(golden.tensors["image_global"], dim=-1)
    torch.testing.assert_close(golden.features.tokens[:, 0], unit, rtol=0, atol=1e-9)


def test_prompts_and_text_features(golden: Golden) -> None:
    model, template = golden.model, golden.model.class_set.template
    golden.check("class_features", model.class_set.class_features)
    positive, negative = model.prompt_learner(model.class_set.class_features, golden.features.global_)
    golden.check("pos_embed", single_prompts(positive, template, tokens=77)[0])
    golden.check("neg_embed", single_prompts(negative, template, tokens=77)[0])
    golden.check("pair_embed", pair_prompts(positive, template, *pair_indices(len(golden.names)), tokens=77)[0])
    golden.check("pos_features", golden.output.positive_features)
    golden.check("neg_features", golden.output.negative_features)
    golden.check("pair_features", normalize(pair_features(model.tower, Prompts(positive, template)), dim=-1))


def test_logits(golden: Golden) -> None:
    assert golden.output.pair_logits is not None
    golden.check("logits", golden.output.logits)
    golden.check("pair_logits", golden.output.pair_logits)


def test_losses(golden: Golden) -> None:
    total, parts = golden.loss()
    golden.check("loss.total", total)
    golden.check("loss.asl_g1_2", parts["classification"])
    golden.check("loss.spcl_mean", parts["pair"])
    golden.check("loss.asl_g1_4", golden.loss(gamma_negative=4)[1]["classification"])
    golden.check("loss.ranking_mixture", golden.loss(pair="ranking")[0])
    golden.check("loss.pcl_mean_uncertain_as_negative", golden.loss(pair="pcl")[1]["pair"], 1e-6)


def test_gradients_and_one_step(golden: Golden) -> None:
    trained = {name: p for name, p in golden.model.named_parameters() if p.requires_grad}
    assert trained.keys() == {key.removeprefix("grad.") for key in golden.tensors if key.startswith("grad.")}
    golden.loss()[0].backward()
    for name, parameter in trained.items():
        assert parameter.grad is not None
        golden.check(f"grad.{name}", parameter.grad)
    torch.optim.SGD(trained.values(), lr=LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY).step()
    for name, parameter in trained.items():
        golden.check(f"after_step.{name}", parameter)
