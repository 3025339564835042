from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pspg.engine.config import LossConfig, ModelConfig
from pspg.engine.losses import binary_cross_entropy, contrastive_loss, prompt_loss, ranking_loss
from pspg.engine.models.pspg import PsPG
from pspg.kernels.asymmetric_loss import asymmetric_loss
from pspg.kernels.spcl import ImageBatch, spcl

LABELS = torch.tensor([[1, 0, -1, 1], [0, -1, 1, 0], [1, 0, 0, 1]]).double()
MakeClip = Callable[..., Any]


def logits() -> Tensor:
    torch.manual_seed(0)
    return (2 * torch.randn(3, 2, 4)).double().requires_grad_()


@pytest.fixture
def model(make_clip: MakeClip, names: list[str]) -> PsPG:
    torch.manual_seed(1)
    return PsPG(make_clip(), ModelConfig(prompt_length=2, hidden_size=8, decoder_heads=2), names).eval()


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2)).double()


def test_presets(model: PsPG) -> None:
    """paper: ASL + SPCL, sums. published: 0.1·ASL (sum) + SPCL (mean)."""
    output = model(images())
    assert output.image_vectors is not None
    batch = ImageBatch(output.image_vectors, output.logit_scale, LABELS)
    asl, pairs = asymmetric_loss(output.logits, LABELS), spcl(model.tower, output.prompts, batch)
    paper, parts = prompt_loss(output, LABELS, model.tower, model.vocabulary, LossConfig())
    assert paper.item() == pytest.approx((asl + pairs).item(), rel=1e-12)
    assert parts["classification"].item() == asl.item()
    assert parts["pair"].item() == pairs.item()
    assert not any(part.requires_grad for part in parts.values())
    published, _ = prompt_loss(output, LABELS, model.tower, model.vocabulary, LossConfig(preset="published"))
    assert published.item() == pytest.approx((0.1 * asl + pairs / 6).item(), rel=1e-12)
    only, parts = prompt_loss(output, LABELS, model.tower, model.vocabulary, LossConfig(pair="none"))
    assert only.item() == asl.item()
    assert parts.keys() == {"classification"}


@pytest.mark.parametrize("classification", ["asl", "bce"])
@pytest.mark.parametrize("pair", ["spcl", "pcl", "ranking", "none"])
def test_every_combination_weighs_its_parts(model: PsPG, classification: Any, pair: Any) -> None:
    config = LossConfig(classification=classification, pair=pair, classification_weight=2.0, pair_weight=3.0)
    total, parts = prompt_loss(model(images()), LABELS, model.tower, model.vocabulary, config)
    expected = 2 * parts["classification"] + 3 * parts.get("pair", torch.tensor(0.0))
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert total.requires_grad


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_binary_cross_entropy(reduction: Any) -> None:
    z = logits()
    kept = LABELS >= 0
    p = z.softmax(dim=1)[:, 0]
    expected = F.binary_cross_entropy(p[kept], LABELS[kept], reduction=reduction)
    torch.testing.assert_close(binary_cross_entropy(z, LABELS, reduction), expected)
    assert torch.autograd.gradcheck(lambda x: binary_cross_entropy(x, LABELS, reduction), z)


def test_ranking_equals_torch_on_the_labels_that_are_kept() -> None:
    z = logits()
    kept = (LABELS >= 0).flatten()
    p, labels = z.softmax(dim=1)[:, 0].flatten()[kept], LABELS.flatten()[kept]
    positives = labels.nonzero().flatten()
    target = torch.full((len(labels),), -1)
    target[: len(positives)] = positives
    expected = F.multilabel_margin_loss(p, target)
    torch.testing.assert_close(ranking_loss(z, LABELS), expected)
    torch.testing.assert_close(ranking_loss(z, LABELS, "sum"), expected * len(labels))
    assert torch.autograd.gradcheck(lambda x: ranking_loss(x, LABELS), z)


@pytest.mark.parametrize("loss", [binary_cross_entropy, ranking_loss])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_one_label_value_and_saturated_logits_stay_finite(loss: Any, value: float, reduction: str) -> None:
    z = (700 * torch.sign(logits().detach())).float().requires_grad_()
    result = loss(z, torch.full((3, 4), value), reduction)
    result.backward()
    assert z.grad is not None
    assert result.isfinite()
    assert z.grad.isfinite().all()
    if value == -1:
        assert result.item() == 0


def test_contrastive_loss() -> None:
    torch.manual_seed(0)
    images, texts, scale = torch.randn(4, 5).double(), torch.randn(4, 5).double(), torch.tensor(1.3).double()
    scores = [[math.exp(scale) * F.cosine_similarity(i, t, dim=0).item() for t in texts] for i in images]
    rows = sum(math.log(sum(map(math.exp, row))) - row[b] for b, row in enumerate(scores))
    columns = sum(math.log(sum(math.exp(row[b]) for row in scores)) - scores[b][b] for b in range(4))
    assert contrastive_loss(images, texts, scale).item() == pytest.approx((rows + columns) / 8, rel=1e-12)
    tensors = [tensor.requires_grad_() for tensor in (images, texts, scale)]
    assert torch.autograd.gradcheck(contrastive_loss, tensors)


def test_the_temperature_is_capped_but_can_come_back() -> None:
    texts = torch.eye(4)
    limit = math.log(100)
    for images, comes_back in ((texts, False), (texts.flip(0), True)):
        scale = torch.tensor(limit + 1, requires_grad=True)
        at_limit = contrastive_loss(images, texts, torch.tensor(limit))
        loss = contrastive_loss(images, texts, scale)
        loss.backward()
        assert loss.item() == pytest.approx(at_limit.item(), rel=1e-5)
        assert scale.grad is not None
        assert (scale.grad.item() > 0) is comes_back
        assert scale.grad.item() >= 0


def test_contrastive_loss_is_float32_under_autocast() -> None:
    images, texts, scale = torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16(), torch.tensor(2.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(images, texts, scale)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, contrastive_loss(images.float(), texts.float(), scale))
