"""The pixel cache: the same pixels as decoding afresh, and every way it can be wrong in one line."""

import json
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pspg.engine.data.augment import Augmentation
from pspg.engine.data.bad_image import BadImage
from pspg.engine.data.cache import build as cache_build
from pspg.engine.data.cache.build import build_cache
from pspg.engine.data.cache.pixel_cache import PixelCache
from pspg.engine.data.dataset import ImageDataset
from pspg.engine.data.decoding import DecoderPool
from pspg.engine.data.images import square_image
from pspg.engine.data.loaders.training import make_train_loader
from pspg.engine.data.manifest import Sample
from pspg.engine.data.pixels import Pixels, Reading
from pspg.engine.data.statistics import pixel_statistics
from pspg.engine.utils.errors import UserError

N, SIZE = 11, 16
PIXELS = Pixels(size=SIZE, resize="stretch", mean=0.4, std=0.2)


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
        augmentation = Augmentation(flip=0.5, seed=3)
        dataset = ImageDataset(samples, PIXELS, Reading(cache=cache), augmentation=augmentation)
        return [b for e in (0, 1) for b in make_train_loader(dataset, batch_size=2, workers=workers).batches(e)]

    for cached, fresh in zip(batches(folder), batches(None), strict=True):
        assert cached.ids == fresh.ids
        assert torch.equal(cached.pixels, fresh.pixels)
    assert pixel_statistics(samples, SIZE, reading=Reading(cache=folder)) == pixel_statistics(samples, SIZE)


def test_unreadable_images_are_kept_with_their_reason(tmp_path, samples):
    samples[5].path.write_bytes(b"")
    with pytest.raises(UserError, match=r"5\.png: the file is empty; or set on_bad_image to skip"):
        build(tmp_path / "cache", samples)
    with pytest.raises(UserError, match="not finished"):
        opened(tmp_path / "cache", samples)
    assert build(tmp_path / "cache", samples, on_bad_image="skip") == {samples[5].path: "the file is empty"}
    with pytest.raises(UserError, match=r"5\.png: the file is empty; or set"):  # tried again
        build(tmp_path / "cache", samples)
    build(tmp_path / "cache", samples, on_bad_image="skip")
    cache = opened(tmp_path / "cache", samples)
    with pytest.raises(BadImage, match=r"5\.png: the file is empty"):
        cache[5]
    np.testing.assert_array_equal(cache[6], np.asarray(square_image(samples[6].path, SIZE, "stretch")))


def test_skipping_from_a_cache_leaves_the_other_samples_as_they_are(tmp_path, samples):
    samples[5].path.write_bytes(b"")
    build(tmp_path / "cache", samples, on_bad_image="skip")

    def loader(cache):
        reading = Reading(on_bad_image="skip", cache=cache)
        return make_train_loader(ImageDataset(samples, PIXELS, reading, augmentation=Augmentation()), batch_size=4)

    cached, fresh = loader(tmp_path / "cache"), loader(None)
    for epoch in range(3):
        for left, right in zip(cached.batches(epoch), fresh.batches(epoch), strict=True):
            assert left.ids == right.ids
            assert torch.equal(left.pixels, right.pixels)
    assert cached.bad == fresh.bad == {"s5": f"{samples[5].path}: the file is empty"}


def slow_pixels(path, **_):
    if path.name == "9.png":
        time.sleep(300)
    return np.asarray(square_image(path, SIZE, "stretch"))


def test_a_killed_build_goes_on_where_it_was(tmp_path, samples, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cache_build, "_pixels", slow_pixels)
        settings = {"workers": 2}
        process = multiprocessing.get_context("fork").Process(
            target=build, args=(tmp_path / "b", samples), kwargs=settings
        )
        process.start()
    header = tmp_path / "b" / "cache.json"
    wait_until(lambda: header.exists() and len(json.loads(header.read_text())["shards"]) == 2)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(workers) >= 2
    process.kill()
    process.join()
    wait_until(lambda: not any(alive(pid) for pid in workers))
    with pytest.raises(UserError, match="not finished"):
        opened(tmp_path / "b", samples)
    decoded = []
    monkeypatch.setattr(DecoderPool, "map", lambda pool, paths: map(pool._attempt, decoded.extend(paths) or paths))
    build(tmp_path / "b", samples)
    assert decoded == [sample.path for sample in samples[8:]]
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((folder / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def wait_until(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def crash(path, **_):
    if path.name in ("2.png", "7.png"):
        os.kill(os.getpid(), signal.SIGKILL)
    return np.asarray(square_image(path, SIZE, "stretch"))


def test_a_file_that_crashes_its_decoder_is_named(samples):
    with DecoderPool(crash, 2) as pool:
        for _ in range(2):
            results = list(pool.map([sample.path for sample in samples]))
            bad = {row: result for row, result in enumerate(results) if isinstance(result, BadImage)}
            assert list(bad) == [2, 7]
            assert str(bad[2]) == f"{samples[2].path}: its decoder crashes, or needs more memory than there is"
            np.testing.assert_array_equal(results[8], np.asarray(square_image(samples[8].path, SIZE, "stretch")))


def test_several_manifests_share_a_cache(folder, tmp_path, samples):
    """A second build adds; the same id may stand for another file."""
    (tmp_path / "val").mkdir()
    Image.new("L", (30, 20), 9).save(tmp_path / "val" / "0.png")
    other = [Sample("s0", tmp_path / "val" / "0.png")]
    build_cache(folder, other, ["val/0.png"], size=SIZE, resize="stretch")
    assert (opened(folder, other)[0] == 9).all()
    np.testing.assert_array_equal(
        opened(folder, samples)[0], np.asarray(square_image(samples[0].path, SIZE, "stretch"))
    )


def touch(path):
    os.utime(path, ns=(0, 0))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def edit(path, old, new):
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))


WRONG = {
    "not there": (lambda f, s: (f / "cache.json").unlink(), "holds no cache"),
    "not a header": (lambda f, s: (f / "cache.json").write_text("[]"), "is not the header"),
    "cut header": (lambda f, s: cut(f / "cache.json") or cut(f / "cache.json"), "is not the header"),
    "edited header": (lambda f, s: edit(f / "cache.json", '"number": 1', '"number": "x"'), "is not the header"),
    "other version": (lambda f, s: edit(f / "cache.json", '"version": 2', '"version": 9'), "of version 9, not 2"),
    "unfinished": (lambda f, s: edit(f / "cache.json", "true", "false"), "not finished"),
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
    if "header" in kind or kind in ("not there", "other version"):
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


@pytest.mark.parametrize("place", [0, SIZE * SIZE - 1, 2 * SIZE * SIZE + 7])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_garbled_pixel_is_noticed_at_every_reading(folder, samples, place, bit):
    """By the CRC-32 of its image; the others are read as before, and a cache that is already open notices, too."""
    whole = opened(folder, samples)
    pixels = [whole[row].copy() for row in range(N)]
    file = folder / "pixels-00000.npy"
    content = bytearray(file.read_bytes())
    start = len(content) - 4 * SIZE * SIZE
    content[start + place] ^= 1 << bit
    file.write_bytes(content)
    garbled = place // (SIZE * SIZE)
    for cache in (whole, opened(folder, samples), pickle.loads(pickle.dumps(whole))):
        for row in range(N):
            if row == garbled:
                with pytest.raises(UserError, match=rf"pixels-00000\.npy: wrong checksum of image {garbled}; run"):
                    cache[row]
                with pytest.raises(UserError, match="wrong checksum"):
                    cache.batch([row])
            else:
                assert np.array_equal(cache[row], pixels[row])
