"""The pixel cache: the same pixels as decoding afresh, and every way it can be wrong in one line."""

import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from pspg.engine.data import cache_build
from pspg.engine.data.cache import PixelCache
from pspg.engine.data.cache_build import build_cache
from pspg.engine.data.images import BadImage, square_image
from pspg.engine.data.manifest import Sample
from pspg.engine.data.torch_loader import ImageDataset, make_train_loader, pixel_statistics
from pspg.engine.errors import UserError

N, SIZE = 11, 16


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_build, "SHARD_IMAGES", 4)


@pytest.fixture
def samples(tmp_path):
    noise, made = np.random.default_rng(0), []
    (tmp_path / "films").mkdir()
    for number in range(N):
        path = tmp_path / "films" / f"{number}.png"
        Image.fromarray(noise.integers(0, 255, (20, 24 + number), dtype=np.uint8)).save(path)
        made.append(Sample(id=f"s{number}", path=path))
    return made


def build(folder, samples, **settings):
    names = [f"films/{sample.path.name}" for sample in samples]
    return build_cache(folder, samples, names, **{"size": SIZE, "resize": "stretch"} | settings)


def opened(folder, samples, **settings):
    return PixelCache.open(folder, samples, **{"size": SIZE, "resize": "stretch"} | settings)


@pytest.fixture
def folder(tmp_path, samples):
    build(tmp_path / "cache", samples)
    return tmp_path / "cache"


@pytest.mark.parametrize("resize", ["stretch", "pad"])
def test_pixels_are_those_of_decoding_afresh(tmp_path, samples, resize):
    assert build(tmp_path / "cache", samples, resize=resize, workers=2) == {}
    chosen = samples[::-2]
    cache = opened(tmp_path / "cache", chosen, resize=resize)
    fresh = np.stack([np.asarray(square_image(sample.path, SIZE, resize)) for sample in chosen])
    assert len(cache) == len(chosen)
    assert not cache[0].flags.writeable
    np.testing.assert_array_equal(cache.batch(range(len(chosen))), fresh)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(cache)).batch([3, 1, 3]), fresh[[3, 1, 3]])
    assert len(pickle.dumps(cache)) < 2000
    with multiprocessing.get_context("fork").Pool(1) as pool:  # maps made by the parent
        np.testing.assert_array_equal(pool.apply(cache.batch, ([2],)), fresh[[2]])


