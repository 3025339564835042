"""Runs whose middle epoch is best: which weights are validated, kept, published, exported and scored with.

Training, checkpoints and readers are the real ones; only the value of the validation metric is scripted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from pspg.engine.checkpoints.model_folder import describe, load_model, weights_of, write_model
from pspg.engine.checkpoints.run import best_checkpoint, last_checkpoint, load_tensors, read_json
from pspg.engine.commands.convert import export_checkpoint
from pspg.engine.commands.predict import predict
from pspg.engine.commands.settings import ExportConfig, PredictConfig
from pspg.engine.config import LossConfig, ModelConfig
from pspg.engine.data.batch import Batch
from pspg.engine.data.pixels import Pixels
from pspg.engine.distributed.world import start
from pspg.engine.evaluation.choose import check_source, open_source
from pspg.engine.evaluation.config import EvaluateConfig
from pspg.engine.models.clip import tokenize
from pspg.engine.models.pspg import PsPG
from pspg.engine.training.config import OptimConfig, TrainConfig
from pspg.engine.training.losses import PromptLoss
from pspg.engine.training.tasks import ContrastiveTask, PromptTask
from pspg.engine.training.trainer import Trainer

State = dict[str, Tensor]
PIXELS = Pixels(size=32, resize="stretch", mean=0.4, std=0.2)
BEST, LAST = 2, 3
"""optimizer steps, one an epoch"""


class Script:
    """Stands before a task's `validate`: keeps the weights that come, and gives them the next scripted value."""

    def __init__(self, task: Any, key: str, values: list[float]) -> None:
        self.states: list[State] = []
        self._key, self._values = key, values
        task.validate = self

    def __call__(self, module: nn.Module) -> dict[str, float]:
        state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        # DeepSpeed holds scalars as vectors of one element.
        self.states.append({n: t.view(()) if n.endswith("logit_scale") else t for n, t in state.items()})
        return {self._key: self._values[len(self.states) - 1]}


class Loader:
    """One batch an epoch."""

    batches_per_epoch = 1

    def __init__(self, names: list[str]) -> None:
        self.bad: dict[str, str] = {}
        self._names = names

    def batch(self) -> Batch:
        noise = torch.Generator().manual_seed(7)
        count = len(self._names)
        return Batch(
            ids=list("abcdefgh"[:count]),
            index=torch.arange(count),
            pixels=torch.randint(0, 256, (count, 32, 32), generator=noise, dtype=torch.uint8),
            labels=torch.eye(count),
            tokens=tokenize(self._names, 77),
            mean=PIXELS.mean,
            std=PIXELS.std,
        )

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        yield from [self.batch()][start_batch:]


def fit(run: Path, task: Any, loader: Loader, ema_decay: float) -> dict[str, Any]:
    optim = OptimConfig(name="adamw", lr=1e-2, epochs=LAST, warmup_epochs=0, ema_decay=ema_decay)
    config = TrainConfig(output=str(run), optim=optim, batch_size=len(loader.batch()), device="cpu")
    return Trainer(config, task, loader, start("cpu"), {}).fit()


def same(found: State, expected: State) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def check_run(run: Path, result: dict[str, Any], states: list[State], score: float, averaged: bool) -> None:
    """The run's own account, the checkpoints it keeps, and the file that its readers take."""
    assert len(states) == LAST
    assert not same(states[0], states[1])
    assert not same(states[1], states[2])
    state = read_json(run / "checkpoints" / f"step-{LAST:08d}" / "state.json")
    for account in (result, state):
        assert (account["best_step"], account["best_score"], account["step"]) == (BEST, score, LAST)
    kept = sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
    assert kept == [f"step-{BEST:08d}", f"step-{LAST:08d}"]
    best = run / "checkpoints" / kept[0]
    assert best_checkpoint(run) == best
    assert last_checkpoint(run) == best.with_name(kept[1])
    assert weights_of(run) == best / ("ema.safetensors" if averaged else "model.safetensors")
    assert same(load_tensors(weights_of(run)), states[1])
    assert same(load_tensors(best / "model.safetensors"), states[1]) != averaged


def probabilities(folder: Path, names: list[str], batch: Batch) -> list[Any]:
    """Probabilities of a batch, as `evaluate` scores it."""
    config = EvaluateConfig(checkpoint=str(folder))
    source: Any = open_source(check_source(config), config, torch.device("cpu"), None)
    assert source.settings["checkpoint"] == str(weights_of(folder))
    (scores,) = source.score([names], [batch])
    return scores.probabilities.tolist()


