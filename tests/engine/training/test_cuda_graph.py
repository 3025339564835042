"""A recorded step trains as the ordinary one. Without a GPU the recording is a function that runs again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pspg.engine.config import LossConfig, ModelConfig
from pspg.engine.data import batch as batch_module
from pspg.engine.data.batch import Batch
from pspg.engine.data.images import normalize
from pspg.engine.distributed.world import start
from pspg.engine.models.clip import tokenize
from pspg.engine.models.features import FeatureBatch
from pspg.engine.models.pspg import PsPG
from pspg.engine.training import cuda_graph
from pspg.engine.training.config import OptimConfig, TrainConfig, check_train
from pspg.engine.training.cuda_graph import WARM_UP, Outcome, StepGraph
from pspg.engine.training.images_ahead import ImagesAhead, with_next
from pspg.engine.training.losses import PromptLoss
from pspg.engine.training.tasks import ContrastiveTask, PromptTask
from pspg.engine.training.trainer import Trainer
from pspg.engine.utils.errors import UserError
from pspg.engine.utils.metrics_log import read_metrics
from tests.engine import recorder
from tests.engine.recorder import Pools

SPCL = LossConfig(pair="spcl")
replays: list[int] = []


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the engine says, whether or not a test before has set up its messages."""
    caplog.set_level("INFO", "pspg")
    return caplog


class Loader:
    """Eight batches of three images; the last but one has two. With a model they bring its features instead.

    Batch `killed_at`, counted over all epochs, ends the run.
    """

    def __init__(self, classes: int, model: PsPG | None = None, killed_at: int | None = None) -> None:
        self._killed_at = killed_at
        self.batches_per_epoch, self.bad, self._classes, self._model = 8, {}, classes, model

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        for number in range(start_batch, self.batches_per_epoch):
            generator = torch.Generator().manual_seed(100 * epoch + number)
            if self.batches_per_epoch * epoch + number == self._killed_at:
                raise KeyboardInterrupt
            count = 2 if number == 6 else 3
            pixels = torch.randint(0, 256, (count, 32, 32), dtype=torch.uint8, generator=generator)
            labels = torch.randint(-1, 2, (count, self._classes), generator=generator).float()
            ids, index = ["a", "b", "c"][:count], torch.arange(count)
            batch = Batch(ids, index, pixels, labels, None, mean=0.5, std=0.25)
            if self._model is None:
                yield batch
            else:
                yield FeatureBatch(ids, self._model.image_features(batch.images), labels, index)


class Reports(Loader):
    """The same with texts of two to forty words instead of labels."""

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        for number, batch in enumerate(super().batches(epoch, start_batch)):
            words = [2 + (7 * number + 13 * image) % 39 for image in range(len(batch))]
            yield replace(batch, labels=None, tokens=tokenize(["lung " * count for count in words]))


def record_by_hand(function: Callable[[], Outcome]) -> tuple[Callable[[], None], Outcome]:
    replay, outcome = recorder.record_by_hand(function)

    def counted() -> None:
        replays.append(1)
        replay()

    return counted, outcome


def fail(function: Callable[[], Outcome]) -> tuple[Callable[[], None], Outcome]:
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


def stuck(function: Callable[[], Outcome]) -> tuple[Callable[[], None], Outcome]:
    """A recording that repeats what it saw of its own inputs, at the seed that it is checked with."""
    torch.manual_seed(0)
    return lambda: None, function()


def run(
    make_clip: Callable[..., Any],
    names: list[str],
    folder: Path,
    record: Any,
    loss: LossConfig = SPCL,
    *,
    cached: bool = False,
    ahead: bool = False,
    epochs: int = 1,
    killed_at: int | None = None,
    resume: Any = None,
    **settings: Any,
) -> list[Tensor]:
    small = ModelConfig(prompt_length=3, hidden_size=8, decoder_heads=2, **settings)
    world = start("cpu")
    torch.manual_seed(0)
    model = PsPG(make_clip().float(), small, names).freeze()
    task = PromptTask(model, PromptLoss(loss), world, None, bank=None, precision="fp32")
    optim = OptimConfig(epochs=epochs, warmup_epochs=0, accumulate=2, lr=1e-2)
    config = TrainConfig(output=str(folder), batch_size=3, log_every=1, save_every=1, resume=resume, optim=optim)
    trainer = Trainer(config, task, Loader(len(names), model if cached else None, killed_at), world, {})
    if record is not None and ahead:
        trainer.ahead = ImagesAhead(task, world.device, record)
    elif record is not None:
        trainer.graph = StepGraph(task, world.device, record)
    trainer.fit()
    return [parameter.detach().clone() for parameter in task.module.parameters()]


