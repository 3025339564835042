"""Sampled SPCL: an unbiased estimate of the full loss and of its gradients, at a cost linear in C."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pspg.kernels.pairs import PairSample, PairSelection, number_of_pairs
from pspg.kernels.spcl import sample_pairs
from pspg.kernels.text_tower import PromptTemplate, TextTower
from tests.kernels.plain_spcl import loss_of

MakeTemplate = Callable[..., PromptTemplate]
DRAWS = 2500


def labels_of(classes: int, images: int = 3) -> Tensor:
    """Few positives, one uncertain label."""
    labels = torch.zeros(images, classes)
    labels[0, [0, 2]] = labels[1, [2, 4]] = labels[2, 1] = 1
    labels[2, 0] = -1
    return labels


def keys(sample: PairSample, classes: int) -> set[int]:
    return set((sample.first * classes + sample.second).tolist())


def test_holds_every_positive_pair_once_with_weight_one() -> None:
    sample = sample_pairs(labels_of(9), 5, torch.Generator().manual_seed(0))
    pairs = list(zip(sample.first.tolist(), sample.second.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert all(i < j for i, j in pairs)
    assert sample.first.tolist() == sorted(sample.first.tolist())
    weights = dict(zip(pairs, sample.weights.tolist(), strict=True))
    assert weights[0, 2] == weights[2, 4] == 1
    assert 2 + 1 <= len(pairs) <= 2 + 5


def test_weights_estimate_the_number_of_other_pairs() -> None:
    """The loss of ones: Σ of weights is C(C-1)/2 on average, and no weight is larger than four uniform ones."""
    generator, classes, count = torch.Generator().manual_seed(0), 12, 7
    totals = []
    for _ in range(DRAWS):
        sample = sample_pairs(labels_of(classes), count, generator)
        totals.append(sample.weights.sum())
    stack = torch.stack(totals).double()
    assert (stack.mean() - number_of_pairs(classes)).abs() < 4 * stack.std() / DRAWS**0.5
    single = sample_pairs(labels_of(classes), 1, generator).weights.max()
    assert single <= 4 * number_of_pairs(classes)


def dense(classes: int, share: float, images: int = 64) -> Tensor:
    """Labels of which a share is positive."""
    return (torch.rand(images, classes, generator=torch.Generator().manual_seed(classes)) < share).float()


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.3])
def test_cost_is_linear_in_the_classes_whatever_the_labels_are(share: float) -> None:
    """Both kinds are sampled: at most 2·k·C pairs, of which at 10 % and more each kind would be most of P."""
    for classes in (50, 200, 400):
        labels = dense(classes, share)
        sample = sample_pairs(labels, 4 * classes, torch.Generator().manual_seed(0), positives=4 * classes)
        assert len(sample.first) <= 8 * classes
        assert len(keys(sample, classes)) == len(sample.first)
        assert sample.weights.max() <= 4 * number_of_pairs(classes) / (4 * classes)


def test_weights_estimate_the_number_of_pairs_of_each_kind() -> None:
    generator, classes = torch.Generator().manual_seed(0), 14
    labels = dense(classes, 0.3, images=5)
    both = (labels.T @ labels).triu(1) > 0
    totals = []
    for _ in range(DRAWS):
        sample = sample_pairs(labels, 6, generator, positives=5)
        positive = both[sample.first, sample.second]
        assert int(positive.sum()) == 5
        totals.append(torch.stack([sample.weights[positive].sum(), sample.weights[~positive].sum()]))
    stack = torch.stack(totals).double()
    expected = torch.tensor([int(both.sum()), number_of_pairs(classes) - int(both.sum())])
    assert expected.min() > 20
    errors = 4 * stack.std(0) / DRAWS**0.5
    assert ((stack.mean(0) - expected).abs() <= errors + 1e-4).all()


def test_every_positive_pair_has_the_same_chance() -> None:
    labels, generator, seen = dense(8, 0.5, images=4), torch.Generator().manual_seed(0), torch.zeros(8, 8)
    both = (labels.T @ labels).triu(1) > 0
    for _ in range(DRAWS):
        sample = sample_pairs(labels, 1, generator, positives=4)
        seen[sample.first, sample.second] += 1
    chance = 4 / int(both.sum())
    error = 5 * (chance * (1 - chance) / DRAWS) ** 0.5
    assert (seen[both] / DRAWS - chance).abs().max() < error


def test_counts_find_the_same_positive_pairs() -> None:
    """Many labels a row: the pairs come from the C×C counts."""
    labels = dense(20, 0.6, images=6)
    everything = sample_pairs(labels, number_of_pairs(20))
    pairs = {(i, j) for row in labels for i in range(20) for j in range(i + 1, 20) if row[i] and row[j]}
    few = sample_pairs(labels, 1, positives=number_of_pairs(20))
    ones = few.weights == 1
    found = set(zip(few.first[ones].tolist(), few.second[ones].tolist(), strict=True))
    assert pairs <= found
    assert len(few.first) == len(pairs) + 1
    assert len(everything.first) == number_of_pairs(20)


def test_takes_all_where_there_are_no_more() -> None:
    sample = sample_pairs(labels_of(5), number_of_pairs(5) - 2)
    assert len(sample.first) == 10
    assert torch.equal(sample.weights, torch.ones(10))
    assert len(sample_pairs(torch.ones(2, 1), 4).first) == 0
    assert len(sample_pairs(torch.ones(2, 4), 1).first) == 6


def test_a_seed_repeats_it() -> None:
    one, same, other = (sample_pairs(labels_of(30), 20, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert keys(one, 30) == keys(same, 30) != keys(other, 30)


def test_cost_is_linear_in_the_classes() -> None:
    """Positive pairs do not grow with C, and draws are at most as many as asked for."""
    for classes in (100, 1000):
        assert 4 * classes / 2 < len(sample_pairs(labels_of(classes), 4 * classes).first) <= 4 * classes + 2


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="count"):
        sample_pairs(labels_of(5), 0)
    with pytest.raises(ValueError, match="positives must be at least 1"):
        sample_pairs(labels_of(5), 1, positives=0)
    with pytest.raises(ValueError, match="CPU"):
        sample_pairs(labels_of(5).to("meta"), 3)


def quantities(loss: Tensor, tensors: list[Tensor]) -> Tensor:
    """The loss and all gradients, one vector."""
    return torch.cat([part.flatten() for part in (loss.detach(), *torch.autograd.grad(loss, tensors))])


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_weights_apply_pair_by_pair(tower: TextTower, make_template: MakeTemplate, impl: str) -> None:
    """Weight 0 leaves a pair out, weight 2 counts it twice."""
    torch.manual_seed(0)
    prompts, vectors, scale = torch.randn(4, 2, 4).double(), torch.randn(3, 3).double(), torch.tensor(0.4).double()
    template, labels = make_template(4), labels_of(5)[:, :4]

    def loss(*weights: float) -> Tensor:
        sample = PairSample(*torch.triu_indices(4, 4, 1), torch.tensor(weights))
        return loss_of(
            tower,
            template,
            prompts,
            vectors,
            scale,
            labels,
            pairs=PairSelection(4, sample),
            reduction="mean",
            impl=impl,
        )

    alone = [loss(*(float(k == pair) for k in range(6))) for pair in range(6)]
    torch.testing.assert_close(loss(1, 0, 2, 0, 0, 0.5), alone[0] + 2 * alone[2] + 0.5 * alone[5])
    torch.testing.assert_close(
        loss(*[1.0] * 6), loss_of(tower, template, prompts, vectors, scale, labels, reduction="mean")
    )


@pytest.mark.slow
@pytest.mark.parametrize("positives", [None, 1])
@pytest.mark.parametrize("target", ["batch", "sample"])
def test_loss_and_gradients_are_unbiased(
    tower: TextTower, make_template: MakeTemplate, target: Any, positives: int | None
) -> None:
    """Mean of many draws against all pairs: loss and every gradient within 4 standard errors."""
    torch.manual_seed(0)
    classes = 8
    tensors = [torch.randn(shape).double().requires_grad_() for shape in ((classes, 2, 4), (3, 3), ())]
    template, labels, generator = make_template(classes), labels_of(classes), torch.Generator().manual_seed(3)
    full = quantities(loss_of(tower, template, *tensors, labels, target=target), tensors)
    draws = torch.stack(
        [
            quantities(
                loss_of(
                    tower,
                    template,
                    *tensors,
                    labels,
                    target=target,
                    pairs=PairSelection(classes, sample_pairs(labels, 6, generator, positives=positives)),
                ),
                tensors,
            )
            for _ in range(DRAWS)
        ]
    )
    errors = draws.std(dim=0) / DRAWS**0.5
    assert errors[0] > 0
    assert ((draws.mean(dim=0) - full).abs() <= 4 * errors + 1e-12).all()
