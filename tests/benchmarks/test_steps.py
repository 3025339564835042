"""Whole steps: what is measured is what was compared, and what is wrong has no numbers."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gated import GradientStep, Oracle, excess, measure, outcome_of
from benchmarks.runs import DemoEpoch, Evaluation

from benchmarks import growth, steps
from benchmarks.harness import take_turns
from benchmarks.rows import FAILED, OK, TOO_LARGE, Row
from benchmarks.steps import GraphedLoss, Phase1Step, Phase2Step, loss_of
from pspg.engine.config import ModelConfig
from pspg.engine.step_graph import WARM_UP, Outcome

CPU = torch.device("cpu")
DEMO = str(Path(__file__).parents[2] / "configs" / "demo_clip.json")
SMALL = ModelConfig(prompt_length=4, hidden_size=32)
FORMS = ("reference", "repaired", "eager")


def phase2(providers: tuple[str, ...] = FORMS) -> Phase2Step:
    return Phase2Step(rank=0, C=4, B=2, providers=providers, backbone=DEMO, model=SMALL)


def quiet(name: str) -> None:
    pass


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Iterator[None]:
    """As the suite's process does: what is imported is not searched before every repetition."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _few_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least the harness takes."""
    monkeypatch.setattr(steps, "take_turns", lambda *a, **k: take_turns(*a, **k, seconds=0.0))
    monkeypatch.setattr("benchmarks.runs.take_turns", lambda *a, **k: take_turns(*a, **k, seconds=0.0))
    monkeypatch.setattr("benchmarks.gated.take_turns", lambda *a, **k: take_turns(*a, **{**k, "seconds": 0.0}))


def has_numbers(row: Row) -> bool:
    return row.p50 is not None or row.repeats > 0 or row.peak_bytes is not None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_keys_are_unique_and_jobs_pickle(device: str) -> None:
    jobs = [*steps.jobs(device), *growth.jobs(device)]
    assert len({job.key for job in jobs}) == len(jobs)
    assert pickle.loads(pickle.dumps(jobs)) == jobs
    assert {job.key.split("/")[0] for job in jobs} == {"steps", "growth"}


def test_phase2_forms_agree_and_are_measured() -> None:
    heard: list[str] = []
    rows = phase2().run(CPU, {}, heard.append)
    assert [row.provider for row in rows] == list(FORMS)
    assert heard[:3] == list(FORMS)
    for row in rows:
        assert row.status == OK
        assert row.p50 is not None
        assert 0 < row.p20 <= row.p50 <= row.p80  # type: ignore[operator]
        assert row.flops == rows[0].flops
    assert rows[0].error is None
    assert "not compared" in rows[0].detail
    assert all(0 < row.error < 0.1 for row in rows[1:])  # type: ignore[operator]


def test_a_broken_provider_has_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    repaired = steps.repaired_loss
    monkeypatch.setattr(steps, "repaired_loss", lambda setup: 1.001 * repaired(setup))
    _, broken, eager = phase2().run(CPU, {}, quiet)
    assert broken.status == FAILED
    assert not has_numbers(broken)
    assert broken.error is not None
    assert broken.error > 1
    assert "against reference (fp32)" in broken.detail
    assert eager.status == OK


def test_a_provider_that_raises_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(setup: object) -> None:
        raise RuntimeError("an illegal memory access was encountered\nmore")

    monkeypatch.setattr(steps, "repaired_loss", fail)
    _, broken, eager = phase2().run(CPU, {}, quiet)
    assert broken.status == FAILED
    assert not has_numbers(broken)
    assert broken.detail == "RuntimeError: an illegal memory access was encountered"
    assert eager.status == OK


