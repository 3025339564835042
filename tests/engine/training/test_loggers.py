"""What loggers are given, how they fail, and that nothing is logged but where rows are written."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pspg.engine.cli import main, make_parser, parse
from pspg.engine.distributed.world import World, start
from pspg.engine.training import loggers
from pspg.engine.training.config import OptimConfig, ProfileConfig, TrainConfig, check_train
from pspg.engine.training.examples import panel
from pspg.engine.training.fingerprint import flat_settings
from pspg.engine.training.loggers import LOGGERS, Logger, RunStart
from pspg.engine.training.trainer import Trainer
from pspg.engine.utils.errors import UserError
from pspg.engine.utils.metrics_log import read_metrics
from pspg.engine.utils.registry import choices
from tests.engine.training.test_trainer import BATCH, STEPS, ToyLoader, ToyTask

LINES: list[tuple[str, Any]] = []
"""what the test's own loggers were given"""


@LOGGERS.register
class Listening(Logger):
    name = "listening"
    package = "json"

    def __init__(self, start: RunStart) -> None:
        LINES.append(("start", start))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        LINES.append(("scalars", (step, dict(values))))

    def picture(self, name: str, pixels: Any, step: int) -> None:
        LINES.append(("picture", (name, pixels.shape, step)))

    def close(self, *, failed: bool) -> None:
        LINES.append(("close", failed))


@LOGGERS.register
class Failing(Listening):
    name = "failing"
    remote = True

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        LINES.append(("failing", step))
        raise ConnectionError("server is gone\nfor good")


@LOGGERS.register
class Refusing(Failing):
    name = "refusing"

    def __init__(self, start: RunStart) -> None:
        raise RuntimeError("no key")


@pytest.fixture
def world() -> World:
    LINES.clear()
    return start("cpu")


def toy(
    folder: Path, world: World, *, stop_at: tuple[int, int] | None = None, zero: Any = 0, **settings: Any
) -> Trainer:
    optim = OptimConfig(name="adamw", lr=1e-2, epochs=1, warmup_epochs=0, clip_norm=settings.pop("clip_norm", 0.0))
    settings = {"log_every": 2, "logger": "listening", **settings}
    config = TrainConfig(output=str(folder), optim=optim, batch_size=BATCH, zero_stage=zero, **settings)
    return Trainer(config, ToyTask(), ToyLoader(stop_at=stop_at), world, {})


def test_loggers_get_the_rows_of_metrics_jsonl(tmp_path: Path, world: World) -> None:
    toy(tmp_path, world).fit()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    given = [value for kind, value in LINES if kind == "scalars"]
    assert [step for step, _ in given] == [row["step"] for row in rows] == [2, 4, 6, 6]
    assert {"lr", "loss", "target", "gradient_norm", "images_per_s", "loader_wait", "epoch"} == given[0][1].keys()
    assert {"val_score", "peak_bytes", "epoch"} == given[-1][1].keys()
    first = LINES[0][1]
    assert (first.step, first.settings["optim.lr"], first.settings["data.val"]) == (0, 1e-2, "null")
    assert LINES[-1] == ("close", False)


def test_an_interrupted_run_is_said_to_have_failed(tmp_path: Path, world: World) -> None:
    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path, world, stop_at=(0, 3)).fit()
    assert LINES[-1] == ("close", True)


@pytest.mark.parametrize("clip_norm", [0.0, 1e-3])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_the_gradient_norm_is_that_of_the_step_before_clipping(
    tmp_path: Path, world: World, zero: int, clip_norm: float
) -> None:
    toy(tmp_path, world, zero=zero, log_every=1, clip_norm=clip_norm).fit()
    own = ToyTask()
    (batch,) = [batch for number, batch in enumerate(ToyLoader().batches(0)) if number == 0]
    loss, _ = own.loss(own.module(batch), batch)
    loss.backward()
    expected = torch.stack([p.grad.norm() for p in own.module.parameters()]).norm().item()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["gradient_norm"] == pytest.approx(expected, rel=1e-5)


def test_tensorboard_has_scalars_settings_and_pictures(tmp_path: Path, world: World) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = toy(tmp_path, world, logger=["tensorboard", "tensorboard"])
    trainer.task.picture = lambda: np.zeros((4, 6, 3), np.uint8)
    trainer.fit()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "lr", "gradient_norm", "images_per_s", "val_score", "peak_bytes"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6]
    assert tags["images"] == ["examples"]
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert b"optim.lr" in events.summary_metadata["_hparams_/session_start_info"].plugin_data.content


