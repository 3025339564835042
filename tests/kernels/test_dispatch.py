from __future__ import annotations

import pytest
import torch

from pspg.kernels.dispatch import check_shapes, resolve


def test_auto_takes_the_first_and_an_explicit_choice_never_falls_back() -> None:
    available = {"fast": len, "reference": max}
    assert resolve("auto", available) is len
    assert resolve("reference", available) is max
    with pytest.raises(ValueError, match="triton"):
        resolve("triton", available)


def test_shapes_agree_across_inputs() -> None:
    a, b = torch.zeros(3, 2, 5), torch.zeros(3, 5)
    assert check_shapes("op", a=(a, "B 2 C"), b=(b, "B C")) == {"B": 3, "C": 5}
    for tensor in (torch.zeros(3, 4), torch.zeros(4, 5), torch.zeros(3)):
        with pytest.raises(ValueError, match="op: b must be"):
            check_shapes("op", a=(a, "B 2 C"), b=(tensor, "B C"))
    with pytest.raises(ValueError, match="op: a must be"):
        check_shapes("op", a=(torch.zeros(3, 1, 5), "B 2 C"))
