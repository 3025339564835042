"""Files that DALI decodes, that Pillow decodes for it, and that nobody can."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali")

from pspg.engine.data.loaders import dali_loader
from pspg.engine.data.loaders.torch_loader import TorchBatches
from pspg.engine.data.manifest import Sample
from pspg.engine.data.plain_files import plain_size
from pspg.engine.utils.errors import UserError
from tests.engine.data.loaders.films import (
    DALI,
    OTHER,
    PLAIN,
    SIDE,
    N,
    assert_close,
    assert_same,
    difference,
    encode,
    evaluation,
    film,
    film_files,
    train,
)


@pytest.fixture
def samples(tmp_path):
    return film_files(tmp_path)


@pytest.mark.parametrize("form", [*PLAIN, *OTHER])
def test_every_form_of_file(tmp_path, form):
    """Plain files are decoded by DALI, within the rounding of a bicubic resize; others by Pillow, bit for bit."""
    path = tmp_path / "film"
    path.write_bytes((PLAIN | OTHER)[form](film(0)))
    assert (plain_size(path.read_bytes()) is not None) == (form in PLAIN)
    (ours,), (theirs,) = (evaluation([Sample("a", path, "report 1")], load) for load in (DALI, TorchBatches))
    off = difference(ours.pixels, theirs.pixels)
    assert off.max() <= (2 if form in PLAIN else 0)
    assert off.mean() < 0.2


def test_dicom(tmp_path):
    path = pytest.importorskip("pydicom.data").get_testdata_file("CT_small.dcm")
    (ours,), (theirs,) = (evaluation([Sample("a", path, "report 1")], load) for load in (DALI, TorchBatches))
    assert torch.equal(ours.pixels, theirs.pixels)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def broken_png(deflated, depth=8, colour=0):
    """A PNG with every chunk whole, whose pixels are not."""
    header = struct.pack(">IIBBBBB", 260, 300, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", deflated) + chunk(b"IEND", b"")


JPEG, PNG = PLAIN["jpeg"](film(0)), PLAIN["png"](film(0))
BAD = {
    "empty": b"",
    "text": b"an invoice, not a film",
    "gif": encode(film(0).convert("P"), "GIF"),
    "jpeg cut short": JPEG[: len(JPEG) // 2],
    "jpeg without its last bytes": JPEG[:-2],
    "jpeg of a header only": JPEG[:20] + b"\xff\xd9",
    "png cut short": PNG[: len(PNG) // 2],
    "png with wrong bytes": PNG[: len(PNG) // 2] + b"XX" + PNG[len(PNG) // 2 + 2 :],
    "16-bit png of colour": PNG[:24] + b"\x10\x02" + PNG[26:],
    # These pass for plain, and DALI fails on them.
    "png of garbage": broken_png(b"\x78\x9cgarbage" * 20),
    "png with rows missing": broken_png(zlib.compress((b"\0" + b"\x80" * 260) * 299)),
    "png of colour with rows missing": broken_png(zlib.compress((b"\0" + b"\x80" * 780) * 150), colour=2),
    "16-bit png with rows missing": broken_png(zlib.compress((b"\0" + b"\x80" * 520) * 150), depth=16),
    "missing": None,
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(samples, kind):
    """The torch loader's messages; skipping leaves the other samples as they are."""
    whole = list(train(samples).batches(0))
    lost = whole[1].ids[2]
    path = next(sample.path for sample in samples if sample.id == lost)
    path.unlink() if BAD[kind] is None else path.write_bytes(BAD[kind])
    messages = []
    for load in (TorchBatches, DALI):
        with pytest.raises(UserError) as caught:
            list(train(samples, load).batches(0))
        messages.append(str(caught.value))
        skipping = train(samples, load, on_bad_image="skip")
        batches = list(skipping.batches(0))
        messages.append(str(skipping.bad))
    assert messages[:2] == messages[2:]
    assert messages[0].startswith(f"{path}: ")
    assert f"(sample {lost!r})" in messages[0]
    assert "\n" not in messages[0]
    assert batches[1].bad == list(skipping.bad.items())
    assert batches[1].ids == [*whole[1].ids[:2], *whole[1].ids[3:]]
    assert torch.equal(batches[1].pixels, whole[1].pixels[[0, 1, 3]])
    assert_same([batches[0], *batches[2:]], [whole[0], *whole[2:]])