@pytest.mark.parametrize(
    ("pair", "settings"),
    [
        ("spcl", {}),
        ("spcl", {"cached": True}),
        ("spcl", {"ahead": True}),
        ("ranking", {}),
        ("ranking", {"decoder": "context", "fusion": "regions"}),
    ],
    ids=["spcl", "cached", "ahead", "ranking", "dualcoop"],
)
def test_trains_as_the_ordinary_step(
    make_clip: Callable[..., Any], names: list[str], tmp_path: Path, pair: Any, settings: dict[str, Any]
) -> None:
    """Dropout, accumulation, a batch of another size in between: bit for bit the same weights and logs."""
    replays.clear()
    ordinary = run(make_clip, names, tmp_path / "ordinary", None, LossConfig(pair=pair), **settings)
    recorded = run(make_clip, names, tmp_path / "recorded", record_by_hand, LossConfig(pair=pair), **settings)
    assert len(replays) == 8 - WARM_UP - 1 + 1  # the recording's check is one more
    assert all(torch.equal(one, other) for one, other in zip(ordinary, recorded, strict=True))

    def losses(name: str) -> list[tuple[Any, ...]]:
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        return [(row["loss"], row["classification"], row["pair"]) for row in rows if "loss" in row]

    assert losses("ordinary") == losses("recorded")
    assert len(losses("ordinary")) == 4


