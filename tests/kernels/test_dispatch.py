from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pspg.kernels.dispatch import check_shapes, resolve, with_triton
from pspg.kernels.launch import Launch, launch, record


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


def test_kernels_can_be_recorded_on_any_device() -> None:
    available, tensor = {"eager": max}, torch.empty(1, device="meta")
    seen: list[Launch] = []
    assert list(with_triton(available, min, tensor)) == ["eager"]
    with record(90, seen.append) as launches:
        assert list(with_triton(available, min, tensor)) == ["triton", "eager"]
        launch(SimpleNamespace(arg_names=["x"]), (1,), tensor)
    assert len(seen) == 1
    assert not launches
