"""The loop, on a task small enough to check by hand: a linear model with dropout, whose loss is a mean over samples."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pspg.engine.distributed.world import start
from pspg.engine.training import telemetry
from pspg.engine.training.config import OptimConfig, TrainConfig
from pspg.engine.training.optimizer import learning_rate, parameter_groups
from pspg.engine.training.trainer import Trainer, step_seed
from pspg.engine.utils.errors import UserError
from pspg.engine.utils.metrics_log import read_metrics

STEPS, BATCH = 6, 4


class ToyLoader:
    """Batches of this rank's share, a function of the epoch alone; `stop_at` raises in the middle of an epoch."""

    def __init__(self, rank: int = 0, size: int = 1, stop_at: tuple[int, int] | None = None, nan_at: int = -1) -> None:
        self.batches_per_epoch, self.bad = STEPS, {}
        self._rank, self._share, self._stop_at, self._nan_at = rank, BATCH // size, stop_at, nan_at

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[torch.Tensor]:
        for number in range(start_batch, STEPS):
            if self._stop_at == (epoch, number):
                raise KeyboardInterrupt
            x = torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(100 * epoch + number))
            if number == self._nan_at:
                x = x * torch.nan
            yield x[self._rank * self._share : (self._rank + 1) * self._share]


class ToyTask:
    def __init__(self, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(3, 5), nn.Dropout(dropout), nn.LayerNorm(5), nn.Linear(5, 1))
        self.module.register_parameter("temperature", nn.Parameter(torch.tensor(0.5)))

    def inputs(self, batch: torch.Tensor) -> tuple[torch.Tensor]:
        return (batch,)

    def loss(self, output: torch.Tensor, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        target = batch.sum(1, keepdim=True)
        loss = (output * self.module.temperature.exp() - target).square().mean()
        return loss, {"target": target.mean().detach()}

    def validate(self, module: nn.Module) -> dict[str, float]:
        module.eval()
        with torch.no_grad():
            return {"val_score": -module(torch.ones(1, 3)).sub(3).abs().item()}

    def score(self, metrics: dict[str, float]) -> float | None:
        return metrics["val_score"]


def config(folder: Path, **optim: object) -> TrainConfig:
    settings = {"name": "adamw", "lr": 1e-2, "epochs": 3, "warmup_epochs": 1, "accumulate": 2, **optim}
    return TrainConfig(output=str(folder), optim=OptimConfig(**settings), batch_size=BATCH, save_every=1, log_every=1)


@pytest.fixture
def world():
    return start("cpu")


def fit(settings: TrainConfig, world, **loader: object) -> tuple[Trainer, dict]:
    trainer = Trainer(settings, ToyTask(0.3), ToyLoader(**loader), world, {"batch_size": BATCH})
    return trainer, trainer.fit()


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_resume_is_exact(tmp_path: Path, world, name: str, zero_stage: int) -> None:
    """Interrupted twice inside epochs, with dropout, accumulation, clipping and an average: the same run."""
    optim = {"name": name, "ema_decay": 0.9, "clip_norm": 1.0}
    whole = config(tmp_path / "whole", **optim)
    cut = config(tmp_path / "cut", **optim)
    whole.zero_stage = cut.zero_stage = zero_stage
    trainer, result = fit(whole, world)
    cut.resume = "latest"
    for stop_at in ((0, 5), (2, 3)):
        with pytest.raises(KeyboardInterrupt):
            fit(cut, world, stop_at=stop_at)
    resumed, resumed_result = fit(cut, world)
    assert resumed_result == result
    for name_, value in trainer.engine.state().items():
        assert torch.equal(value, resumed.engine.state()[name_]), name_
    for a, b in zip(trainer.evaluated.parameters(), resumed.evaluated.parameters(), strict=True):
        assert torch.equal(a, b)

    def rows(folder: Path) -> list[dict]:
        clock = {"images_per_s", "loader_wait", "peak_bytes"}
        return [{k: v for k, v in row.items() if k not in clock} for row in read_metrics(folder / "metrics.jsonl")]

    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_fresh_start_is_said_and_an_existing_run_is_not_overwritten(
    tmp_path: Path, world, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pspg")
    settings = config(tmp_path, epochs=1)
    settings.resume = "latest"
    fit(settings, world)
    assert "starting fresh" in caplog.text
    settings.resume = None
    with pytest.raises(UserError, match=r"^output: .* already holds a run"):
        fit(settings, world)
    settings.resume = "latest"
    with pytest.raises(UserError, match=r"^batch_size: .* was made with 4, this run asks for 8"):
        Trainer(settings, ToyTask(), ToyLoader(), world, {"batch_size": 8})
    with pytest.raises(UserError, match=r"^batch_size: .* was made with 4, this run asks for true;"):
        Trainer(settings, ToyTask(), ToyLoader(), world, {"batch_size": True})


def test_lost_run_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path, world) -> None:
    with pytest.raises(UserError, match="training diverged: the loss is nan at step 2") as caught:
        fit(config(tmp_path), world, nan_at=2)
    assert "step-00000001" in str(caught.value)
    assert [row["loss"] is None for row in read_metrics(tmp_path / "metrics.jsonl")] == [False, True]


def test_average_follows_the_weights(tmp_path: Path, world) -> None:
    """After two steps: decay · first + (1 − decay) · second."""
    seen: list[torch.Tensor] = []
    settings = config(tmp_path, ema_decay=0.75, epochs=1, warmup_epochs=0)
    trainer = Trainer(settings, ToyTask(), ToyLoader(), world, {})
    original = trainer._save

    def save() -> None:
        seen.append(trainer.task.module[0].weight.detach().clone())
        original()

    trainer._save = save  # type: ignore[method-assign]
    trainer.fit()
    expected = seen[0]
    for weight in seen[1:3]:
        expected = 0.75 * expected + 0.25 * weight
    torch.testing.assert_close(trainer.evaluated[0].weight.detach(), expected)


def test_decay_spares_vectors_and_the_temperature() -> None:
    module = ToyTask().module
    decayed, plain = parameter_groups(module, OptimConfig(weight_decay=0.05))
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in plain["params"]} == {0, 1}
    assert plain["weight_decay"] == 0.0
    assert sum(len(group["params"]) for group in (decayed, plain)) == len(list(module.parameters()))


