"""Sampled SPCL: all positive pairs and an importance-weighted sample of the others, for many classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pairs import PairSample, number_of_pairs, pair_indices, pin


def sample_pairs(labels: Tensor, count: int, generator: torch.Generator | None = None) -> PairSample:
    """Pairs from which the sum over all P pairs is estimated without bias, loss and gradient alike.

    Every pair that some image carries whole is taken, with weight 1. Of the others, `count` are drawn with replacement:
    both classes independently, class c with probability a_c, half of it uniform and half by how many images carry c
    (pairs of frequent classes are the hard negatives). Pair (i,j) is drawn with probability p = 2·a_i·a_j / Z, where Z
    leaves out equal classes and the pairs taken already, and weighs 1/(count·p) a draw.

    Args:
        labels: (B,C) in {1, 0, -1}, on the CPU, so that nothing waits for a device; -1 counts as 0.
        count: pairs to draw; if that many others do not exist, all are taken and the sum is exact.
        generator: of the CPU; None: torch's default one.

    Raises:
        ValueError: labels on another device, or a count below 1.
    """
    if labels.device.type != "cpu":
        raise ValueError(f"sample_pairs: labels must be on the CPU, they are on {labels.device}")
    if count < 1:
        raise ValueError(f"sample_pairs: count must be at least 1, got {count}")
    classes = labels.shape[1]
    positive = _positive_pairs(labels == 1)
    others = number_of_pairs(classes) - len(positive)
    if others <= count:
        first, second = pair_indices(classes)
        return PairSample(pin(first), pin(second), pin(torch.ones(len(first))))
    a = _class_probabilities(labels == 1)
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
    weights = times * z / (count * 2 * a[keys // classes] * a[keys % classes])
    keys, weights = torch.cat([positive, keys]), torch.cat([weights.new_ones(len(positive)), weights])
    order = keys.argsort()
    keys = keys[order]
    return PairSample(pin(keys // classes), pin(keys % classes), pin(weights[order].float()))


def _positive_pairs(positive: Tensor) -> Tensor:
    """Keys i·C + j, ascending, of the pairs i < j that a row of `positive` (B,C) holds whole; linear in C."""
    classes = positive.shape[1]
    pairs = [torch.combinations(row.nonzero()[:, 0]) for row in positive]
    return torch.cat([pair[:, 0] * classes + pair[:, 1] for pair in pairs]).unique()


def _class_probabilities(positive: Tensor) -> Tensor:
    """a (C,), float64: the uniform half bounds the weights by four times those of a uniform draw of all P pairs."""
    images = positive.sum(0).double()
    uniform = torch.full_like(images, 1 / len(images))
    return (uniform + images / images.sum()) / 2 if images.any() else uniform
