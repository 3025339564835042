"""Whole steps and loaders: what is measured is what was compared, and what is wrong has no numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench, loaders, steps
from benchmarks.gate import excess
from benchmarks.harness import Sizes, measure
from benchmarks.rows import FAILED, OK, Row
from benchmarks.steps import GradientStep, GraphedLoss, Phase2
from pspg.engine.config import ModelConfig
from pspg.engine.models.clip import clip_config
from pspg.engine.training.cuda_graph import WARM_UP, Outcome

CPU = torch.device("cpu")
DEMO = str(Path(__file__).parents[2] / "configs" / "demo_clip.json")
FORMS = ("reference", "repaired", "eager")
NARROW = {"W": 64, "layers": 2, "heads": 2, "D": 128, "H": 64}
LOADING = {"B": 4, "batches": 3, "files": 4, "size": 64, "image_size": 32, "workers": 0}


def phase2(dtype: torch.dtype = torch.float32, **options: Any) -> Phase2:
    return Phase2(Sizes(C=4, B=2, n=4), dtype, CPU, clip_config(DEMO), ModelConfig(hidden_size=32), **options)


def run(case: Phase2, impls: tuple[str, ...] = FORMS, dtype: str = "fp32") -> list[Row]:
    row = Row(job="steps/a/b", operator="a", impl="", sizes={"C": 4}, dtype=dtype)
    return measure(row, case, impls, ("both",), peaks={}, seconds=0.0)


def test_implementations_of_a_step_agree_and_are_measured() -> None:
    rows = run(phase2())
    assert [(row.impl, row.status) for row in rows] == [(impl, OK) for impl in FORMS]
    assert all(row.p50 and row.flops for row in rows)
    assert all(0 < (row.error or 0) < 0.1 for row in rows)
    assert ["against eager, float64", *["against reference, float32"] * 2] == [row.detail for row in rows]


def test_a_step_alone_is_compared_too() -> None:
    """With the literal equations where they are cheap, else with itself in float64; bf16 with float32."""
    (row,) = run(phase2(), ("eager",))
    assert "against reference, float32" in row.detail
    (row,) = run(phase2(literal=0), ("eager",))
    assert "against eager, float64" in row.detail
    assert 0 < (row.error or 0) < 1
    (row,) = run(phase2(torch.bfloat16, literal=0), ("eager",), "bf16")
    assert "against eager, float32" in row.detail
    assert 1e-3 < (row.error or 0) < 1


def test_a_broken_step_has_no_numbers_and_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    right = steps.loss_of

    def wrong(setup: Any, impl: str, *arguments: Any, **options: Any) -> Any:
        return right(setup, impl, *arguments, **options) * (1.001 if impl == "repaired" else 1)

    def fail(setup: Any, impl: str, *arguments: Any, **options: Any) -> Any:
        if impl == "repaired":
            raise RuntimeError("an illegal memory access was encountered\nmore")
        return right(setup, impl, *arguments, **options)

    for function, said in ((wrong, "against reference"), (fail, "RuntimeError: an illegal memory access")):
        monkeypatch.setattr(steps, "loss_of", function)
        _, broken, eager = run(phase2())
        assert (broken.status, broken.p50, broken.peak_bytes, eager.status) == (FAILED, None, None, OK)
        assert said in broken.detail


def record(function: Callable[[], Outcome]) -> tuple[Callable[[], None], Outcome]:
    """What a CUDA graph does, by running the function again."""
    loss, _, gradients = function()

    def replay() -> None:
        again, _, others = function()
        loss.copy_(again)
        for old, new in zip(gradients, others, strict=True):
            if old is not None and new is not None:
                old.copy_(new)

    return replay, (loss, {}, gradients)


def refuse(function: Callable[[], Outcome]) -> tuple[Callable[[], None], Outcome]:
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(("recorder", "said"), [(record, "CUDA graph"), (refuse, "no graph: operation not permitted")])
def test_a_recorded_step_is_the_ordinary_one(recorder: Any, said: str) -> None:
    case = phase2()
    setup = case.setup("eager", torch.float32, CPU)
    graph = GraphedLoss(setup, "eager", torch.float32, recorder)
    step = GradientStep(graph, setup.head, CPU, warm_up=WARM_UP + 1)
    step(0)
    assert graph.detail.startswith(said)
    assert excess(step.outcome, case.make("eager", torch.float32, CPU).first(), torch.float32)[0] < 0.01


def test_growth_of_the_text_side_and_the_estimate_on_its_sample(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One other pair a class of many: the sample is not all pairs, and agrees all the same."""
    monkeypatch.setattr(steps, "SAMPLES", 1)
    rows = bench("text_side", impl=("eager", "sampled"), device="cpu", C=(2, 12), B=2, n=2, **NARROW)
    assert [(row.sizes["C"], row.impl, row.status) for row in rows] == [
        (C, impl, OK) for C in (2, 12) for impl in ("eager", "sampled")
    ]
    case = steps.entries()["text_side"].make(Sizes(C=12, B=2, n=2, **NARROW), "fp32", CPU)
    assert isinstance(case, Phase2)
    losses = [float(case.outcome("eager", torch.float32, sampled)["loss"]["loss"]) for sampled in (False, True)]
    assert losses[0] != losses[1]


def test_loaders_are_measured_behind_pillows_pixels(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = bench("load_png", impl="torch", device="cpu", **LOADING)
    assert (row.status, row.error) == (OK, 0)
    assert row.p50
    monkeypatch.setattr(loaders, "grey_levels", lambda dataset, batch: 9.0)
    (row,) = bench("load_cache", impl="torch", device="cpu", **LOADING)
    assert (row.status, row.p50) == (FAILED, None)


def test_the_distance_of_pixels_sees_a_flip(tmp_path: Path) -> None:
    dataset = loaders._dataset("jpeg", Sizes(LOADING), tmp_path)
    batch = next(iter(loaders.make_train_loader(dataset, batch_size=2).batches(0)))
    assert loaders.grey_levels(dataset, batch) == 0
    batch.pixels = batch.pixels.flip(-1)
    assert loaders.grey_levels(dataset, batch) > loaders.GREY