@pytest.mark.parametrize(("ema_decay", "last_loss"), [(0.0, 3.0), (0.5, 1.0)])
def test_contrastive_publishes_the_first_epoch_of_the_smallest_loss(
    make_clip: Callable[..., Any], names: list[str], tmp_path: Path, ema_decay: float, last_loss: float
) -> None:
    run, loader, clip = tmp_path / "run", Loader(names), make_clip().float()
    description = describe("clip", clip, PIXELS, training="noise")
    write_model(run, description, {})
    task = ContrastiveTask(clip, start("cpu"), None, "fp32")
    states = Script(task, "val_loss", [2.0, 1.0, last_loss]).states
    result = fit(run, task, loader, ema_decay)
    check_run(run, result, states, -1.0, ema_decay > 0)

    expected = {name.removeprefix("clip."): tensor for name, tensor in states[1].items()}
    export_checkpoint(ExportConfig(checkpoint=str(run), output=str(tmp_path / "exported")))
    assert same(load_tensors(tmp_path / "exported" / "model.safetensors"), expected)
    write_model(tmp_path / "expected", description, {"model": expected})
    found = probabilities(run, names, loader.batch())
    assert found == probabilities(tmp_path / "expected", names, loader.batch())


@pytest.mark.parametrize(("patience", "epochs"), [(0, 5), (1, 3), (2, 4), (3, 5)])
def test_training_ends_after_epochs_without_a_better_one(
    make_clip: Callable[..., Any],
    names: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    patience: int,
    epochs: int,
) -> None:
    """The second of five epochs is best; a run that ended so stays ended when it is resumed."""
    caplog.set_level("INFO", "pspg")
    run, loader = tmp_path / "run", Loader(names)
    optim = OptimConfig(name="adamw", epochs=5, warmup_epochs=0, patience=patience)
    config = TrainConfig(output=str(run), optim=optim, batch_size=len(loader.batch()), device="cpu")

    def trained(resume: Literal["latest"] | None) -> tuple[int, int, int]:
        clip = make_clip().float()
        write_model(run, describe("clip", clip, PIXELS, training="noise"), {})
        task = ContrastiveTask(clip, start("cpu"), None, "fp32")
        states = Script(task, "val_loss", [2.0, 1.0, 1.5, 1.0, 3.0]).states
        result = Trainer(replace(config, resume=resume), task, loader, start("cpu"), {}).fit()
        return len(states), result["step"], result["best_step"]

    assert trained(None) == (epochs, epochs, 2)
    assert ("no better epoch for" in caplog.text) == (epochs < 5)
    assert trained("latest") == (0, epochs, 2)


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_prompt_publishes_the_epoch_of_the_largest_macro_auc(
    make_clip: Callable[..., Any], names: list[str], image_folder: Path, tmp_path: Path, ema_decay: float
) -> None:
    run, loader, clip = tmp_path / "run", Loader(names), make_clip().float()
    config = ModelConfig(prompt_length=3, hidden_size=8, decoder_heads=2)
    model = PsPG(clip, config, names).freeze(None)
    tensors: dict[str, State] = {
        "clip": dict(clip.state_dict()),
        "bank": {"bank": torch.randn(6, 24, generator=torch.Generator().manual_seed(1))},
    }
    description = describe("pspg", clip, PIXELS, head=config, class_names=names, training="noise")
    write_model(run, description, tensors)
    task = PromptTask(model, PromptLoss(LossConfig()), start("cpu"), None, bank=None, precision="fp32")
    states = Script(task, "val_macro_auc", [0.6, 0.8, 0.7]).states
    result = fit(run, task, loader, ema_decay)
    check_run(run, result, states, 0.8, ema_decay > 0)

    expected = tmp_path / "expected"
    write_model(expected, description, {**tensors, "model": states[1]})
    export_checkpoint(ExportConfig(checkpoint=str(run), output=str(tmp_path / "exported")))
    assert same(load_tensors(tmp_path / "exported" / "model.safetensors"), states[1])
    assert same(dict(load_model(run).model.head.state_dict()), states[1])
    found = probabilities(run, names, loader.batch())
    assert found == probabilities(expected, names, loader.batch())

    def predicted(folder: Path) -> list[Any]:
        table = str(tmp_path / "scores.csv")
        settings = PredictConfig(
            checkpoint=str(folder), input=str(image_folder), output=table, overwrite=True, workers=0, device="cpu"
        )
        return predict(settings).probabilities.tolist()

    assert predicted(run) == predicted(expected)
