"""Growth curves: exponents of known laws, and points that are compared before they are drawn."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from benchmarks.growth import VARIED, Case, Growth, exponent, fits, main

from benchmarks.harness import take_turns
from benchmarks.rows import FAILED, OK, TOO_LARGE, Row, without_numbers

CPU = torch.device("cpu")


def small(variable: str, values: tuple[int, ...]) -> Growth:
    return Growth(
        rank=0,
        operator="narrow_text_side",
        variable=variable,
        values=values,
        base=Case(3, 2, 2),
        providers=("eager", "sampled"),
    )


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Iterator[None]:
    """As the suite's process does: what is imported is not searched before every repetition."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _few_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gated.take_turns", lambda *a, **k: take_turns(*a, **{**k, "seconds": 0.0}))


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0, 2.5])
def test_exponent_of_exact_laws(power: float) -> None:
    xs = VARIED["C"]
    assert exponent(xs, [3e-4 * x**power for x in xs]) == pytest.approx(power, abs=1e-9)


def row(C: int, p50: float, provider: str = "eager") -> Row:
    job = "growth/text_side/C"
    return Row(job=job, suite="growth", operator="text_side", provider=provider, C=C, p50=p50, repeats=5)


def test_fits_look_at_the_upper_part_of_what_ran() -> None:
    """Constant up to 16, then quadratic; the largest point failed."""
    curve = [row(C, 1e-3 * max(C, 16) ** 2) for C in (2, 4, 8, 16, 32, 64, 128)]
    failed = without_numbers(row(500, 1.0), FAILED, "wrong")
    few = [row(C, C, "sampled") for C in (2, 128)]
    (fit,) = fits([*curve, failed, *few])
    assert (fit.operator, fit.provider, fit.variable, fit.range) == ("text_side", "eager", "C", (16, 128))
    assert fit.exponent == pytest.approx(2)


def test_every_point_is_compared() -> None:
    rows = small("C", (2, 4)).run(CPU, {}, lambda name: None)
    assert [(r.C, r.provider, r.status) for r in rows] == [
        (C, provider, OK) for C in (2, 4) for provider in ("eager", "sampled")
    ]
    for r in rows:
        assert r.error is not None
        assert r.error < 0.1
        assert r.detail.startswith("against reference (fp32)")
        assert "W=64" in r.detail


def test_the_estimate_is_compared_on_its_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """One other pair a class of many: the sample is not all pairs, and agrees all the same."""
    monkeypatch.setattr("benchmarks.growth.SAMPLES", 1)
    job = small("C", (12,))
    eager, sampled = (job.provider(name, Case(12, 2, 2), CPU, torch.float32) for name in job.providers)
    eager(0)
    sampled(0)
    assert eager.outcome is not None
    assert sampled.outcome is not None
    assert eager.outcome["loss"]["loss"] != sampled.outcome["loss"]["loss"]
    rows = job.run(CPU, {}, lambda name: None)
    assert [r.status for r in rows] == [OK, OK]


def test_a_provider_is_left_out_at_one_point_only() -> None:
    heard: list[str] = []
    rows = small("B", (1, 2)).run(CPU, {"eager C3-B2-n2": "killed"}, heard.append)
    assert [(r.B, r.provider) for r in rows if r.status == TOO_LARGE] == [(2, "eager")]
    assert rows[2].p50 is None
    assert "eager C3-B1-n2" in heard
    assert "eager C3-B2-n2" not in heard


def test_prints_fits_or_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    for classes, status, said in (((8, 16), 2, "no curve"), ((2, 8, 16, 32), 0, "C^2.00 for 8 ≤ C ≤ 32")):
        file.write_text(json.dumps([asdict(row(C, C**2.0)) for C in classes]))
        assert main([str(tmp_path)]) == status
        out, error = capsys.readouterr()
        assert said in out + error
        assert (out + error).count("\n") == 1
