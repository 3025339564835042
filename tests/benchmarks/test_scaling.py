"""Scaling: what is counted equals the formula, and the model says that it is one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks.plots import draw_scaling
from benchmarks.ranks import Settings, measure
from benchmarks.scaling import COUNTS, _model
from benchmarks.traffic import ALL_GATHER, ALL_REDUCE, Network


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "scope", "ranks"), [(0, "local", 2), (0, "global", 2), (2, "global", 3)])
def test_counted_traffic_is_the_formula(stage: int, scope: str, ranks: int) -> None:
    found = measure(ranks, 6, Settings(classes=5, device="cpu", zero_stage=stage, scope=scope, repeat=1))
    assert found["payload"] == found["formula"]
    assert found["parameters"] > 50_000


def test_rings_take_rounds_of_latency_and_pieces() -> None:
    network = Network(latency=1.0, node_bandwidth=10.0, network_bandwidth=5.0, gpus_per_node=4)
    assert network.seconds({ALL_REDUCE: 80}, 1) == 0
    assert network.seconds({ALL_REDUCE: 80}, 4) == 2 * 3 * (1 + 80 / 4 / 10)
    assert network.seconds({ALL_REDUCE: 80, ALL_GATHER: 40}, 8) == 2 * 7 * (1 + 80 / 8 / 5) + 7 * (1 + 40 / 8 / 5)


@pytest.mark.slow
def test_model_starts_at_the_measured_step_and_is_labelled(tmp_path: Path) -> None:
    step = tmp_path / "step.json"
    step.write_text(json.dumps({"p50": 0.1, "classes": 3, "batch": 64, "device": "cuda", "impl": "triton"}))
    arguments = argparse.Namespace(
        step=str(step), zero_stage=0, latency_us=10.0, node_gbs=200.0, network_gbs=25.0, scope="global"
    )
    model = _model(arguments)
    assert "not measured" in model["note"]
    assert [row["ranks"] for row in model["rows"]] == list(COUNTS)
    assert model["rows"][0]["strong"] == pytest.approx(0.1)
    assert model["rows"][0]["strong_communication"] == 0
    assert model["parameters"] > 12_604_416  # the decoders, the gate, the temperature, the projection of prompts
    assert model["rows"][-1]["strong"] < model["rows"][0]["strong"] <= model["rows"][-1]["weak"]
    measured = [
        {"scaling": scaling, "ranks": ranks, "batch": 8, "seconds": 1.0}
        for scaling in ("strong", "weak")
        for ranks in (1, 2)
    ]
    about = {"model": "narrow", "classes": 3, "device": "cpu", "cores": 2, "batch": 8}
    assert draw_scaling({"environment": about, "measured": measured, "model": model}).startswith(b"\x89PNG")
