"""The benchmark of the full step: what it counts, what it writes, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import phase1, step
from benchmarks.machine import peak_bytes
from benchmarks.setup import exact_flops, make_setup, repaired_loss
from benchmarks.steps import whole_step

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.step", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_flops_of_the_exact_algebra() -> None:
    """TFLOP of MATH.md's table, which come from formulas and not from a counter."""
    for classes, expected in ((14, 1.008), (28, 1.763), (108, 14.94), (193, 45.46)):
        assert exact_flops(classes, 64) / 1e12 == pytest.approx(expected, rel=2e-3)


def test_peak_memory_is_that_of_this_process() -> None:
    """In a process of its own, started by this one, which may have used more: 256 MiB show up, ours do not."""
    code = (
        "import torch; from benchmarks.machine import peak_bytes; cpu = torch.device('cpu')\n"
        "before = peak_bytes(cpu); block = torch.ones(2**26); print(before, peak_bytes(cpu))"
    )
    block = torch.ones(2**29)  # 2 GiB
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert 0 < before < block.nbytes < peak_bytes(CPU)
    assert after - before >= 2**27


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--classes", "0"], "at least 1"),
        (["--impl", "fastest"], "fastest"),
        (["--impl", "triton"], "--device cuda"),
        (["--device", "tpu"], "tpu"),
        (["--json", "README.md/out.json"], "README.md"),
        (["--phase", "1", "--impl", "repaired"], "--phase 1: measures reference and eager with --device cpu"),
        (["--phase", "1", "--memory", "100"], "--memory: phase 1"),
    ],
)
def test_mistakes_end_in_a_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.step", *arguments])
    try:
        status: object = step.main()
    except SystemExit as error:  # argparse's own
        status = error.code
    assert status == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_all_forms_compute_the_same_loss_and_gradients() -> None:
    losses, gradients = [], []
    for impl in ("reference", "repaired", "eager"):
        setup = make_setup(3, 2, CPU, impl, torch.float32)
        setup.head.prompt_learner.dropout = 0.0
        loss = repaired_loss(setup) if impl == "repaired" else setup.loss()
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in setup.head.parameters() if p.grad is not None]))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-3 * gradients[0].norm()


@pytest.mark.slow
def test_a_step_changes_the_weights() -> None:
    setup = make_setup(2, 1, CPU, "eager", torch.float32)
    before = setup.head.prompt_learner.pos_decoder.fc.weight.detach().clone()
    whole_step(setup, "eager", torch.float32).whole()
    assert not torch.equal(before, setup.head.prompt_learner.pos_decoder.fc.weight)


@pytest.mark.slow
def test_writes_what_it_measured(tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    done = run("--classes", 2, "--batch", 1, "--impl", "eager", "--repeat", 3, "--json", one)
    assert done.returncode == 0, done.stderr
    assert "utilisation" in done.stdout
    result = json.loads(one.read_text())
    assert 0 < result["p20"] <= result["p50"] <= result["p80"]
    assert result["cpu_s"] > 0
    assert result["peak_bytes"] > 5e8
    assert result["reserved_bytes"] is None
    assert result["flops"] == exact_flops(2, 1)
    assert 0 < result["utilisation"] < 1.2
    assert {"machine", "versions", "commit"} <= result.keys()
    assert (
        run("--classes", 2, "--batch", 1, "--impl", "repaired", "eager", "--repeat", 1, "--json", two).returncode == 0
    )
    assert [row["impl"] for row in json.loads(two.read_text())] == ["repaired", "eager"]


@pytest.mark.slow
def test_phase_1_is_measured_behind_its_gate(tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    done = run("--phase", 1, "--batch", 2, "--impl", "reference", "eager", "--repeat", 1, "--json", file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("phase-1 step, RN50, B=2, cpu")
    rows = json.loads(file.read_text())
    assert [(row["impl"], row["phase"]) for row in rows] == [("reference", 1), ("eager", 1)]
    assert all(row["cpu_s"] > 0 and row["flops"] == rows[0]["flops"] > 0 for row in rows)


def test_phase_1_flops_grow_with_the_batch() -> None:
    """Four reports are as long as four others; images are alike."""
    assert phase1.flops(8) == pytest.approx(2 * phase1.flops(4), rel=1e-3)


@pytest.mark.slow
def test_a_phase_1_step_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = phase1.ContrastiveModel.forward
    monkeypatch.setattr(phase1.ContrastiveModel, "forward", lambda self, x, *texts: forward(self, x.flip(0), *texts))
    assert "wrong: error is" in (phase1.wrong("eager") or "")


def test_what_fails_the_gate_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(step, "_wrong", lambda arguments: {"eager": "gate, C4 B2: FAILED, gradients"})
    monkeypatch.setattr(sys, "argv", ["benchmarks.step"])
    assert step.main() == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "benchmarks.step: error: --impl eager: gate, C4 B2: FAILED, gradients\n")