@pytest.mark.parametrize("resize", ["stretch", "pad"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 30_000), (30_000, 1), (3, 9000), (SIDE, SIDE)])
def test_elongated_films(tmp_path, shape, resize):
    """Beyond an image's edge DALI repeats its last pixel, Pillow does without; in a film of three rows it shows."""
    path = tmp_path / "film.png"
    Image.fromarray(np.linspace(40, 250, shape[0] * shape[1]).reshape(shape).astype(np.uint8)).save(path)
    films = [Sample("a", path, "report 1")]
    (ours,), (theirs,) = (evaluation(films, load, resize=resize) for load in (DALI, TorchBatches))
    assert difference(ours.pixels, theirs.pixels).max() <= (5 if shape == (3, 9000) else 1)


def test_too_large_a_file(samples):
    for load in (DALI, TorchBatches):
        with pytest.raises(UserError, match="260 × 300 pixels, more than max_megapixels"):
            list(evaluation(samples, load, max_megapixels=0.01))


@pytest.mark.parametrize(
    "form", ["jpeg", "jpeg of colour", "progressive jpeg", "png", "png of colour", "palette", "cmyk"]
)
def test_too_much_memory_for_its_kind(samples, form, monkeypatch):
    """Both loaders refuse the same files with the same words, those that DALI would decode included."""
    monkeypatch.setattr("pspg.engine.data.bounds.BESIDE", 0)
    samples[0].path.write_bytes((PLAIN | OTHER)[form](film(0)))
    messages = []
    for load in (DALI, TorchBatches):
        try:
            list(evaluation(samples[:1], load, max_megapixels=0.0781))
            messages.append("")
        except UserError as error:
            messages.append(str(error))
    assert messages[0] == messages[1]
    assert ("to decode, more than 3 bytes" in messages[0]) == (form not in ("jpeg", "png", "palette"))


def blind_to(monkeypatch, *rows):
    """A DALI that decodes these images only where Pillow has decoded them for it."""
    first = dali_loader._Runner.pixels

    def pixels(runner, prepared):
        files = prepared.inputs().get("files", [])
        for (_, row), file in zip(prepared.keys, files, strict=True):
            if row in rows and bytes(file[:2]) != b"P5":
                return "cannot decode"
        return first(runner, prepared)

    monkeypatch.setattr(dali_loader._Runner, "pixels", pixels)


def test_what_pillow_alone_decodes_is_used_and_told(samples, caplog, monkeypatch):
    blind_to(monkeypatch, 0)
    ours, theirs = (list(evaluation(samples, load, batch_size=N)) for load in (DALI, TorchBatches))
    assert_close(ours, theirs)
    assert torch.equal(ours[0].pixels[0], theirs[0].pixels[0])
    assert f"{samples[0].path}: DALI cannot decode this file" in caplog.text


def test_decoding_nothing_is_not_the_fault_of_the_files(samples, monkeypatch):
    blind_to(monkeypatch, *range(4))
    with pytest.raises(UserError, match="DALI decodes none of 4 files that Pillow decodes"):
        list(evaluation(samples))


def test_a_failure_that_no_file_is_to_blame_for_is_raised(samples, monkeypatch):
    first = dali_loader._Runner.pixels

    def fail(runner, prepared):
        if len(prepared.keys) > 1:
            return "out of memory"
        return first(runner, prepared)

    monkeypatch.setattr(dali_loader._Runner, "pixels", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(evaluation(samples))


def test_batches_without_readable_images(samples):
    whole = list(train(samples).batches(0))
    for sample in samples:
        if sample.id in whole[1].ids:
            sample.path.unlink()
    ours, theirs = (train(samples, load, on_bad_image="skip") for load in (DALI, TorchBatches))
    batches = list(ours.batches(0))
    assert_close(batches, theirs.batches(0))
    assert [len(batch) for batch in batches] == [4, 1, 4]
    assert ours.bad == theirs.bad
    left = evaluation([sample for sample in samples if sample.id in whole[1].ids], on_bad_image="skip")
    assert list(left) == []
    assert set(left.bad) == set(whole[1].ids)