def test_a_remote_logger_that_fails_is_left_out_and_the_run_goes_on(
    tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pspg")
    result = toy(tmp_path, world, logger=["failing", "listening"]).fit()
    assert result["step"] == STEPS
    assert [line for line in LINES if line[0] == "failing"] == [("failing", 2)]
    assert len([line for line in LINES if line[0] == "scalars"]) == 4
    told = [record.getMessage() for record in caplog.records if "logger" in record.getMessage()]
    assert told == ["logger: failing no longer logs this run: server is gone"]


def test_a_logger_that_cannot_start_ends_the_run_before_it_trains(tmp_path: Path, world: World) -> None:
    with pytest.raises(UserError, match=r"^logger: refusing does not start: no key; set it up, or leave it out$"):
        toy(tmp_path, world, logger="refusing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--logger", "wandb"], "logger: wandb needs the package wandb; pip install 'pspg-engine[wandb]'"),
        (["--logger", "[tensorboard, mlflow]"], "logger: mlflow needs the package mlflow;"),
        (["--logger", "wandbb"], "logger: 'wandbb' is not one of "),
        (["--logger", "[wandbb]"], "logger: 'wandbb' is not one of "),
        (["--profile.steps", "-1"], "profile.steps: must be >= 0, got -1"),
        (["--log_images", "4"], "log_images: shows validation images; name data.val, or set it to 0"),
        (["--log_images", "4", "--data.val", "b", "--task", "contrastive"], "log_images: shows labels and scores"),
    ],
)
def test_what_cannot_log_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(
        "pspg.engine.training.config.find_spec",
        lambda name: None if name in ("wandb", "mlflow") else find_spec(name),
    )
    assert main(["train", "--data.train", "a.jsonl", "--model.pretrained", "random", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_every_logger_on_the_list_is_accepted_once_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pspg.engine.training.config.find_spec", lambda name: name)
    config = TrainConfig(logger=["tensorboard", "wandb", "mlflow"])
    config.data.train = "a.jsonl"
    check_train(config)


def test_a_registered_logger_is_a_value_of_the_setting() -> None:
    make_parser.cache_clear()
    assert parse(["train", "--logger", "[listening, tensorboard]"])[1].logger == ["listening", "tensorboard"]
    make_parser.cache_clear()


def test_every_file_is_a_logger_of_its_name() -> None:
    found = [LOGGERS[name] for name in ("mlflow", "tensorboard", "wandb")]
    assert tuple(logger.name for logger in found) == choices(Path(loggers.__file__).parent)
    assert [logger.remote for logger in found] == [True, False, True]


def test_settings_are_flat_and_without_folders() -> None:
    config = TrainConfig(output="/home/somebody/runs/a")
    config.data.train, config.data.class_names = "/data/of/somebody/train.jsonl", ["edema", "mass"]
    flat = flat_settings(config)
    assert flat["output"] == "a"
    assert flat["data.train"] == "train.jsonl"
    assert flat["data.class_names"] == "edema, mass"
    assert flat["optim.epochs"] == 50
    assert "somebody" not in json.dumps(flat)


# Services, by stand-ins that note the calls; the real ones below where they are installed.


class Noting:
    """Notes every call of whatever is asked of it."""

    def __init__(self, calls: list[tuple[str, tuple, dict]], **values: Any) -> None:
        self._calls = calls
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls.append((name, args, kwargs))
            return Noting(self._calls, id="abc", url=None, dir="here", experiment_id="7", info=self)

        return call


def test_wandb_is_told_offline_and_goes_on_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, tuple, dict]] = []
    monkeypatch.setitem(sys.modules, "wandb", Noting(calls))  # type: ignore[arg-type]
    monkeypatch.setenv("WANDB_PROJECT", "chest")
    for step in (0, 8):
        logger = LOGGERS["wandb"](RunStart(tmp_path, step, {"optim.lr": 0.1}, ("loss",)))
    logger.scalars({"loss": 2.0}, 9)
    logger.picture("examples", np.zeros((2, 2, 3), np.uint8), 9)
    logger.close(failed=True)
    begun = [kwargs for name, _, kwargs in calls if name == "init"]
    assert [(kw["id"], kw["project"], kw["config"], kw["dir"]) for kw in begun] == [
        (None, "chest", {"optim.lr": 0.1}, str(tmp_path)),
        ("abc", "chest", {"optim.lr": 0.1}, str(tmp_path)),
    ]
    settings = [kwargs for name, _, kwargs in calls if name == "Settings"]
    assert settings[0] == {"console": "off", "save_code": False, "silent": True}
    logged = [args[0] for name, args, _ in calls if name == "log"]
    assert logged[0] == {"loss": 2.0, "step": 9}
    assert calls[-1] == ("finish", (), {"exit_code": 1})


