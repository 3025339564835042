"""Configurations by architecture, and launches that are recorded instead of made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

launch = pytest.importorskip("pspg.kernels.launch")
META = torch.device("meta")


@pytest.mark.parametrize(("architecture", "block"), [(75, 1), (80, 1), (86, 1), (89, 1), (90, 2), (120, 2)])
def test_an_architecture_takes_the_newest_configuration_that_is_not_above_it(
    architecture: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "CONFIGS", {})
    launch.pin("kernel", sm_90={"BLOCK": 2}, sm_80={"BLOCK": 1})
    with launch.record(architecture):
        assert launch.configuration("kernel", META) == {"BLOCK": block}


def test_a_configuration_is_replaced_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CONFIGS", {})
    for name in ("one", "other"):
        launch.pin(name, sm_80={"BLOCK": 1, "num_warps": 4})
    with launch.record(90):
        with launch.replaced(one={"BLOCK": 2}) as asked:
            assert launch.configuration("one", META) == {"BLOCK": 2, "num_warps": 4}
            with launch.replaced() as inner:
                assert launch.configuration("other", META) == {"BLOCK": 1, "num_warps": 4}
            assert (asked, inner) == ({"one"}, {"other"})
        assert launch.configuration("one", META) == {"BLOCK": 1, "num_warps": 4}
        with launch.replaced(one={"BLOK": 2}), pytest.raises(ValueError, match="one has no BLOK; it has BLOCK"):
            launch.configuration("one", META)


def test_records_what_would_be_launched() -> None:
    from pspg.kernels.asymmetric_loss import triton as fused

    logits, labels = torch.empty(64, 2, 108, device=META), torch.empty(64, 108, device=META)
    with launch.record(90) as launches:
        fused.run(logits, labels, 1.0, 2.0, 0.05, 1e-6)
    (one,) = launches
    assert one.grid == (14,)
    assert one.arguments["logits"] is logits
    assert (one.arguments["count"], one.arguments["BLOCK"]) == (64 * 108, 512)
    assert one.options == {"num_warps": 4}


def test_a_grid_without_programs_launches_nothing() -> None:
    with launch.record(80) as launches:
        launch.launch(None, (3, 0))
    assert launches == []


def test_overlapped_kernels_are_set_up_while_the_one_before_ends() -> None:
    from pspg.kernels.text_tower.triton import add_norm

    x = torch.empty(3, 16, device=META)

    def recorded(architecture: int) -> list[object]:
        with launch.record(architecture) as launches, launch.overlapped():
            add_norm.run_add_norm(x, x, x[0], x[0], 1e-5)
        (one,) = launches
        return [one.arguments["OVERLAP"], one.options.get("launch_pdl")]

    assert recorded(90) == [True, True]
    assert recorded(80) == [False, None]
    with launch.record(90) as launches:
        add_norm.run_add_norm(x, x, x[0], x[0], 1e-5)
    assert not launches[0].arguments["OVERLAP"]


# In place of a @triton.jit function: launches of it are recorded, never made.
KERNEL = SimpleNamespace(__name__="kernel", arg_names=["x", "x_batch", "y"])


def test_a_stack_of_matrices_is_a_pointer_and_a_distance() -> None:
    x, y = torch.empty(2, 5, 3, 4, device=META), torch.empty(2, device=META)
    with launch.record(80) as launches:
        launch.launch(KERNEL, (1,), launch.Batched(x[:, 1]), y)
        launch.launch(KERNEL, (1,), launch.Batched(None), y)
    assert [one.arguments["x_batch"] for one in launches] == [5 * 3 * 4, 0]
    assert launches[0].arguments["x"].storage_offset() == 3 * 4
    assert launches[1].arguments["x"] is None
    assert all(one.arguments["y"] is y for one in launches)


@pytest.mark.parametrize("wrong", ["a column of gaps", "too few dimensions"])
def test_a_stack_that_is_laid_out_otherwise_is_named(wrong: str) -> None:
    x = torch.empty(2, 3, 8, device=META)[..., ::2] if wrong == "a column of gaps" else torch.empty(3, 4, device=META)
    with launch.record(80), pytest.raises(ValueError, match=r"^kernel: x needs \(A,R,K\) .* got shape"):
        launch.launch(KERNEL, (1,), launch.Batched(x), torch.empty(2, device=META))


def test_a_tensor_that_is_not_contiguous_is_named() -> None:
    wrong = torch.empty(4, 2, device=META).T
    with launch.record(80), pytest.raises(ValueError, match=r"^kernel: y must be contiguous, got shape \(2, 4\)"):
        launch.launch(KERNEL, (1,), launch.Batched(None), wrong)


def test_multiprocessors() -> None:
    assert launch.multiprocessors(torch.device("cpu")) == 1
    with launch.record(90):
        assert launch.multiprocessors(META) == 132


def test_a_tensor_descriptor_must_describe_a_contiguous_tensor() -> None:
    # As triton.tools.tensor_descriptor.TensorDescriptor, which may not be installed.
    good = SimpleNamespace(base=torch.empty(4, 8, device=META))
    with launch.record(80) as launches:
        launch.launch(KERNEL, (1,), good)
        with pytest.raises(ValueError, match=r"kernel: x must be contiguous, got shape \(4, 4\)"):
            launch.launch(KERNEL, (1,), SimpleNamespace(base=good.base[:, ::2]))
    assert launches[0].arguments["x"] is good
    assert launch.tensor_of(good) is good.base
    assert launch.tensor_of(3) is None


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor | None


def test_tensors_of_a_named_tuple_are_checked_and_named() -> None:
    good = Pair(torch.empty(2, 3, device=META), None)
    assert list(launch.tensors_of("pair", good)) == ["pair.x"]
    with launch.record(80) as launches, pytest.raises(ValueError, match=r"^kernel: y.x must be contiguous"):
        launch.launch(KERNEL, (1,), good, 0, Pair(good.x.T, good.x))
    assert launches == []
