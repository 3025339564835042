"""Sampled SPCL: a weighted sample of the positive pairs and one of the others, for many classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pairs import PairSample, number_of_pairs, pair_indices, pin


def sample_pairs(
    labels: Tensor, count: int, generator: torch.Generator | None = None, *, positives: int | None = None
) -> PairSample:
    """Pairs from which the sum over all P pairs is estimated without bias, loss and gradient alike.

    Of the N pairs that some image carries whole at most `positives` are taken, every choice of them equally likely,
    each with weight N/positives, the smallest that the largest weight can be; all, with weight 1, where there are no
    more, or where `positives` is None. Of the others, `count` are drawn with replacement:
    both classes independently, class c with probability a_c, half of it uniform and half by how many images carry c
    (pairs of frequent classes are the hard negatives). Pair (i,j) is drawn with probability p = 2·a_i·a_j / Z, where Z
    leaves out equal classes and the pairs taken already, and weighs 1/(count·p) a draw.

    Args:
        labels: (B,C) in {1, 0, -1}, on the CPU, so that nothing waits for a device; -1 counts as 0.
        count: other pairs to draw; if that many do not exist, all are taken, with weight 1.
        generator: of the CPU; None: torch's default one.
        positives: positive pairs to take at most; None: all. In a batch of B images with a share s of positive labels
            a pair is positive with a chance near 1 − (1 − s²)^B, so that most of P can be.

    Raises:
        ValueError: labels on another device, or a count or a number of positives below 1.
    """
    if labels.device.type != "cpu":
        raise ValueError(f"sample_pairs: labels must be on the CPU, they are on {labels.device}")
    for name, value in (("count", count), ("positives", positives)):
        if value is not None and value < 1:
            raise ValueError(f"sample_pairs: {name} must be at least 1, got {value}")
    classes = labels.shape[1]
    positive = _positive_pairs(labels == 1)
    taken, weight = positive, 1.0
    if positives is not None and len(positive) > positives:
        taken = positive[torch.randperm(len(positive), generator=generator)[:positives]]
        weight = len(positive) / positives
    keys, weights = _others(labels == 1, positive, count, generator)
    keys, weights = torch.cat([taken, keys]), torch.cat([weights.new_full((len(taken),), weight), weights])
    order = keys.argsort()
    keys = keys[order]
    return PairSample(pin(keys // classes), pin(keys % classes), pin(weights[order].float()))


def _others(labels: Tensor, positive: Tensor, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Keys and weights of pairs that are not among the positive keys; labels (B,C) bool."""
    classes = labels.shape[1]
    if number_of_pairs(classes) - len(positive) <= count:
        first, second = pair_indices(classes)
        keys = first * classes + second
        keys = keys[~torch.isin(keys, positive)]
        return keys, torch.ones(len(keys), dtype=torch.float64)
    a = _class_probabilities(labels)
    i, j = positive // classes, positive % classes
    z = 1 - (a**2).sum() - (2 * a[i] * a[j]).sum()
    drawn = positive.new_empty(0)
    while len(drawn) < count:
        tries = int(1.1 * (count - len(drawn)) / float(z)) + 16
        i, j = torch.multinomial(a, 2 * tries, replacement=True, generator=generator).view(2, -1)
        keys = torch.minimum(i, j) * classes + torch.maximum(i, j)
        drawn = torch.cat([drawn, keys[(i != j) & ~torch.isin(keys, positive)]])
    # A pair that was drawn more than once is encoded once.
    keys, times = drawn[:count].unique(return_counts=True)
    return keys, times * z / (count * 2 * a[keys // classes] * a[keys % classes])


def _positive_pairs(positive: Tensor) -> Tensor:
    """Keys i·C + j, ascending, of the pairs i < j that a row of `positive` (B,C) holds whole.

    Row by row, linear in C, where rows hold few; else from the C×C counts.
    """
    classes = positive.shape[1]
    if int(positive.sum(1).square().sum()) > classes**2:
        counts = positive.float().T @ positive.float()
        i, j = counts.triu(1).nonzero(as_tuple=True)
        return i * classes + j
    pairs = [torch.combinations(row.nonzero()[:, 0]) for row in positive]
    return torch.cat([pair[:, 0] * classes + pair[:, 1] for pair in pairs]).unique()


def _class_probabilities(positive: Tensor) -> Tensor:
    """a (C,), float64: the uniform half bounds the weights by four times those of a uniform draw of all P pairs."""
    images = positive.sum(0).double()
    uniform = torch.full_like(images, 1 / len(images))
    return (uniform + images / images.sum()) / 2 if images.any() else uniform
