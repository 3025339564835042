"""The plan of the first half hour on a GPU, as far as a CPU can try it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import SWEEPS
from benchmarks.gpu.calibrate import calibration
from benchmarks.gpu.probe import NAMES, measure
from benchmarks.gpu.profile import compare, kind_of
from benchmarks.gpu.report import LINES, table
from benchmarks.gpu.session import FAILED, OK, STOPPED, Part, Record, Session
from benchmarks.gpu.sweep import Sweep, other_values
from benchmarks.harness import Sizes, Unavailable
from benchmarks.model.assumptions import GPUS, load_assumptions
from benchmarks.operators import OPERATORS
from benchmarks.problem import outcome
from pspg.kernels.launch import CONFIGS, configuration, replaced

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", NAMES)
def test_every_function_of_a_probe_runs(name: str) -> None:
    rows = list(measure(name, torch.device("cpu")))
    assert rows
    assert all(row["us"] == 1.0 for row in rows), rows


def test_a_session_keeps_what_it_has_and_goes_on(tmp_path: Path) -> None:
    write = "import sys, pathlib, time; p = pathlib.Path(sys.argv[1]); p.write_text(str([1])); "
    parts = [
        Part("good", ["-c", write, "json"], 60),
        Part("bad", ["-c", write + "sys.exit('it broke')", "json"], 60),
        Part("endless", ["-c", write + "time.sleep(60)", "json"], 2),
    ]
    session = Session(tmp_path, budget=300)
    assert session.run(parts, {"commit": "x"}) == []
    assert {name: (r.status, r.result) for name, r in session.records.items()} == {
        "good": (OK, [1]),
        "bad": (FAILED, [1]),
        "endless": (STOPPED, [1]),
    }
    assert session.records["bad"].detail == "exit 1: it broke"
    again = Session(tmp_path, budget=300)
    parts[0] = Part("good", ["-c", "raise SystemExit(1)"], 60)  # done: not run again
    parts[1] = Part("bad", ["-c", write, "json"], 60)  # failed: run again
    assert again.run(parts, {"commit": "x"}) == []
    assert {name: r.status for name, r in again.records.items()} == {"good": OK, "bad": OK, "endless": STOPPED}
    assert Session(tmp_path, budget=15).run([*parts, Part("late", ["-c", ""], 60)], {}) == ["late"]


def test_the_table_has_room_for_every_part() -> None:
    rows = [{"name": f"1x{n}x512x512", "us": 1.0, "tflops": 2.0, "gbs": 3.0} for n in range(100)]
    found = {"counts": {"passed": 3, "failed": 1}, "failed": ["tests/a.py::test_b: AssertionError"], "skipped": {}}
    step = {"impl": "triton", "p50": 0.03, "peak_bytes": 2**31, "utilisation": 0.4}
    records = [
        Record("products", OK, 12.0, result=rows),
        Record("tests", FAILED, 3.0, "exit 1", found),
        Record("step", OK, 9.0, result=[step]),
        *(Record(f"part {n}", STOPPED, 1.0, "after 1 s") for n in range(30)),
    ]
    lines = table(records, ["a note"])
    assert len(lines) <= LINES
    assert lines[0] == "products (12 s)"
    assert "tests (3 s)  FAILED exit 1" in lines
    assert "  3 passed, 1 failed" in lines
    assert any("triton" in line and "30.00 ms" in line for line in lines)
    assert sum(line.startswith("part ") for line in lines) == 30
    assert lines[-1] == "a note"


def test_what_is_left_of_a_part_is_for_another_call(tmp_path: Path) -> None:
    write = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
    for left in (2, 0):
        part = Part("sweep", ["-c", write, "json", json.dumps({"sweep": [], "left": left})], 60)
        session = Session(tmp_path, budget=300)
        session.run([part], {})
        assert session.records["sweep"].result["left"] == left
    assert Session(tmp_path, budget=300).run([Part("sweep", ["-c", "raise SystemExit(1)"], 60)], {}) == []


def test_a_sweep_keeps_what_is_faster_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pspg.kernels.asymmetric_loss.triton")  # pins its configuration
    assert other_values("num_warps", 4) == [2, 8]
    assert (other_values("BLOCK_K", 16), other_values("BLOCK_K", 64), other_values("PARTS", 4)) == ([32], [32, 128], [])
    ran = []

    def measured(self: Sweep) -> dict[str, object]:
        ran.append(configuration("asymmetric_loss", CPU))
        if ran[-1]["BLOCK"] == 1024:
            return {"us": None, "error": "wrong"}
        return {"us": 800.0 / ran[-1]["num_warps"]}

    monkeypatch.setattr(Sweep, "_measured", measured)
    file = tmp_path / "sweep.json"
    counts = []
    for seconds in (0, 60, 60):
        Sweep("asymmetric_loss", {"C": 4, "B": 2}, CPU, file).run(seconds)
        counts.append(len(ran))
    assert counts == [1, 1 + 1 + 4, 1 + 1 + 4 + 1]  # as pinned each time, every other one once
    result = json.loads(file.read_text())
    assert result["left"] == 0
    (row,) = result["sweep"]
    assert (row["best"], row["before"], row["us"]) == ({"BLOCK": 512, "num_warps": 8}, 200.0, 100.0)
    assert (row["tried"], row["refused"]) == (4, 1)
    lines = table([Record("sweep", OK, 1.0, result=result)], [])
    assert " ".join(lines[1].split()) == "asymmetric_loss 200.0 → 100.0 us num_warps 4→8 (4 tried, 1 refused)"


def test_a_configuration_that_ended_the_process_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pspg.kernels.asymmetric_loss.triton")  # pins its configuration

    def measured(self: Sweep) -> dict[str, object]:
        if configuration("asymmetric_loss", CPU)["BLOCK"] == 256:
            raise KeyboardInterrupt
        return {"us": 1.0}

    monkeypatch.setattr(Sweep, "_measured", measured)
    file = tmp_path / "sweep.json"
    with pytest.raises(KeyboardInterrupt):
        Sweep("asymmetric_loss", {"C": 4, "B": 2}, CPU, file).run(60)
    Sweep("asymmetric_loss", {"C": 4, "B": 2}, CPU, file).run(60)
    (row,) = json.loads(file.read_text())["sweep"]
    assert (row["tried"], row["refused"], row["best"]) == (4, 1, row["pinned"])


def test_a_sweep_covers_every_kernel_that_is_pinned() -> None:
    """But float32's, and what takes larger shapes or a choice that is not the default."""
    pytest.importorskip("triton")
    tried: set[str] = set()
    for name, (_, shape) in SWEEPS.items():
        operator = OPERATORS[name.split()[0]]
        sizes = Sizes({**operator.letters, **{letter: int(size) for letter, size in re.findall(r"(\w+)=(\d+)", shape)}})
        for dtype in (torch.bfloat16, torch.float32):
            with replaced() as asked, suppress(Unavailable):  # packed attention in float32
                outcome(operator.impls["triton"], operator.make(sizes, CPU, dtype))
            tried |= {kernel.removesuffix("_fp32") for kernel in asked}
    left = {name.removesuffix("_fp32") for name in CONFIGS if not name.endswith(("_wide", "_float32"))} - tried
    assert left == {"sum_partial", "decoder_steps"}  # of prefixes with many suffixes, and by choice


