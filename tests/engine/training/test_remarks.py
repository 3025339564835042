"""What a run says of its pace and of results that look wrong."""

from __future__ import annotations

import pytest

from pspg.engine.training import remarks
from pspg.engine.training.config import OptimConfig
from pspg.engine.training.optimizer import learning_rate
from pspg.engine.training.remarks import Remarks, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the clock shows, to be set."""
    now = [0.0]
    monkeypatch.setattr(remarks.time, "perf_counter", lambda: now[0])
    return now


def test_the_pace_comes_from_the_steps_after_the_first_row(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pspg")
    run = Remarks(epochs=2, steps=100, done=20, active=True)
    clock[0] = 500.0  # the first steps compile
    run.logged({"step": 30, "loss": 4.0}, 10)
    assert run.left() == 0
    clock[0] = 530.0
    run.logged({"step": 40, "loss": 2.0}, 10)
    assert run.left() == 180.0
    assert caplog.messages == ["about 3 min for 60 steps to go"]
    clock[0] = 560.0
    run.logged({"step": 50, "loss": 3.0}, 10)
    run.validated(1, 1e-4, {"val_macro_auc": 0.75}, 1)
    assert caplog.messages[1:] == ["epoch 1/2  loss 3  lr 0.0001  val_macro_auc 0.7500  (best)  9 min, 2 min to go"]
    run.validated(2, 1e-4, {"val_macro_auc": 0.7}, 1)
    assert "(best: epoch 1)" in caplog.messages[-1]


def test_what_looks_wrong_is_remarked_once(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "pspg")
    run = Remarks(epochs=9, steps=90, done=0, active=True)
    for step, loss in enumerate([5.0, 1.0, 9.9, 10.1, 30.0], 1):
        run.logged({"step": step, "loss": loss}, 1)
        assert len(caplog.messages) == (step >= 4)
    assert "the loss is 10.1 at step 4 and was 1: lower optim.lr" in caplog.messages[0]
    for epoch in range(1, 6):
        run.validated(epoch, 1e-3, {"val_macro_auc": 0.49}, None)
        assert len(caplog.messages) == 1 + (epoch >= 3)
    assert caplog.messages[1].startswith("val_macro_auc is below 0.5 after 3 epochs, worse than guessing")
    other = Remarks(epochs=9, steps=90, done=0, active=False)
    other.logged({"step": 1, "loss": 1.0}, 1)
    other.logged({"step": 2, "loss": 1e9}, 1)
    other.validated(3, 1e-3, {"val_loss": 2.0}, 3)
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min"), (3540, "59 min"), (12_060, "3 h 21 min"), (90_000, "1 d 1 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_default_warm_up_fits_every_number_of_epochs() -> None:
    for epochs, warm in ((1, 0.5), (4, 2), (10, 5), (50, 5)):
        config = OptimConfig(epochs=epochs, lr=1.0, warmup_lr=0.0)
        rates = [learning_rate(step, 10, config) for step in range(epochs * 10)]
        assert rates.index(max(rates)) == 10 * warm
