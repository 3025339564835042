"""The model of the phase-2 step: its counts are those of the formulas, its table can be replaced."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.model.assumptions import GPUS, load_assumptions
from benchmarks.model.price import FUSED, kind, price, price_step, used
from benchmarks.model.selectable import DECODERS, faster_decoder, images_ahead, selectable_step
from benchmarks.model.trace import PARTS, Step, trace_step

C, B, n, D, H, W, L, h, G, S, E = 14, 64, 16, 1024, 512, 512, 12, 8, 2, 50, 2048


@pytest.fixture(scope="module")
def step() -> Step:
    return trace_step(C, B)


def formula() -> float:
    """FLOPs of MATH.md's section "Work of a step", and of the attention scores that backward forms again."""
    P, T, K, heads_of_pool = C * (C - 1) // 2, n + 1, 2 * n + 2, 32
    pairs = 2 * P * T * 9 * W**2 + 2 * C * T * 3 * W**2 + 2 * P * T * 12 * W**2 * (L - 2) + 2 * P * (12 * W**2 + W * D)
    pairs += 6 * P * (T * K * W * (L - 1) + K * h * W) + 3 * P * B * D
    prefixes = G * C * (L - 1) * (2 * n * 12 * W**2 + 6 * n * (n + 1) * W) + 2 * (L - 1) * 12 * W**2
    singles = G * C * (2 * (9 * W**2 + 12 * W**2 * (L - 1) + W * D) + 6 * (n + 2) * W * (L - 1) + 6 * (n + 2) * h * W)
    singles += 3 * C * W**2 + 3 * G * C * B * D
    X = 2 * h * B * H
    decoders = 3 * G * C * ((n - 1) * 6 * H**2 + n * (5 * H**2 + 2 * C * H + X + H * D + D * W))
    decoders += G * (6 * C * H * D + 2 * B * D * H + 3 * (2 * B * H**2 + 3 * H**2 * D + 2 * B * H**2))
    image = B * (5.367e9 + S * E * D + 2 * S * heads_of_pool * E + 3 * E**2 + E * D)
    scores = (L - 1) * W * (P * T * K + G * C * (n * (n + 1) + n + 2)) + h * W * (P * K + G * C * (n + 2))
    return 2 * (pairs + prefixes + singles + decoders + image + scores)


def test_flops_are_those_of_the_formulas(step: Step) -> None:
    assert sum(operation.flops for operation in step.operations) == pytest.approx(formula(), rel=1e-3)


def test_every_part_and_kernel_is_seen(step: Step) -> None:
    parts, kinds = price_step(step, GPUS["h200"])
    assert set(parts) == set(PARTS)
    assert {"products", "convolutions", "attention_backward", "prompt_decoder", "pair_loss", "optimizer"} <= set(kinds)
    for totals in (parts, kinds):
        assert sum(t.launches for t in totals.values()) == sum(o.kernels for o in step.operations)
    # Two decoders of 12.6 M parameters with gradients and momentum, and the frozen towers in bf16.
    assert 0.3 * 2**30 < step.peak_bytes < 1.5 * 2**30


def test_instructions_of_attention_have_their_price(step: Step) -> None:
    table = GPUS["h200"]
    attention = next(o for o in step.operations if kind(o) == "attention_backward" and o.part == "pair chunks")
    slower = replace(table, trip_instructions={name: 100 * count for name, count in table.trip_instructions.items()})
    assert price(attention, slower) > 2 * price(attention, table)


def test_a_measured_product_replaces_the_tiles(step: Step) -> None:
    product = next(o for o in step.operations if o.name == "addmm")
    (m, k), (_, N) = product.shapes[-2:]
    table = replace(GPUS["h100"], product_us={f"1x{m}x{N}x{k}": 77.0})
    assert price(product, table) == pytest.approx(1e-6 * (77 + table.gap_us))


def test_calibration(tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"gap_us": 0.9, "h100": {"bandwidth": 3e12, "kernel_us": {"gru_kernel": 9}}}))
    h100, h200 = (load_assumptions(gpu, file) for gpu in ("h100", "h200"))
    assert (h100.gap_us, h200.gap_us) == (0.9, 0.9)
    assert (h100.bandwidth, h200.bandwidth) == (3e12, GPUS["h200"].bandwidth)
    assert h100.kernel_us == {**GPUS["h100"].kernel_us, "gru_kernel": 9}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"bandwith": 1}', "bandwith is not known; keys are bandwidth, "),
        ('{"h100": {"speed": 1}}', "speed is not known"),
        ('{"clock": "fast"}', "clock must be a positive number, got 'fast'"),
        ('{"clock": 0}', "clock must be a positive number"),
        ('{"kernel_us": {"gru_kernel": -1}}', "kernel_us must be an object of positive numbers"),
        ('{"kernel_us": 3}', "kernel_us must be an object of positive numbers"),
        ('{"h200": 3}', "h200 must be an object"),
        ("[1]", "must be an object"),
        ("{", "cannot be read as JSON"),
        (None, "cannot be read as JSON"),
    ],
)
def test_a_wrong_calibration_is_one_line(
    text: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "measured.json"
    if text is not None:
        file.write_text(text)
    assert run(monkeypatch, "--calibration", file) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"benchmarks.model: error: {file}: ")
    assert said in line
    assert line.count("\n") == 1