class Clock:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def slow(self, waits: list[float]) -> Iterator[int]:
        for number, wait in enumerate(waits):
            self.now += wait
            yield number


@pytest.mark.parametrize(
    ("wait", "step", "device_wait", "share", "said"),
    [
        (1, 1, 0, 4 / 9, True),
        (1, 4, 0, 4 / 24, False),
        (0, 1, 5, 0, False),
        (1, 0.1, 4.5, 4 / 9, False),  # the host ran ahead of a busy device
        (1, 0.1, 0.5, 4 / 5, True),
    ],
)
def test_waiting_for_the_loader_is_measured_and_said_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wait: float,
    step: float,
    device_wait: float,
    share: float,
    said: bool,
) -> None:
    caplog.set_level("INFO", "pspg")
    clock = Clock()
    monkeypatch.setattr(telemetry, "time", clock)
    watch = telemetry.LoaderWatch("raise data.workers (2)")
    for _ in range(2):
        clock.now += 1000  # validation
        for _ in watch.watch(clock.slow([99, wait, wait, wait, wait])):
            clock.now += step
        clock.now += device_wait
        assert watch.share(device_wait) == pytest.approx(share)
    text = caplog.text
    assert text.count("the loader is the bottleneck") == said
    assert not said or f"{share:.0%} of the time goes into waiting for images; raise data.workers (2)" in text


def test_the_share_is_logged(tmp_path: Path, world) -> None:
    fit(config(tmp_path, epochs=1), world)
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert rows
    assert all(0 <= row["loader_wait"] <= 1 for row in rows)


def test_schedule() -> None:
    optim = OptimConfig(lr=1e-2, epochs=10, warmup_epochs=2, warmup_lr=1e-4, min_lr=1e-3)
    rates = [learning_rate(step, 5, optim) for step in range(51)]
    assert rates[0] == 1e-4
    assert rates[5] == pytest.approx((1e-4 + 1e-2) / 2)
    assert rates[10] == pytest.approx(1e-2)
    assert rates[30] == pytest.approx((1e-2 + 1e-3) / 2)
    assert rates[50] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-2)
    late = replace(optim, cosine_from="start")
    from_start = [learning_rate(step, 5, late) for step in range(51)]
    assert from_start[:10] == rates[:10]
    for step in range(10, 51):
        cosine = 1e-3 + 0.5 * (1e-2 - 1e-3) * (1 + math.cos(math.pi * step / 50))
        assert from_start[step] == pytest.approx(cosine)
    optim.schedule = "constant"
    assert learning_rate(49, 5, optim) == 1e-2


def test_draws_differ_between_batches_ranks_and_seeds() -> None:
    seeds = {step_seed(seed, batch, rank) for seed in range(3) for batch in range(5) for rank in range(4)}
    assert len(seeds) == 60
    assert max(seeds) < 2**63


TWO = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_trainer as t
world, folder = t.start("cpu"), Path(sys.argv[2])
for name, stage in t.TWO_RUNS:
    settings = t.config(folder / f"{name}-{stage}", name=name, clip_norm=0.5)
    settings.zero_stage = stage
    trainer = t.Trainer(settings, t.ToyTask(), t.ToyLoader(world.rank, world.size), world, {})
    trainer.fit()
    weights = {k: v.flatten().tolist() for k, v in trainer.engine.state().items()}
    if world.is_main:
        (folder / f"{name}-{stage}.json").write_text(json.dumps(weights))
"""
TWO_RUNS = [(name, stage) for name in ("sgd", "adamw") for stage in (0, 1, 2)]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path, world) -> None:
    """A mean over samples: two ranks with half the batch each give the parameters of one process."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {"PATH": str(Path(sys.executable).parent), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    environment |= {key: value for key, value in os.environ.items() if key == "PYTHONPATH"}
    launch += [str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, stage in TWO_RUNS:
        trainer = Trainer(
            config(tmp_path / name / f"{stage}", name=name, clip_norm=0.5), ToyTask(), ToyLoader(), world, {}
        )
        trainer.fit()
        two = json.loads((tmp_path / f"{name}-{stage}.json").read_text())
        for key, value in trainer.engine.state().items():
            error = (value.flatten() - torch.tensor(two[key])).abs().max().item()
            assert error < 1e-6, (name, stage, key, error)
        assert math.isfinite(trainer.best["best_score"])
