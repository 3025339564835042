"""Scaling: what is counted equals the formula, and the model says that it is one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.model.assumptions import GPUS
from benchmarks.model.price import price_step
from benchmarks.model.scale import ImageShare, _sent_2, larger, price_rank, work
from benchmarks.model.share import Share
from benchmarks.model.trace import PAIRS, trace_step
from benchmarks.plots import draw_scaling, speedups
from benchmarks.ranks import Settings, measure
from benchmarks.traffic import ALL_GATHER, ALL_REDUCE, Network
from pspg.kernels.pairs import PairSelection


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "scope", "ranks"), [(0, "global", 1), (0, "local", 2), (0, "global", 2), (2, "global", 3)]
)
def test_counted_traffic_is_the_formula(stage: int, scope: str, ranks: int) -> None:
    found = measure(ranks, 6, Settings(classes=5, device="cpu", zero_stage=stage, scope=scope, repeat=1))
    assert found["payload"] == found["formula"]
    assert found["parameters"] > 50_000


def test_rings_take_rounds_of_latency_and_pieces() -> None:
    network = Network(latency=1.0, node_bandwidth=10.0, network_bandwidth=5.0, gpus_per_node=4)
    assert network.seconds({ALL_REDUCE: 80}, 1) == 0
    assert network.seconds({ALL_REDUCE: 80}, 4) == 2 * 3 * (1 + 80 / 4 / 10)
    assert network.seconds({ALL_REDUCE: 80, ALL_GATHER: 40}, 8) == 2 * 7 * (1 + 80 / 8 / 5) + 7 * (1 + 40 / 8 / 5)


def test_calls_take_latency_each() -> None:
    network = Network(latency=1.0, node_bandwidth=10.0, network_bandwidth=5.0)
    assert network.seconds({ALL_GATHER: 40}, 4, {ALL_GATHER: 3}) == 3 * (3 * 1 + 40 / 4 / 10)


@pytest.mark.slow
def test_what_is_hidden_is_the_mean_of_the_negative_prompts_as_far_as_pairs_last() -> None:
    """Few classes have few pairs to hide it behind; of many, the weights' gradients are averaged, when all is done."""
    network, table = Network(5e-6, 350e9, 45e9), GPUS["h100"]
    for classes, ranks in ((28, 8), (4, 64)):
        found = price_rank(Share(classes, 64, ranks=ranks), table)
        mean = network.seconds({ALL_REDUCE: 4 * classes * 16 * 512}, ranks)
        assert found["hidden_seconds"] == pytest.approx(min(mean, found["of"].get(PAIRS, 0.0)))
    assert _sent_2(Share(1000, 64, ranks=8), network)[1] == 0


def test_weak_scaling_keeps_the_pairs_of_a_rank() -> None:
    """Classes grow with the square root of the ranks, and with the ranks where pairs are sampled; the batch stays."""
    for share in (Share(108, 64), Share(108, 64, samples=8)):
        for ranks in (2, 8, 64):
            found = larger(share, ranks)
            assert found.pairs == pytest.approx(share.pairs, rel=0.02)
            assert (found.batch, found.ranks) == (64, ranks)
            assert work(found) == pytest.approx(ranks * work(share), rel=0.02)
    assert larger(Share(108, 64, samples=8), 8).classes == 8 * 108
    assert larger(ImageShare(64), 8) == ImageShare(512, 8)


def test_parts_of_a_rank_are_those_of_training() -> None:
    """Its images, its pairs, and the rows that they lie in."""
    share = Share(10, 8, ranks=4)
    whole = PairSelection(10)
    assert (share.images, share.pairs) == (2, 12)
    assert share.rows == whole.part(45 - 12, 45).rows
    assert Share(10, 8, samples=100).pairs == 45


@pytest.mark.slow
def test_what_one_rank_of_one_does_is_the_step_of_the_model() -> None:
    """Also where not all pairs are run, whose chunks are then counted again."""
    table = GPUS["h200"]
    for classes, slack in ((28, 0.01), (108, 0.03)):
        parts, _ = price_step(trace_step(classes, 64), table)
        found = price_rank(Share(classes, 64), table)
        assert found["seconds"] == pytest.approx(sum(part.seconds for part in parts.values()), rel=slack)
        assert found["of"]["communication"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("phase", [1, 2])
def test_the_command_models_ranks_and_says_that_it_is_a_model(
    phase: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "model.json", tmp_path / "model.png"
    words = ["--gpu", "h100", "--classes", "4", "--ranks", "2", "16", "--batch", "16", "--phase", phase]
    monkeypatch.setattr(sys, "argv", ["benchmarks.scaling", *map(str, [*words, "--json", out, "--plot", plot])])
    assert scaling.main() == 0
    assert "MODEL, not measured" in capsys.readouterr().out
    model = json.loads(out.read_text())["model"]
    assert "not measured" in model["note"]
    rows = model["rows"]
    assert [row["ranks"] for row in rows] == [1, 2, 16] * (len(rows) // 3)
    assert {row["scaling"] for row in rows} == {"strong", "weak"}
    for row in rows:
        assert row["seconds"] == pytest.approx(sum(row["of"].values()))
        assert row["limit"] == max(row["of"], key=row["of"].get)
        assert row["peak_bytes"] > 2**28
        assert (row["of"]["communication"] == 0) == (row["ranks"] == 1)
        assert (row["hidden_seconds"] > 0) == (phase == 2 and row["ranks"] > 1)
    first, *_, last = rows[:3]
    assert last["of"]["image tower"] < first["of"]["image tower"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_measured_points_and_the_model_share_their_axes() -> None:
    row = {"scaling": "strong", "classes": 3, "batch": 8, "work": 3}
    measured = [{**row, "ranks": ranks, "seconds": 1.0 / ranks} for ranks in (1, 2)]
    about = {"model": "narrow", "classes": 3, "device": "cpu", "cores": 2, "batch": 8}
    assert speedups(measured) == [1, 2]
    curve = {"gpu": "h100", "phase": 2, "curve": "all pairs, C = 3"}
    model = {"rows": [{**curve, **one, "scaling": kind} for one in measured for kind in ("strong", "weak")]}
    for found in ({"environment": about, "measured": measured}, {"model": model}):
        assert draw_scaling(found).startswith(b"\x89PNG")
    assert draw_scaling({"environment": about, "measured": measured, "model": model}).startswith(b"\x89PNG")


def test_a_measurement_takes_one_number_of_classes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.scaling", "--classes", "3", "4"])
    with pytest.raises(SystemExit):
        scaling.main()
    assert "--classes: several are for the model, --gpu" in capsys.readouterr().err
