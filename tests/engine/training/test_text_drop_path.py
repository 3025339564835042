"""Drop-path in the text tower of phase 1: rates 0 to the set one over the blocks, in training only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch

from pspg.engine.commands.train import make_trainer
from pspg.engine.distributed.world import start
from pspg.engine.training.config import DataConfig, ModelConfig, TrainConfig, check_train
from pspg.engine.training.tasks import ContrastiveModel
from pspg.engine.utils.errors import UserError

MakeClip = Callable[..., open_clip.CLIP]


@pytest.fixture
def texts() -> torch.Tensor:
    return open_clip.tokenize(["no acute process", "left effusion with a fracture"] * 100)


def features(model: ContrastiveModel, texts: torch.Tensor) -> torch.Tensor:
    images = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        return model(images, texts)[1]


def test_it_drops_in_training_only_and_keeps_the_weights(make_clip: MakeClip, texts: torch.Tensor) -> None:
    plain = ContrastiveModel(make_clip(vit=True))
    model = ContrastiveModel(make_clip(vit=True), text_drop_path=0.5)
    assert model.state_dict().keys() == plain.state_dict().keys()
    blocks = model.clip.transformer.resblocks
    rates = [(block.ls_1.drop_prob, block.ls_2.drop_prob) for block in blocks]
    assert rates == [(rate, rate) for rate in torch.linspace(0, 0.5, len(blocks)).tolist()]
    torch.testing.assert_close(features(model.eval(), texts), features(plain.eval(), texts))
    torch.manual_seed(0)
    found = features(model.train(), texts)
    # 2 texts, each with 4 outcomes of the last block's two branches.
    assert len(torch.unique(found.round(decimals=8), dim=0)) == 8
    whole = features(plain.train(), texts)
    same = torch.isclose(found, whole, atol=1e-6).all(dim=1).double().mean()
    assert same == 0  # branches that are kept are scaled up


def test_settings_that_do_not_go_with_it(tmp_path: Path) -> None:
    model = ModelConfig(text_drop_path=0.1)
    with pytest.raises(UserError, match=r"model\.text_drop_path: is for phase 1"):
        check_train(TrainConfig(task="prompt", model=model, data=DataConfig(train="a.jsonl")))
    config = TrainConfig(task="contrastive", model=model, output=str(tmp_path), device="cpu")
    two = replace(start("cpu"), size=2)
    with pytest.raises(UserError, match=r"model\.text_drop_path: .* scope to local"):
        make_trainer(config, two)
