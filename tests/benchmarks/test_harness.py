"""Implementations take turns; what is slow, missing, broken or too large is told apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import harness, machine
from benchmarks.harness import Measured, Unavailable, Verdict, bounded_memory, take_turns
from benchmarks.machine import memory_limit
from benchmarks.rows import FAILED, TOO_LARGE, UNAVAILABLE

from .conftest import row

CPU = torch.device("cpu")


def test_turns_are_taken_and_slow_calls_repeated_three_times() -> None:
    order: list[str] = []

    def provider(name: str, seconds: float, error: Exception | None = None) -> Callable[[], Callable[[int], dict]]:
        def call(turn: int) -> dict[str, float]:
            order.append(name)
            if error is not None:
                raise error
            return {"both": seconds}

        return lambda: call

    def missing() -> Callable[[int], dict[str, float]]:
        raise Unavailable("no compiler")

    found = take_turns(
        {
            "slow": provider("slow", 11.0),
            "slower": provider("slower", 31.0),
            "fast": provider("fast", 0.1),
            "large": provider("large", 0.1, RuntimeError("[enforce fail] not enough memory: you tried to allocate")),
            "wrong": provider("wrong", 0.1, RuntimeError("a bug")),
            "missing": missing,
        },
        CPU,
        1.0,
    )
    assert found["slow"].times == {"both": [11.0] * 3}
    assert found["slower"].times == {"both": [31.0] * 2}
    assert found["fast"].times == {"both": [0.1] * 10}
    assert order[:10] == ["slow", "slower", "fast", "large", "wrong", "slow", "slower", "fast", "slow", "fast"]
    assert [found[name].status for name in ("large", "wrong", "missing")] == [TOO_LARGE, FAILED, UNAVAILABLE]
    assert (found["wrong"].detail, found["missing"].detail) == ("RuntimeError: a bug", "no compiler")


def test_memory_that_is_not_there_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of this implementation, where Linux would hand it out and kill the process that uses it."""
    size = 2**30
    held = machine._resident("VmData")
    assert memory_limit() > held
    monkeypatch.setattr(harness, "memory_limit", lambda: held + size // 2)

    def greedy() -> Callable[[int], dict[str, float]]:
        return lambda turn: {"both": torch.empty(size, dtype=torch.uint8).numel() / size}

    with bounded_memory():
        assert take_turns({"greedy": greedy}, CPU)["greedy"].status == TOO_LARGE
    assert take_turns({"greedy": greedy}, CPU, 0.0)["greedy"].status is None


def test_numbers_only_behind_the_gate_and_their_share_of_the_roofline() -> None:
    measured = Measured({"both": [4.0, 4.0]}, peak_bytes=3)
    peaks = {"fp32": 100.0, "bandwidth": 10.0}
    right = measured.row(row(flops=100, bytes=20), Verdict(0.5), peaks)
    assert (right.p50, right.peak_bytes, right.roofline) == (4.0, 3, 0.5)  # 2 s for the bytes, 1 s for the products
    assert measured.row(row(flops=300, bytes=20), Verdict(0.5), peaks).roofline == 0.75
    for verdict in (Verdict(1.5, "loss"), Verdict(float("nan")), None):
        wrong = measured.row(row(flops=100, bytes=20), verdict, peaks)
        assert wrong.status == FAILED
        assert wrong.p20 is wrong.p50 is wrong.p80 is wrong.peak_bytes is wrong.roofline is None
