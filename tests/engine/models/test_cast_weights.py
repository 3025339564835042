"""Weights cast together: autocast's own bits, by one launch forward and one backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pspg.engine.models import cast_weights
from pspg.engine.models.cast_weights import CastWeights
from pspg.engine.models.texts import pack_tokens
from pspg.engine.training.losses import contrastive_loss
from pspg.engine.training.tasks import ContrastiveModel


class Copies(TorchDispatchMode):
    """Counts copies of parameters, one by one (`_to_copy`) or together (`_foreach_copy_`)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.known = {parameter.data_ptr() for parameter in module.parameters()}
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name == "_foreach_copy_" or (name == "_to_copy" and args[0].data_ptr() in self.known):
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("by_module", [False, True])
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("vit", [False, True])
def test_a_step_has_the_bits_of_autocast(
    make_clip: Callable[..., Any], vit: bool, enabled: bool, by_module: bool
) -> None:
    torch.manual_seed(0)
    given = ContrastiveModel(make_clip(vit).float()).train()
    images, tokens = torch.randn(3, 3, 32, 32), torch.zeros(3, 77, dtype=torch.int64)
    for row, length in zip(tokens, (4, 9, 6), strict=True):
        row[:length] = torch.randint(1, 49000, (length,))
        row[length - 1] = 49407
    texts = (tokens,) if by_module else tuple(pack_tokens(tokens))

    def step() -> tuple[dict[str, Tensor | None], Counter[str]]:
        module = deepcopy(given)
        with Copies(module) as copies:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                features, encoded, scale = module(images, *texts)
            contrastive_loss(features, encoded, scale).backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        return {"features": features.detach(), "encoded": encoded.detach(), **gradients}, copies.seen

    found, together = step()
    with patch.object(CastWeights, "of", lambda self, parameter: parameter):
        expected, _ = step()
    assert [name for name, tensor in expected.items() if not same(tensor, found[name])] == []
    if not enabled:
        assert not together
    elif not vit:
        assert together["_foreach_copy_"] == 2
        # Positions of the pool.
        assert by_module or together["_to_copy"] <= 1


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def test_gradients_reach_those_that_were_read() -> None:
    weights = [nn.Parameter(torch.randn(2, 3)) for _ in range(3)]
    weights[1].requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        cast = CastWeights(weights, torch.zeros(1))
    assert [cast.of(weight).dtype for weight in weights] == 3 * [torch.bfloat16]
    other = nn.Parameter(torch.zeros(1))
    assert cast.of(other) is other
    (2 * cast.of(weights[0]) + cast.of(weights[1])).sum().backward()
    assert weights[0].grad is not None
    assert weights[0].grad.dtype == torch.float32
    assert (weights[0].grad == 2).all()
    assert weights[1].grad is None
    assert weights[2].grad is None


def test_without_autocast_nothing_is_cast() -> None:
    weight = nn.Parameter(torch.zeros(2))
    with patch.object(cast_weights, "cast_all", side_effect=AssertionError):
        assert CastWeights([weight], torch.zeros(1)).of(weight) is weight
        with torch.autocast("cpu", torch.bfloat16):
            double = nn.Parameter(torch.zeros(2, dtype=torch.float64))
            assert CastWeights([double], torch.zeros(1)).of(double) is double
