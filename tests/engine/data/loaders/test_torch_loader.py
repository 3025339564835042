"""The loader: stateless, equal for every number of workers and ranks, and clear about bad files."""

import os
import pickle
import random
import signal
from itertools import chain

import numpy as np
import pytest
import torch

from pspg.engine.data.loaders.evaluation import make_eval_loader
from pspg.engine.data.loaders.training import make_train_loader
from pspg.engine.utils.errors import UserError
from tests.engine.data.loaders.datasets import make

N = 11


def content(batch):
    return batch.index, batch.images, batch.labels, batch.tokens


def assert_same(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(content(a), content(b), rtol=0, atol=0)


def loader(samples, workers=0, **settings):
    return make_train_loader(make(samples, **settings), batch_size=2, accumulate=2, workers=workers, seed=5)


def test_batch_contract(samples):
    batch = next(loader(samples).batches(0))
    assert batch.images.shape == (2, 3, 16, 16)
    assert batch.images.dtype == batch.labels.dtype == torch.float32
    assert batch.index.dtype == torch.int64
    assert batch.ids == [f"s{row}" for row in batch.index.tolist()]
    assert batch.labels.tolist() == [[2 * row, 2 * row + 1] for row in batch.index.tolist()]
    assert batch.tokens[:, 1].tolist() == batch.index.tolist()
    moved = batch.to("cpu")
    torch.testing.assert_close(content(moved), content(batch), rtol=0, atol=0)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing_and_an_epoch_starts_anywhere(samples, workers):
    reference, other = loader(samples), loader(samples, workers)
    for epoch in (0, 1):
        assert_same(reference.batches(epoch), other.batches(epoch))
    # leave an epoch in its middle, then start another one in its middle, on the same workers
    started = other.batches(2)
    next(started)
    started.close()
    whole = list(reference.batches(7))
    assert_same(whole[1:], other.batches(7, start_batch=1))
    assert list(other.batches(7, start_batch=4)) == []


def test_order_and_augmentation_depend_on_the_epoch(samples):
    train = loader(samples)
    first, second = list(train.batches(0)), list(train.batches(1))
    assert train.batches_per_epoch == len(first) == 4
    assert [b.ids for b in first] != [b.ids for b in second]
    assert len({i for b in first for i in b.ids}) == 8
    dataset = make(samples)
    assert not torch.equal(dataset.pixels(0, 4), dataset.pixels(1, 4))
    other_seed, moved = make(samples, seed=4), make(samples[::-1])
    assert not torch.equal(dataset.pixels(0, 4), other_seed.pixels(0, 4))
    assert torch.equal(dataset.pixels(0, 4), moved.pixels(0, N - 1 - 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_left_alone(samples, workers):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    list(loader(samples, workers).batches(0))
    list(make_eval_loader(make(samples), batch_size=4, workers=workers))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_evaluation_in_order_with_a_partial_last_batch(samples):
    evaluation = make_eval_loader(make(samples, augment=False, flip=0.0), batch_size=4, workers=2)
    for _ in range(2):
        batches = list(evaluation)
        assert [len(b) for b in batches] == [4, 4, 3]
        assert torch.cat([b.index for b in batches]).tolist() == list(range(N))
    assert len(evaluation) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_with_one_line(samples, workers):
    samples[6].path.write_bytes(b"")
    train = loader(samples, workers)
    with pytest.raises(UserError) as caught:
        list(chain(*(train.batches(epoch) for epoch in range(20))))
    message = str(caught.value)
    assert message.startswith(f"{samples[6].path}: the file is empty")
    assert "'s6'" in message
    assert "\n" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_leaves_the_other_samples_as_they_are(samples, workers):
    whole = list(loader(samples).batches(0))
    lost = whole[1].ids[0]
    next(s for s in samples if s.id == lost).path.unlink()
    train = loader(samples, workers, on_bad_image="skip")
    batches = list(train.batches(0))
    assert list(train.bad) == [lost]
    assert "no such file" in train.bad[lost]
    assert [identity for identity, _ in batches[1].bad] == [lost]
    assert batches[1].ids == whole[1].ids[1:]
    torch.testing.assert_close(batches[1].images, whole[1].images[1:], rtol=0, atol=0)
    assert_same([whole[0], *whole[2:]], [batches[0], *batches[2:]])


def test_a_batch_without_readable_images_keeps_its_place(samples):
    whole = list(loader(samples).batches(0))
    for sample in samples:
        if sample.id in whole[1].ids:
            sample.path.unlink()
    train = loader(samples, on_bad_image="skip")
    batches = list(train.batches(0))
    assert len(batches) == len(whole)
    assert len(batches[1]) == 1
    assert [batch.dummy for batch in batches] == [False, True, False, False]
    assert {identity for identity, _ in batches[1].bad} == set(whole[1].ids) == set(train.bad)
    assert_same([whole[0], *whole[2:]], [batches[0], *batches[2:]])
    assert_same(batches[1:], train.batches(0, start_batch=1))


def test_evaluation_skips_and_reports(samples):
    for sample in samples[4:9]:
        sample.path.unlink()
    evaluation = make_eval_loader(make(samples, on_bad_image="skip"), batch_size=4)
    batches = list(evaluation)
    assert [b.index.tolist() for b in batches] == [[0, 1, 2, 3], [9, 10]]
    assert [i for i, _ in batches[1].bad] == list(evaluation.bad) == ["s4", "s5", "s6", "s7", "s8"]


@pytest.mark.parametrize("workers", [0, 1])
def test_ranks_share_the_batches_of_an_evaluation(samples, workers):
    for sample in samples[2:5]:
        sample.path.unlink()
    settings = {"batch_size": 2, "workers": workers}
    whole = list(make_eval_loader(make(samples, on_bad_image="skip"), **settings))
    for size in (2, 3, 8):
        shares = [
            make_eval_loader(make(samples, on_bad_image="skip"), rank=rank, world_size=size, **settings)
            for rank in range(size)
        ]
        batches = sorted((batch for share in shares for batch in share), key=lambda batch: batch.place)
        assert [batch.index.tolist() for batch in batches] == [[0, 1], [5], [6, 7], [8, 9], [10]]
        assert_same(batches, whole)
        # Every image is decoded on one rank: that of its batch.
        bad_of_batch = {1: ["s2", "s3"], 2: ["s4"]}
        for rank, share in enumerate(shares):
            assert list(share.bad) == [name for number in range(rank, 6, size) for name in bad_of_batch.get(number, [])]


def test_no_readable_image_at_all(samples):
    for sample in samples:
        sample.path.unlink()
    with pytest.raises(UserError, match="none of the 11 training images"):
        next(loader(samples, on_bad_image="skip").batches(0))


def test_a_killed_worker_is_one_line(samples):
    dataset = make(samples)
    dataset.tokenize = kill
    with pytest.raises(UserError, match="loader process was killed"):
        next(make_train_loader(dataset, batch_size=2, workers=1).batches(0))


def test_a_bug_in_a_worker_keeps_its_traceback(samples):
    dataset = make(samples)
    dataset.tokenize = fail
    with pytest.raises(RuntimeError, match="Original Traceback"):
        next(make_train_loader(dataset, batch_size=2, workers=1).batches(0))


def fail(texts):
    raise RuntimeError("a bug")


def kill(texts):
    os.kill(os.getpid(), signal.SIGKILL)


def test_dataset_can_be_sent_to_spawned_workers(samples):
    dataset = pickle.loads(pickle.dumps(make(samples)))
    torch.testing.assert_close(content(dataset[0, 3]), content(make(samples)[0, 3]), rtol=0, atol=0)