def test_format_is_plain_numpy_and_json_lines(folder, samples):
    header = json.loads((folder / "cache.json").read_text())
    assert (header["format"], header["images"], header["finished"]) == ("pspg-engine pixel cache", N, True)
    assert [shard["images"] for shard in header["shards"]] == [4, 4, 3]
    last = np.load(folder / "pixels-00002.npy")
    np.testing.assert_array_equal(last[2], np.asarray(square_image(samples[10].path, SIZE, "stretch")))
    row = json.loads((folder / "index-00002.jsonl").read_text().splitlines()[2])
    status = samples[10].path.stat()
    assert row == {
        "id": "s10",
        "filepath": "films/10.png",
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_same_batches(folder, samples, workers):
    def batches(cache):
        dataset = ImageDataset(samples, image_size=SIZE, mean=0.4, std=0.2, augment=True, flip=0.5, seed=3, cache=cache)
        return [b for e in (0, 1) for b in make_train_loader(dataset, batch_size=2, workers=workers).batches(e)]

    cache = opened(folder, samples)
    for cached, fresh in zip(batches(cache), batches(None), strict=True):
        assert cached.ids == fresh.ids
        assert torch.equal(cached.pixels, fresh.pixels)
    assert pixel_statistics(samples, SIZE, cache=cache) == pixel_statistics(samples, SIZE)


def test_unreadable_images_are_kept_with_their_reason(tmp_path, samples):
    samples[5].path.write_bytes(b"")
    with pytest.raises(UserError, match=r"5\.png: the file is empty; or set on_bad_image to skip"):
        build(tmp_path / "cache", samples)
    with pytest.raises(UserError, match="not finished"):
        opened(tmp_path / "cache", samples)
    for _ in range(2):  # the second time nothing is left to do
        assert build(tmp_path / "cache", samples, on_bad_image="skip") == {samples[5].path: "the file is empty"}
    with pytest.raises(UserError, match=r"5\.png: the file is empty; or set"):
        build(tmp_path / "cache", samples)
    cache = opened(tmp_path / "cache", samples)
    with pytest.raises(BadImage, match=r"5\.png: the file is empty"):
        cache[5]
    np.testing.assert_array_equal(cache[6], np.asarray(square_image(samples[6].path, SIZE, "stretch")))


def touch(path):
    os.utime(path, ns=(0, 0))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def unfinish(path):
    path.write_text(path.read_text().replace('"finished": true', '"finished": false'))


WRONG = {
    "not there": (lambda f, s: (f / "cache.json").unlink(), "holds no cache"),
    "not a header": (lambda f, s: (f / "cache.json").write_text("[]"), "is not the header"),
    "cut header": (lambda f, s: cut(f / "cache.json") or cut(f / "cache.json"), "is not the header"),
    "unfinished": (lambda f, s: unfinish(f / "cache.json"), "not finished"),
    "cut shard": (lambda f, s: cut(f / "pixels-00001.npy"), r"pixels-00001\.npy: a shard cut short"),
    "no shard": (lambda f, s: (f / "pixels-00001.npy").unlink(), r"pixels-00001\.npy: no such file"),
    "swapped": (lambda f, s: np.save(f / "pixels-00001.npy", np.zeros((3, 5, 5), np.uint8)), "not a shard of 4 images"),
    "index": (lambda f, s: flip(f / "index-00000.jsonl"), r"index-00000\.jsonl: wrong checksum"),
    "missing rows": (lambda f, s: s.append(Sample("new", s[0].path)), "1 of 12 images are not in the cache.*'new'"),
    "other path": (lambda f, s: s.__setitem__(0, Sample("s0", s[1].path)), "1 of 11 images are not in the cache.*'s0'"),
    "touched": (lambda f, s: touch(s[3].path), r"1 images changed.*films/3\.png"),
    "grown": (lambda f, s: s[3].path.write_bytes(bytes(9999)), r"1 images changed.*films/3\.png"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_cache_is_one_line_and_building_again_repairs_it(folder, samples, kind):
    spoil, reason = WRONG[kind]
    spoil(folder, samples)
    with pytest.raises(UserError, match=reason) as caught:
        opened(folder, samples)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    if "header" in kind or kind == "not there":
        with pytest.raises(UserError):  # whatever the folder holds is left alone
            build(folder, samples)
        return
    build(folder, samples, on_bad_image="skip")
    cache = opened(folder, samples)
    readable = [row for row in range(len(samples)) if row not in cache.bad]
    assert len(readable) == len(samples) - (kind == "grown")
    fresh = [np.asarray(square_image(samples[row].path, SIZE, "stretch")) for row in readable]
    np.testing.assert_array_equal(cache.batch(readable), np.stack(fresh))


@pytest.mark.parametrize("other", [{"size": 20}, {"resize": "pad"}])
def test_another_size_or_resize_is_refused(folder, samples, other):
    with pytest.raises(UserError, match=r"holds images of 16 pixels \(stretch\), the run needs"):
        opened(folder, samples, **other)
    with pytest.raises(UserError, match="choose another folder"):
        build(folder, samples, **other)


def test_sources_may_be_gone_and_the_folder_moved(tmp_path, folder, samples):
    before = opened(folder, samples).batch(range(N))
    moved = [Sample(sample.id, tmp_path / "elsewhere" / "films" / sample.path.name) for sample in samples]
    folder = folder.rename(tmp_path / "moved")
    np.testing.assert_array_equal(opened(folder, moved).batch(range(N)), before)
