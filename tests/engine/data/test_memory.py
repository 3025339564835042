"""Memory of sound, large images: what is stated of their kind holds, and too much is refused before decoding."""

from __future__ import annotations

import io
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pspg.engine.data import bounds, dicom, images
from pspg.engine.data.bad_image import BadImage
from pspg.engine.data.images import read_image
from tests.engine.data.dicom_files import dataset

SIDE = 2400
SLACK = 40 * 2**20
"""bytes: blocks of pixels on the way, the decoders' own"""
KINDS = ["PNG L", "PNG L 16", "PNG P", "PNG LA", "PNG RGB", "PNG RGBA", "JPEG L", "JPEG L progressive", "JPEG RGB"]
KINDS += ["JPEG RGB progressive", "JPEG CMYK progressive", "DICOM", "DICOM signed", "DICOM RLE", "DICOM J2K"]


def encoded(kind: str, side: int) -> bytes:
    """A square image of smooth grey."""
    ramp = (np.add.outer(np.arange(side), np.arange(side)) // 20).astype(np.uint8)
    out, words = io.BytesIO(), kind.split()
    if words[0] == "DICOM":
        uid = pytest.importorskip("pydicom").uid
        made = dataset(ramp.astype(np.int16 if "signed" in words else np.uint16) * 8)
        if len(words) > 1 and words[1] in ("RLE", "J2K"):
            made.compress(uid.RLELossless if words[1] == "RLE" else uid.JPEG2000Lossless)
        made.save_as(out, enforce_file_format=True)
        return out.getvalue()
    grey = Image.fromarray(ramp.astype(np.uint16) * 257 if "16" in words else ramp)
    if words[1] == "P":
        grey = grey.convert("P")
    elif words[1] != "L":
        grey = Image.merge(words[1], [grey] * len(words[1]))
    jpeg = {"progressive": "progressive" in words, "subsampling": 0}
    grey.save(out, words[0], **(jpeg if words[0] == "JPEG" else {"compress_level": 1}))
    return out.getvalue()


def place(kind: str) -> Path:
    return Path("a.dcm" if kind.startswith("DICOM") else "a.img")


def resident(key: str) -> int:
    """Bytes of this process, now or at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_takes_no_more_memory_than_is_stated(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content, stated = encoded(kind, SIDE), []

    def record(path: Path, width: int, height: int, each: float, file: int, limit: float) -> None:
        stated.append(width * height * each + file)

    monkeypatch.setattr(images, "check_memory", record)
    monkeypatch.setattr(dicom, "check_memory", record)
    read_image(place(kind), encoded(kind, 64))  # imports
    stated.clear()
    receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)

    def child() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        shape = np.asarray(read_image(place(kind), content)).shape
        send.send((resident("VmHWM") - before, shape, stated))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    grown, shape, needs = receive.recv()
    process.join()
    assert shape == (SIDE, SIDE)
    assert len(needs) == 1
    assert grown < needs[0] + SLACK


def test_no_kind_takes_400_mb_by_default() -> None:
    assert bounds.BYTES * 100e6 + bounds.BESIDE + SLACK < 400e6


@pytest.mark.parametrize("kind", KINDS)
def test_too_large_ones_are_refused_before_they_are_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers that say more pixels than the limit has memory for; no decoder is asked."""
    content = encoded(kind, 64)
    monkeypatch.setattr(bounds, "BESIDE", 0)
    assert read_image(place(kind), content, max_megapixels=0.02).size == (64, 64)
    each = 4.5 if "DICOM" in kind else bounds.bytes_a_pixel(content)
    if each <= bounds.BYTES:  # as many pixels as the limit says
        return

    def decode(*_: object, **__: object) -> None:
        raise AssertionError("was decoded")

    monkeypatch.setattr(Image.Image, "load", decode)
    monkeypatch.setattr(dicom, "_stored", decode)
    with pytest.raises(BadImage, match=r"64 × 64 pixels of its kind take .* for each of max_megapixels 0\.0041"):
        read_image(place(kind), content, max_megapixels=0.0041)


def test_bytes_a_pixel_of_headers() -> None:
    """Subsampled, in several scans, and cut short."""
    out = io.BytesIO()
    Image.new("RGB", (64, 64)).save(out, "JPEG", progressive=True, subsampling=2)
    assert bounds.bytes_a_pixel(out.getvalue()) == 5 + 3
    baseline = encoded("JPEG L", 64)
    assert bounds.bytes_a_pixel(baseline) == 2
    assert bounds.bytes_a_pixel(baseline + b"\xff\xda") == 4
    for length in range(len(baseline)):
        assert bounds.bytes_a_pixel(baseline[:length]) >= 2
    png = encoded("PNG L", 64)
    for length in range(8, len(png)):
        assert bounds.bytes_a_pixel(png[:length]) >= 2
