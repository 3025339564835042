"""The DALI loader: the torch loader's samples, order, augmentation and errors; pixels within a rounding of it."""

import os
import random
import signal
import threading
import weakref
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")

from nvidia.dali import Pipeline, fn

from pspg.engine.cli import main
from pspg.engine.data.cache.build import build_cache
from pspg.engine.data.loaders import dali_input, dali_loader
from pspg.engine.data.loaders.choose import load_with, pick_loader, pixel_source
from pspg.engine.data.loaders.dali_input import steps_of
from pspg.engine.data.loaders.dali_loader import dali_batches, graph
from pspg.engine.data.loaders.torch_loader import TorchBatches
from pspg.engine.data.loaders.training import make_train_loader
from pspg.engine.utils.errors import UserError
from tests.engine.data.loaders.films import (
    CPU,
    DALI,
    SIDE,
    N,
    assert_close,
    assert_same,
    difference,
    evaluation,
    film_files,
    make,
    train,
)


@pytest.fixture
def samples(tmp_path):
    return film_files(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"augment": False, "flip": 0.0},
        {"augment": False, "flip": 0.5},
        {"augment": False, "flip": 0.0, "resize": "pad"},
        {},
        {"resize": "pad"},
    ],
)
def test_batches_of_the_torch_loader(samples, settings):
    ours, theirs = train(samples, **settings), train(samples, TorchBatches, **settings)
    for epoch in (0, 1):
        assert_close(ours.batches(epoch), theirs.batches(epoch))
    assert_close(evaluation(samples, **settings), evaluation(samples, TorchBatches, **settings))


def cached(tmp_path, samples):
    names = [sample.path.name for sample in samples]
    build_cache(tmp_path / "cache", samples, names, size=SIDE, resize="stretch", on_bad_image="skip")
    return tmp_path / "cache"


def test_from_the_cache(tmp_path, samples):
    samples[2].path.write_bytes(b"")
    cache = cached(tmp_path, samples)
    settings = {"cache": cache, "on_bad_image": "skip"}
    assert_same(evaluation(samples, **settings), evaluation(samples, TorchBatches, **settings))
    assert_close(train(samples, **settings).batches(0), train(samples, TorchBatches, **settings).batches(0))
    with pytest.raises(UserError, match=r"the file is empty \(sample 's2'\)"):
        list(evaluation(samples, cache=cache, flip=0.5))


def test_ranks_share_exact_epochs(samples):
    (whole,) = (list(train(samples).batches(1)),)
    split = [list(train(samples, sampling={"rank": rank, "world_size": 2}).batches(1)) for rank in range(2)]
    assert len(whole) == len(split[0]) == 3
    assert len({i for batch in whole for i in batch.ids}) == 12
    for batch, *parts in zip(whole, *split, strict=True):
        assert batch.ids == [i for part in parts for i in part.ids]
        assert torch.equal(batch.pixels, torch.cat([part.pixels for part in parts]))


def test_an_epoch_starts_anywhere(samples):
    loader, whole = train(samples), list(train(samples).batches(7))
    for started in range(len(whole) + 1):
        assert_same(loader.batches(7, start_batch=started), whole[started:])
    left = loader.batches(2)
    next(left)
    left.close()
    assert_same(loader.batches(7), whole)


def test_evaluation_in_order_with_a_partial_last_batch(samples):
    loader = evaluation(samples, batch_size=5)
    for _ in range(2):
        batches = list(loader)
        assert [len(batch) for batch in batches] == [5, 5, 3]
        assert torch.cat([batch.index for batch in batches]).tolist() == list(range(N))


@pytest.mark.slow
def test_workers_change_nothing(samples):
    assert_same(train(samples).batches(0), train(samples, workers=2).batches(0))


def kill(texts):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_worker_is_one_line(samples):
    dataset = make(samples)
    dataset.tokenize = kill
    with pytest.raises(UserError, match="loader process was killed"):
        next(make_train_loader(dataset, batch_size=2, workers=1, load=DALI).batches(0))


def test_global_generators_are_left_alone(samples):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    list(train(samples).batches(0))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


@pytest.mark.parametrize("end", [None, "break", ValueError, KeyboardInterrupt, UserError])
def test_nothing_is_left_running(samples, monkeypatch, end):
    pipelines, make_pipeline = [], dali_loader._Runner.make_pipeline

    def remember(*arguments):
        pipelines.append(weakref.ref(pipeline := make_pipeline(*arguments)))
        return pipeline

    monkeypatch.setattr(dali_loader._Runner, "make_pipeline", remember)
    if end is UserError:
        samples[list(train(samples).batches(0))[2].index[0]].path.unlink()
    threads = []

    class Recorded(threading.Thread):
        def start(self):
            threads.append(self)
            super().start()

    monkeypatch.setattr(threading, "Thread", Recorded)
    batches, kept = train(samples, sampling={"batch_size": 1}).batches(0), None
    try:
        for _ in batches:
            if end == "break":
                break
            if end in (ValueError, KeyboardInterrupt):
                raise end
    except BaseException as error:
        kept = error
    assert type(kept) is (type(None) if end in (None, "break") else end)
    batches.close()
    (ahead,) = [thread for thread in threads if thread.name == "prefetch"]
    assert not ahead.is_alive()
    assert pipelines
    assert not any(pipeline() for pipeline in pipelines)