def test_measured_numbers_replace_assumptions(tmp_path: Path) -> None:
    probes = {
        "gap": [{"name": "gap", "us": 3.0, "tflops": 0.0, "gbs": 0.0}],
        "copy": [{"name": "copy", "us": 1.0, "tflops": 0.0, "gbs": 2400.0}],
        "products": [
            {"name": "large", "us": 1.0, "tflops": 700.0, "gbs": 1.0},
            {"name": "1x6239x2048x512", "us": 40.0, "tflops": 300.0, "gbs": 1.0},
            {"name": "1x17x512x512", "us": None, "error": "no"},
        ],
        "convolutions": [{"name": "64to64 56 k3 plain", "us": 1.0, "tflops": 350.0, "gbs": 0.0}],
        "attention": [{"name": "forward 367", "us": 36.7, "tflops": 0.0, "gbs": 0.0}],
    }
    found = calibration(probes, GPUS["h200"])
    (tmp_path / "calibration.json").write_text(json.dumps(found))
    table = load_assumptions("h200", tmp_path / "calibration.json")
    assert (table.gap_us, table.bandwidth_share, table.product_rate) == (1.5, 0.5, 700e12)
    assert table.product_us == {"1x6239x2048x512": 38.5}
    assert table.convolution_share == 0.5
    assert table.attention_us == pytest.approx(0.1)
    assert calibration({}, GPUS["h200"]) == {}


def test_kernels_are_told_apart_by_kind() -> None:
    model = {"add_norm": {"us": 10.0, "launches": 2}, "products": {"us": 50.0, "launches": 4}}
    names = {
        "_add_norm_kernel": "add_norm",
        "nvjet_tst_128x256_64x4_2x1_v_bz_bias_TNT": "products",
        "sm90_xmma_fprop_implicit_gemm_bf16": "convolutions",
        "cudnn_infer_implicit_convolve": "convolutions",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "torch's attention",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>": "products",
        "void at::native::vectorized_elementwise_kernel<4>": "passes",
        "Memset (Device)": "fills",
        "void at::native::multi_tensor_apply_kernel": "optimizer",
    }
    assert {name: kind_of(name, model) for name in names} == names
    rows = compare([{"name": "_add_norm_kernel", "us": 30.0, "launches": 3.0}], model)
    assert [row["kind"] for row in rows] == ["products", "add_norm"]
    assert rows[0] == {"kind": "products", "us": None, "launches": None, "model_us": 50.0, "model_launches": 4}
    assert (rows[1]["us"], rows[1]["model_us"]) == (30.0, 10.0)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["1", "2", "3"])
def test_the_whole_plan_is_rehearsed(tmp_path: Path, command: str) -> None:
    words = [sys.executable, "-m", "benchmarks.gpu", command, "--rehearse", "--out", str(tmp_path), "--commit", "none"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / f"gpu-{command}/results.json").read_text())
    assert results["environment"]["commit"] == "none"
    assert {part["status"] for part in results["parts"]} == {OK}
    assert all(part["result"] for part in results["parts"])
    assert len(done.stdout.splitlines()) <= LINES
    if command == "1":
        load_assumptions("h200", tmp_path / "calibration.json")