def test_a_batch_beyond_the_kernels_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--batch", 129) == 2
    assert capsys.readouterr().err == (
        "benchmarks.model: error: --batch: the decoder's kernels take up to 128 images, got 129\n"
    )


def test_the_command_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.json"
    assert run(monkeypatch, "--classes", 3, "--batch", 2, "--gpu", "h200", "h100", "--json", file) == 0
    results = json.loads(file.read_text())
    assert [(r["classes"], r["batch"], r["gpu"]) for r in results] == [(3, 2, "h200"), (3, 2, "h100")]
    for result in results:
        assert 0 < result["floor_ms"] < result["ms"]
        assert min(result[key] for key in ("launches", "bytes", "flops", "peak_bytes")) > 0
        for rows in (result["parts"], result["kinds"]):
            assert sum(row["ms"] for row in rows.values()) == pytest.approx(result["ms"])
    assert results[0]["ms"] < results[1]["ms"]
    assert f"a model says {results[0]['ms']:.2f} ms" in capsys.readouterr().out


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["benchmarks.model", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("benchmarks.model", run_name="__main__", alter_sys=True)
    return done.value.code


def test_selectable_forms_save_passes_and_gaps_and_nothing_else(step: Step) -> None:
    table = GPUS["h200"]
    selectable = selectable_step(C, B)
    before, after = (price_step(found, table)[0] for found in (step, selectable))
    assert after["image tower"].flops == before["image tower"].flops
    assert after["image tower"].launches < before["image tower"].launches / 2
    for part in set(PARTS) - {"image tower"}:
        assert (after[part].launches, after[part].bytes) == (before[part].launches, before[part].bytes), part
        assert after[part].seconds <= before[part].seconds, part
    # Every kernel of the text tower and of the decoders takes part; those of the losses do not.
    apart = {kind(o) for o in selectable.operations if o.launch is not None and not o.overlapped}
    assert apart <= {"pair_loss", "asymmetric_loss"}
    assert not any(o.overlapped for o in step.operations)


def test_the_decoder_in_one_launch_pays_for_its_barriers() -> None:
    table = GPUS["h200"]
    _, seconds = faster_decoder(C, B, table)
    assert set(seconds) == set(DECODERS)
    choice, cheaper = faster_decoder(C, B, replace(table, barrier_us=0.01))
    assert choice == "one"
    # Seven phases a step, forward and backward.
    assert seconds["one"] - cheaper["one"] == pytest.approx(2 * 7 * n * 1e-6 * (table.barrier_us - 0.01))


def test_images_ahead_hide_behind_what_is_idle_and_no_more(step: Step) -> None:
    table = GPUS["h200"]
    for operation in step.operations:
        assert used(operation, table) <= price(operation, table) * (1 + 1e-9), operation
    ahead = images_ahead(step, table)
    assert 0 < ahead.saved <= ahead.images
    # A GPU on which nothing is ever idle saves nothing.
    assert replace(ahead, used=ahead.images + ahead.texts).saved == 0


def test_a_product_of_the_project_has_the_price_of_the_tile_that_is_launched(step: Step) -> None:
    """One program a processor has nothing beside its epilogue; two have one epilogue of two to pay for."""
    table = replace(GPUS["h200"], gap_us=0.0)
    product = next(o for o in step.operations if o.name in FUSED)

    def seconds(columns: int) -> float:
        assert product.launch is not None
        sizes = {"rows": 128 * table.processors, "columns": 512, "depth": 4096, "BLOCK_M": 128, "BLOCK_N": columns}
        launch = replace(product.launch, arguments={**product.launch.arguments, **sizes})
        operands = 2 * 4096 * (128 * table.processors + 512)  # alone: an epilogue of `tile_us`
        return price(replace(product, launch=launch, read=operands, written=0), table)

    each = 2 * 128 * 128 * 4096 * table.processors / table.product_rate
    assert seconds(128) == pytest.approx(4 * each / table.tile_share["128x128"] + 2 * 1e-6 * table.tile_us)
    assert seconds(256) == pytest.approx(2 * 2 * each + 2 * 1e-6 * table.tile_us)


def test_both_forms_and_phase_1_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.json"
    assert run(monkeypatch, "--classes", 3, "--batch", 2, "--selectable", "--json", file) == 0
    default, selectable = json.loads(file.read_text())
    assert (default["form"], selectable["form"]) == ("default", "selectable")
    assert selectable["ms"] < selectable["serial_ms"] < default["ms"]
    assert sum(row["ms"] for row in selectable["parts"].values()) == pytest.approx(selectable["serial_ms"])
    assert "selectable forms: a model says" in capsys.readouterr().out
    assert run(monkeypatch, "--phase", 1, "--batch", 2, "--tokens", 5, "--json", file) == 0
    (found,) = json.loads(file.read_text())
    assert (found["phase"], found["batch"], found["tokens"]) == (1, 2, 5)
    assert 0 < found["floor_ms"] < found["ms"]
    assert run(monkeypatch, "--phase", 1, "--selectable") == 2
    assert "--selectable: a step of phase 1 has no forms" in capsys.readouterr().err