def test_goes_on_without_where_recording_fails(
    make_clip: Callable[..., Any], names: list[str], tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    ordinary = run(make_clip, names, tmp_path / "ordinary", None)
    failed = run(make_clip, names, tmp_path / "failed", fail)
    assert all(torch.equal(one, other) for one, other in zip(ordinary, failed, strict=True))
    (line,) = [line for line in said.messages if "cannot be recorded as a CUDA graph" in line]
    assert line.endswith("stream is capturing")


def test_goes_on_without_where_the_replay_differs(
    make_clip: Callable[..., Any], names: list[str], tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    ordinary = run(make_clip, names, tmp_path / "ordinary", None)
    wrong = run(make_clip, names, tmp_path / "wrong", stuck)
    assert all(torch.equal(one, other) for one, other in zip(ordinary, wrong, strict=True))
    assert sum("its replay differs from the step" in line for line in said.messages) == 1


def test_sampled_pairs_are_an_input_of_the_recording(make_clip: Callable[..., Any], tmp_path: Path) -> None:
    """The same pairs are drawn, and those of weight 0 that fill them up change roundings only."""
    names = [f"finding {number}" for number in range(12)]
    loss = LossConfig(pair="spcl", pair_samples=1)
    replays.clear()
    ordinary = run(make_clip, names, tmp_path / "ordinary", None, loss)
    recorded = run(make_clip, names, tmp_path / "recorded", record_by_hand, loss)
    whole = run(make_clip, names, tmp_path / "whole", None)
    assert len(replays) >= 8 - WARM_UP - 1 + 1
    one, other, unlike = (torch.cat([tensor.flatten() for tensor in found]) for found in (ordinary, recorded, whole))
    assert (one - other).norm() <= 1e-4 * (one - unlike).norm()


def test_phase_1_trains_as_the_ordinary_step(
    make_clip: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reports of other lengths at every step, and batch norm, whose statistics count each batch once."""
    monkeypatch.setattr(batch_module, "normalize", lambda *arguments: normalize(*arguments).double())
    found = []
    for record in (None, record_by_hand):
        replays.clear()
        clip = make_clip().train().requires_grad_()
        task = ContrastiveTask(clip, start("cpu"), None, "fp32")
        optim = OptimConfig(epochs=1, warmup_epochs=0, lr=1e-3)
        config = TrainConfig(task="contrastive", output=str(tmp_path / str(record)), batch_size=3, optim=optim)
        trainer = Trainer(config, task, Reports(0), start("cpu"), {})
        if record is not None:
            trainer.graph = StepGraph(task, torch.device("cpu"), record)
        trainer.fit()
        found.append(task.module.state_dict())
    assert len(replays) >= 8 - WARM_UP - 1 + 1
    assert found[0]["clip.visual.bn1.num_batches_tracked"] == 8
    for name, one in found[0].items():
        torch.testing.assert_close(one, found[1][name], rtol=1e-9, atol=1e-9)


def test_every_batch_is_trained_once_and_in_order() -> None:
    """Whether or not the one that follows is looked at before; nothing of an epoch is left over for the next."""
    for count in range(4):
        assert list(with_next(range(1, count + 1), ahead=False)) == [(k, None) for k in range(1, count + 1)]
        following = [*range(2, count + 1), None][:count]
        assert list(with_next(range(1, count + 1), ahead=True)) == list(
            zip(range(1, count + 1), following, strict=True)
        )


def test_images_ahead_of_epochs_and_of_an_interrupted_run(
    make_clip: Callable[..., Any], names: list[str], tmp_path: Path
) -> None:
    """Three epochs in two pieces, the second broken off while a batch was encoded that no step had trained."""
    expected = run(make_clip, names, tmp_path / "ordinary", None, epochs=3)
    settings: dict[str, Any] = {"ahead": True, "epochs": 3}
    with pytest.raises(KeyboardInterrupt):
        run(make_clip, names, tmp_path / "ahead", record_by_hand, killed_at=13, **settings)
    found = run(make_clip, names, tmp_path / "ahead", record_by_hand, resume="latest", **settings)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_images_ahead_are_encoded_once(
    make_clip: Callable[..., Any], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the recording on, a replay encodes the next batch; only one whose features are missing is encoded before."""
    model = PsPG(make_clip().float(), ModelConfig(prompt_length=3, hidden_size=8, decoder_heads=2), names).freeze()
    task = PromptTask(model, PromptLoss(SPCL), start("cpu"), None, bank=None, precision="fp32")
    ahead, batches = ImagesAhead(task, torch.device("cpu"), record_by_hand), list(Loader(len(names)).batches(0))[:6]
    for batch in batches[:WARM_UP]:
        assert ahead(batch, None) is None
    assert ahead(batches[3], batches[4]) is not None
    seen, features = [], task.features

    def watched(batch: Any) -> Any:
        if isinstance(batch, Batch):
            seen.append("before" if any(batch is known for known in batches) else "replay")
        return features(batch)

    monkeypatch.setattr(task, "features", watched)
    assert ahead(batches[4], None) is not None
    assert ahead(batches[5], None) is not None
    assert seen == ["replay", "before", "replay"]


def test_a_larger_batch_is_recorded_in_place_of_a_smaller_one(make_clip: Callable[..., Any], names: list[str]) -> None:
    """Recorded with the two images of a batch that has lost one; the whole ones that follow are replayed, too."""
    model = PsPG(make_clip().float(), ModelConfig(prompt_length=3, hidden_size=8, decoder_heads=2), names).freeze()
    task = PromptTask(model, PromptLoss(LossConfig()), start("cpu"), None, bank=None, precision="fp32")
    recordings: list[int] = []

    def record(function: Callable[[], Outcome]) -> tuple[Callable[[], None], Outcome]:
        recordings.append(1)
        return record_by_hand(function)

    graph = StepGraph(task, torch.device("cpu"), record)
    batches = list(Loader(len(names)).batches(0))
    whole, small = batches[0], batches[6]
    found = [graph(batch) is not None for batch in [whole] * WARM_UP + [small, whole, small, whole]]
    assert found == [False] * WARM_UP + [True, True, False, True]
    assert len(recordings) == 2


def test_recordings_and_ordinary_steps_share_the_memory(
    make_clip: Callable[..., Any], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a model of torch's allocator: reserved is what one step takes, and hardly more."""
    model = PsPG(make_clip().float(), ModelConfig(prompt_length=3, hidden_size=8, decoder_heads=2), names).freeze()
    task = PromptTask(model, PromptLoss(SPCL), start("cpu"), None, bank=None, precision="fp32")
    batches = list(Loader(len(names)).batches(0))
    whole, small = batches[0], batches[6]

    def ordinary(batch: Batch) -> None:
        task.outcome(batch, task.tensors(batch) or {}, reduce=False)

    def reserved(sequence: list[Batch], giving: bool = True) -> Pools:
        with Pools() as pools:
            monkeypatch.setattr(cuda_graph, "give_back", pools.give_back if giving else lambda device: None)
            graph = StepGraph(task, torch.device("cpu"), pools.record)
            for batch in sequence:
                if graph(batch) is None:
                    ordinary(batch)
            graph.close()
        assert graph.refusal is None
        return pools

    with Pools() as alone:
        ordinary(whole)
    # Two outcomes are compared, and the images of a batch are there twice.
    kept = sum(weight.nbytes for weight in task.module.parameters()) + whole.images.nbytes
    # Recorded twice, the second in place of the first.
    sequence = [small] * (WARM_UP + 1) + [whole] * 3
    pools = reserved(sequence)
    assert len(pools.live) == 3
    assert pools.peak <= alone.peak + kept
    assert reserved(sequence, giving=False).peak > 2 * alone.peak
    # A smaller batch takes an ordinary step beside the recording; the next replay gives back what that left.
    before, behind = (
        sum(reserved([whole] * (WARM_UP + 1) + more).reserved.values()) for more in ([small], [small, whole])
    )
    assert before > 2 * alone.peak
    assert behind <= alone.peak + kept


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"zero_stage": 1}, "zero_stage"),
        ({"precision": "fp16"}, "precision"),
        ({"device": "cpu"}, "GPU"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], named: str) -> None:
    config = TrainConfig(cuda_graphs="on", **settings)
    config.data.train = "train.jsonl"
    with pytest.raises(UserError, match=f"cuda_graphs: needs .*{named}"):
        check_train(config)
    check_train(replace(config, cuda_graphs="auto"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_records_a_step_on_a_gpu(make_clip: Callable[..., Any], names: list[str]) -> None:
    """Replays give what ordinary steps give, at the same seeds, for batches the recording has not seen."""
    world = start("cuda")
    small = ModelConfig(prompt_length=3, hidden_size=32, decoder_heads=2)
    model = PsPG(make_clip().float(), small, names).to(world.device).train().freeze(torch.bfloat16)
    task = PromptTask(model, PromptLoss(LossConfig()), world, None, bank=None, precision="bf16")
    graph = StepGraph(task, world.device)
    replayed = 0
    for number, batch in enumerate(Loader(len(names)).batches(0)):
        torch.manual_seed(number)
        found = graph(batch)
        torch.manual_seed(number)
        loss, parts = task.step(batch, task.tensors(batch.to(world.device)) or {})
        parameters = list(task.module.parameters())
        expected = torch.autograd.grad(loss, parameters, allow_unused=True)
        if found is None:
            continue
        replayed += 1
        torch.testing.assert_close(found[0], loss)
        for got, other in zip(found[2], expected, strict=True):
            assert (got is None) == (other is None)
            if got is not None:
                torch.testing.assert_close(got, other, rtol=1e-2, atol=1e-4)
        assert parts.keys() == found[1].keys()
    assert replayed == 8 - WARM_UP - 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recording_does_not_double_the_memory_of_a_gpu(make_clip: Callable[..., Any], names: list[str]) -> None:
    """What torch reserves at most with ordinary steps, and with these, recordings and replays."""
    world = start("cuda")
    model = PsPG(make_clip().float(), ModelConfig(prompt_length=3, hidden_size=32, decoder_heads=2), names)
    task = PromptTask(
        model.to(world.device).train().freeze(torch.bfloat16),
        PromptLoss(SPCL),
        world,
        None,
        bank=None,
        precision="bf16",
    )
    # Enough images that the step, not a library's workspace, is what takes the memory.
    batch = next(Loader(len(names)).batches(0))
    batch = replace(
        batch,
        ids=batch.ids * 200,
        index=torch.arange(600),
        pixels=batch.pixels.repeat(200, 1, 1, 1),
        labels=None if batch.labels is None else batch.labels.repeat(200, 1),
    )
    most = []
    for steps in (WARM_UP, WARM_UP + 3):
        graph = StepGraph(task, world.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            if graph(batch) is None:
                task.outcome(batch, task.tensors(batch.to(world.device)) or {}, reduce=False)
        most.append(torch.cuda.max_memory_reserved())
        assert graph.refusal is None
        graph.close()
    assert most[1] < 1.5 * most[0]