def test_mlflow_is_told_and_goes_on_under_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, tuple, dict]] = []
    client = Noting(calls, create_run=None)
    client.create_run = lambda *args, **kwargs: Noting(calls, info=Noting(calls, run_id="r1"))
    monkeypatch.setitem(sys.modules, "mlflow", Noting(calls))  # type: ignore[arg-type]
    tracking = Noting(calls)
    tracking.MlflowClient = lambda place: calls.append(("client", (place,), {})) or client
    monkeypatch.setitem(sys.modules, "mlflow.tracking", tracking)  # type: ignore[arg-type]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://name:secret@server")
    for step in (0, 8):
        logger = LOGGERS["mlflow"](RunStart(tmp_path, step, {"optim.lr": 0.1}, ("loss",)))
    logger.scalars({"loss": 2.0}, 9)
    logger.close(failed=False)
    assert ("log_param", ("r1", "optim.lr", "0.1"), {}) in calls
    assert ("update_run", ("r1",), {"status": "RUNNING"}) in calls
    assert calls[-2:] == [("log_metric", ("r1", "loss", 2.0), {"step": 9}), ("set_terminated", ("r1", "FINISHED"), {})]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_real_services_work_offline(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip(name, reason=f"the optional package {name} is not installed: pip install '.[{name}]'")
    if name == "mlflow":
        pytest.importorskip("sqlalchemy", reason="MLflow without a server needs sqlalchemy: pip install '.[mlflow]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    trainer = toy(tmp_path / "run", world, logger=name, save_every=2, stop_at=(0, 5))
    trainer.task.picture = lambda: np.zeros((4, 6, 3), np.uint8)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    identity = (tmp_path / "run" / f"{name}.id").read_text()
    trainer = toy(tmp_path / "run", world, logger=name, resume="latest")
    trainer.task.picture = lambda: np.zeros((4, 6, 3), np.uint8)
    trainer.fit()
    assert (tmp_path / "run" / f"{name}.id").read_text() == identity
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    if name == "wandb":
        assert len(list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))) == 2
        return
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    run = client.get_run(identity.strip())
    assert (run.info.status, run.data.params["optim.lr"]) == ("FINISHED", "0.01")
    assert {step.step for step in client.get_metric_history(run.info.run_id, "loss")} == {2, 4, 6}
    assert "gradient_norm" in run.data.metrics


# Traces


def test_a_profile_holds_the_steps_that_were_asked_for(tmp_path: Path, world: World) -> None:
    toy(tmp_path, world, profile=ProfileConfig(start=2, steps=3)).fit()
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "rank0-step2.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event for event in events if event.get("name", "").startswith("Optimizer.step#")]
    assert len(steps) == 3


def test_a_profile_of_a_shorter_run_ends_with_it(tmp_path: Path, world: World) -> None:
    toy(tmp_path / "cut", world, profile=ProfileConfig(start=4, steps=30)).fit()
    assert (tmp_path / "cut/profile/rank0-step4.json.gz").is_file()
    toy(tmp_path / "none", world, profile=ProfileConfig(start=40, steps=3)).fit()
    assert not (tmp_path / "none/profile").exists()


# Examples


def test_a_panel_has_an_image_a_column() -> None:
    images = [np.full((32, 32), 40 * number, np.uint8) for number in range(3)]
    labels, scores = np.array([[1, 0], [0, 0], [-1, 1]]), np.array([[0.9, 0.1], [0.2, 0.3], [0.5, 0.5]])
    found = panel(images, labels, scores, ["a$b", "x" * 80])
    assert found.dtype == np.uint8
    assert found.shape[2] == 3
    assert found.shape[1] > found.shape[0]


def test_phase_2_logs_its_first_validation_images_and_temperature(
    settings: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drawn: list[tuple] = []

    def draw(pixels: Any, labels: Any, scores: Any, names: Any) -> Any:
        drawn.append((len(pixels), labels.shape, scores.shape, len(names)))
        return panel(pixels, labels, scores, names)

    monkeypatch.setattr("pspg.engine.training.tasks.panel", draw)
    extra = ["--optim.epochs", "1", "--log_images", "3", "--output", str(tmp_path / "run"), "--log_every", "3"]
    assert main([*settings("prompt"), *extra]) == 0
    assert drawn == [(3, (3, 20), (3, 20), 20)]
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["examples"]
    assert {"temperature", "gradient_norm", "val_macro_auc"} <= set(events.Tags()["scalars"])
