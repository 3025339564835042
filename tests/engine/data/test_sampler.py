"""The batches of an epoch: a function of seed and epoch, shared out among ranks."""

from itertools import chain

import pytest

from pspg.engine.data.sampler import EpochSampler
from pspg.engine.data.seeding import generator
from pspg.engine.utils.errors import UserError


def test_ranks_share_the_batches_of_one_process():
    def batches(rank, world_size):
        return list(EpochSampler(50, batch_size=12, rank=rank, world_size=world_size, seed=9))

    single = batches(0, 1)
    for world_size in (2, 3):
        split = [batches(rank, world_size) for rank in range(world_size)]
        assert [[*chain(*parts)] for parts in zip(*split, strict=True)] == single


def test_only_whole_steps_are_kept():
    sampler = EpochSampler(50, batch_size=4, accumulate=5)
    assert sampler.batches_per_epoch == len(list(sampler)) == 10


@pytest.mark.parametrize(
    ("length", "settings", "reason"),
    [
        (50, {"batch_size": 5, "world_size": 2}, "5 images cannot be split over 2 processes"),
        (7, {"batch_size": 4, "accumulate": 2}, "7 images are fewer than one optimizer step"),
    ],
)
def test_impossible_splits_are_refused(length, settings, reason):
    with pytest.raises(UserError, match=reason):
        EpochSampler(length, **settings)


def test_seeds_are_the_same_in_every_process():
    # a salted or changed hash would change this number: resumed runs would see other pixels
    assert generator(3, 1, "s0").initial_seed() == 2527241156188712164