def test_a_bug_in_preparation_keeps_its_traceback(samples, monkeypatch):
    def fail(plans, side):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(dali_input, "steps_of", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(train(samples).batches(0))


def test_which_loader(monkeypatch):
    cuda = torch.device("cuda", 0)
    assert [pick_loader("loader", loader, CPU) for loader in ("auto", "torch", "dali")] == ["torch", "torch", "dali"]
    assert [pick_loader("loader", loader, cuda) for loader in ("auto", "torch", "dali")] == ["dali", "torch", "dali"]
    assert load_with("torch", cuda) is TorchBatches
    monkeypatch.setattr("pspg.engine.data.loaders.choose.find_spec", lambda name: None)
    assert pick_loader("loader", "auto", cuda) == "torch"
    with pytest.raises(UserError, match=r"^data.loader: .*pip install 'pspg-engine\[dali-cuda13\]'"):
        pick_loader("data.loader", "dali", CPU)


@pytest.mark.slow
def test_commands(tmp_path, phantoms, settings, capsys, monkeypatch):
    """A run keeps to its loader; evaluation and prediction take one, too."""
    run, dali = tmp_path / "run", ["--data.loader", "dali", "--optim.epochs", "1"]
    assert main([*settings("prompt"), *dali, "--output", str(run)]) == 0
    assert "loader: dali" in (run / "config.yaml").read_text()
    assert main([*settings("prompt"), "--optim.epochs", "1", "--output", str(run), "--resume", "latest"]) == 2
    assert "data.loader: " in (message := capsys.readouterr().err)
    assert "was made with 'dali', this run asks for 'torch'" in message
    assert main([*settings("prompt"), *dali, "--output", str(run), "--resume", "latest"]) == 0
    seen, dali_batches = [], dali_loader.DaliBatches
    monkeypatch.setattr(dali_loader, "DaliBatches", lambda *a, **k: seen.append(k["device"]) or dali_batches(*a, **k))
    model = ["--checkpoint", str(run), "--device", "cpu", "--workers", "0"]
    films, output = str(phantoms / "test.jsonl"), str(tmp_path / "output")
    assert main(["evaluate", "--manifest", films, "--output", output, *model, "--loader", "dali"]) == 0
    assert main(["predict", "--input", films, "--output", f"{output}.csv", *model, "--loader", "dali"]) == 0
    assert seen == [CPU, CPU]
    # These films have the size of the model's input, so that not even resizing rounds.
    assert main(["predict", "--input", films, "--output", f"{output}.torch.csv", *model]) == 0
    assert (tmp_path / "output.csv").read_bytes() == (tmp_path / "output.torch.csv").read_bytes()


def test_pixels_that_a_run_keeps_to():
    assert {pixel_source("torch", cached=cached, augmented=True) for cached in (True, False)} == {"torch"}
    assert pixel_source("dali", cached=False, augmented=False) == "dali"
    assert pixel_source("dali", cached=True, augmented=True) == "dali, from a cache"
    assert pixel_source("dali", cached=True, augmented=False) == "torch"


@pytest.mark.parametrize("head", ["files", "pixels"])
def test_the_pipeline_for_a_gpu_can_be_written_down(head):
    """Without a GPU only that: operators exist on it and take each other's results."""
    with Pipeline(4, 1, 0):
        names = [head, *steps_of([], SIDE), "flip", "shape", "corner"]
        assert graph({name: fn.external_source(name=name) for name in names}, SIDE, True).device == "gpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{"augment": False, "flip": 0.0}, {}, {"resize": "pad"}])
def test_on_a_gpu(samples, tmp_path, settings):
    """The CPU's pixels, JPEG decoding to one more grey level, from files and from the cache."""
    gpu = partial(dali_batches, device=torch.device("cuda", 0))
    for extra in ({}, {"cache": cached(tmp_path, samples)} if "resize" not in settings else {}):
        settings = settings | extra
        ours, theirs = list(train(samples, gpu, **settings).batches(0)), train(samples, TorchBatches, **settings)
        if settings.get("augment", True) or not extra:
            assert {batch.pixels.device.type for batch in ours} == {"cuda"}
        for a, b in zip(ours, theirs.batches(0), strict=True):
            assert a.ids == b.ids
            off = difference(a.pixels.cpu(), b.pixels)
            assert off.mean() < 0.5
            assert off.quantile(0.995) <= 3
        assert_same([a.to("cpu") for a in ours], [a.to("cpu") for a in train(samples, gpu, **settings).batches(0)])