def test_what_does_not_fit_says_so_and_is_not_compared_with() -> None:
    rows = phase2().run(CPU, {"reference": "killed"}, quiet)
    assert (rows[0].status, rows[0].detail) == (TOO_LARGE, "killed")
    assert not has_numbers(rows[0])
    assert "eager (fp32)" in rows[1].detail
    for job in (Phase1Step(rank=0, B=1, backbone=DEMO), Evaluation(rank=0, C=2, B=1, providers=("eager",))):
        (row,) = job.run(CPU, {"eager": "killed"}, quiet)
        assert (row.status, has_numbers(row)) == (TOO_LARGE, False)


def test_low_precision_is_compared_with_float32() -> None:
    """As on a GPU: the provider's own outcome is no oracle, the same weights in float32 are."""
    job, dtype = phase2(("eager",)), torch.bfloat16
    (row,) = measure(
        Row(job=job.key, suite="steps", operator="phase2_step", provider=""),
        {"eager": lambda: job.provider("eager", CPU, dtype)},
        lambda found: job.oracles(CPU, dtype, found),
        CPU,
        {},
        quiet,
        dtype=dtype,
    )
    assert row.status == OK
    assert row.detail == "against eager (fp32)"
    assert 1e-3 < row.error < 1  # type: ignore[operator]


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
    job = phase2()
    setup = job.setup("eager", CPU, torch.float32)
    graph = GraphedLoss(setup, "eager", torch.float32, recorder)
    step = GradientStep(graph, setup.head, CPU, warm_up=WARM_UP + 1, detail=graph.detail)
    step(0)
    assert step.detail.startswith(said)
    assert step.outcome is not None
    plain = job.setup("eager", CPU, torch.float32)
    loss = loss_of(plain, "eager", torch.float32)
    loss.backward()
    assert excess(step.outcome, outcome_of(loss, plain.head), torch.float32)[0] < 0.01


def test_the_gate_sees_small_parts_and_what_is_missing() -> None:
    large, small = torch.ones(1000), torch.full((3,), 1e-3)
    right = {"gradients": {"large": large, "small": small}}
    assert excess(right, right, torch.float32)[0] == 0
    assert excess({"gradients": {"large": large, "small": 1.01 * small}}, right, torch.float32)[1] == "gradients small"
    assert excess({"gradients": {"large": large}}, right, torch.float32)[0] == float("inf")
    nan = {"gradients": {"large": large * float("nan"), "small": small}}
    assert excess(nan, right, torch.float32)[0] == float("inf")
    allowed = torch.finfo(torch.float32).eps ** 0.5
    wrong = {"gradients": {"large": (1 + 2 * allowed) * large, "small": small}}
    assert excess(wrong, right, torch.float32)[0] == pytest.approx(2, rel=0.01)


def test_nothing_to_compare_with_is_a_failure() -> None:
    weight = torch.nn.Linear(1, 1)
    (row,) = measure(
        Row(job="a/b", suite="a", operator="b", provider=""),
        {"eager": lambda: GradientStep(lambda: weight.weight.sum(), weight, CPU)},
        lambda found: dict[str, Oracle](),
        CPU,
        {},
        quiet,
        dtype=torch.float32,
    )
    assert (row.status, has_numbers(row)) == (FAILED, False)


def test_phase1_step_is_measured() -> None:
    (row,) = Phase1Step(rank=0, B=2, backbone=DEMO).run(CPU, {}, quiet)
    assert row.status == OK
    assert row.p50 is not None
    assert row.flops is not None
    assert row.flops > 1e8


def test_evaluation_is_measured_and_compared() -> None:
    job = Evaluation(rank=0, C=3, B=2, providers=("eager",), backbone=DEMO, model=SMALL)
    (row,) = job.run(CPU, {}, quiet)
    assert (row.status, row.direction) == (OK, "forward")
    assert row.p50 is not None
    assert row.error is not None
    assert "3.1 GiB" in row.detail


@pytest.mark.slow
def test_demo_epoch_trains() -> None:
    job = DemoEpoch(rank=0, train=128, val=24)
    (row,) = job.run(CPU, {}, quiet)
    assert row.status == OK
    assert (row.C, row.B, row.n) == (35, 128, 8)
    assert "128 phantoms" in row.detail
