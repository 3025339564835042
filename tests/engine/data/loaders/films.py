"""Films in every form of file, both loaders of them, and comparisons."""

import io
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali")

from pspg.engine.data.loaders.dali_loader import dali_batches
from pspg.engine.data.loaders.evaluation import make_eval_loader
from pspg.engine.data.loaders.training import make_train_loader
from pspg.engine.data.manifest import Sample
from tests.engine.data.loaders import datasets

N, SIDE = 13, 96
CPU = torch.device("cpu")
DALI = partial(dali_batches, device=CPU)
make = partial(datasets.make, size=SIDE)


def film(number):
    """A smooth drawing, 260 × 300, with edges that every operation moves."""
    y, x = np.mgrid[0:300, 0:260]
    lung = 150 * np.exp(-((x - 80 - number) ** 2 + (y - 120) ** 2) / 4000)
    heart = 90 * np.exp(-((x - 170) ** 2 + (y - 200 + 2 * number) ** 2) / 2500)
    return Image.fromarray((lung + heart + 12 * np.sin(x / 9) + 14).astype(np.uint8))


def encode(image, form, **settings):
    buffer = io.BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


# Form of a file → image to bytes. The first ones DALI decodes.
PLAIN = {
    "jpeg": lambda image: encode(image, "JPEG", quality=95),
    "jpeg of colour": lambda image: encode(image.convert("RGB"), "JPEG", quality=95),
    "progressive jpeg": lambda image: encode(image, "JPEG", quality=95, progressive=True),
    "png": lambda image: encode(image, "PNG"),
    "png of colour": lambda image: encode(image.convert("RGB"), "PNG"),
}
OTHER = {
    "16-bit png of 12 bits": lambda image: encode(Image.fromarray(np.asarray(image).astype(np.uint16) * 16), "PNG"),
    "palette": lambda image: encode(image.convert("P"), "PNG"),
    "transparent": lambda image: encode(image.convert("LA"), "PNG"),
    "turned": lambda image: encode(image, "JPEG", exif=turned()),
    "cmyk": lambda image: encode(image.convert("RGB").convert("CMYK"), "JPEG"),
    "rgb jpeg": lambda image: encode(image.convert("RGB"), "JPEG", keep_rgb=True),
    "bytes after the end": lambda image: encode(image, "JPEG") + b"\0\0",
}


def film_files(tmp_path):
    """13 samples, of every form of file."""
    made = []
    for number, (form, write) in zip(range(N), [*PLAIN.items(), *OTHER.items(), *PLAIN.items()], strict=False):
        path = tmp_path / f"{number} {form}"
        path.write_bytes(write(film(number)))
        made.append(Sample(id=f"s{number}", path=path, text=f"report {number}"))
    return made


def train(samples, load=DALI, workers=0, sampling=None, **settings):
    sampling = {"batch_size": 4, "seed": 5} | (sampling or {})
    return make_train_loader(make(samples, **settings), workers=workers, load=load, **sampling)


def evaluation(samples, load=DALI, batch_size=4, **settings):
    return make_eval_loader(
        make(samples, **{"augment": False, "flip": 0.0} | settings), batch_size=batch_size, load=load
    )


def assert_same(left, right):
    """Everything alike, pixels bit for bit."""
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert (a.ids, a.bad) == (b.ids, b.bad)
        for name in ("index", "pixels", "labels", "tokens"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def difference(left, right):
    """Absolute difference of pixels, grey levels."""
    return (left.int() - right.int()).abs().double()


def assert_close(left, right):
    """Everything alike, pixels to 0.3 grey levels in the mean of a batch and 2 in 995 of 1000.

    The rest are pixels at which nearest neighbours were chosen differently by rounding."""
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert (a.ids, a.bad) == (b.ids, b.bad)
        for name in ("index", "labels", "tokens"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        assert (a.pixels.shape, a.pixels.dtype) == (b.pixels.shape, torch.uint8)
        off = difference(a.pixels, b.pixels)
        assert off.mean() < 0.3
        assert off.quantile(0.995) <= 2
