"""Pixel mean and deviation, and whose a run takes."""

import numpy as np
import pytest
from PIL import Image

from pspg.engine.config import DataConfig
from pspg.engine.data.manifest import Sample
from pspg.engine.data.pixels import Pixels
from pspg.engine.data.statistics import pixel_statistics, training_pixels
from pspg.engine.utils.errors import UserError


def test_pixel_statistics(samples, tmp_path):
    pixels = np.stack([np.asarray(Image.open(s.path).resize((16, 16), Image.Resampling.BICUBIC)) for s in samples])
    mean, std = pixel_statistics(samples, 16)
    assert mean == pytest.approx(pixels.mean() / 255, abs=1e-9)
    assert std == pytest.approx(pixels.std() / 255, abs=1e-9)
    assert pixel_statistics(samples, 16, limit=3, seed=1) == pixel_statistics(samples, 16, limit=3, seed=1)
    assert pixel_statistics(samples, 16, limit=3) != (mean, std)
    Image.new("L", (9, 9), 5).save(tmp_path / "flat.png")
    with pytest.raises(UserError, match="one grey level"):
        pixel_statistics([Sample(id="f", path=tmp_path / "flat.png")], 16)


def test_no_readable_image(tmp_path):
    with pytest.raises(UserError, match=r"no image to measure .*no such file"):
        pixel_statistics([Sample(id="a", path=tmp_path / "a.png")], 16)


def test_settings_then_the_backbones_then_the_images(samples):
    carried = Pixels(size=16, resize="pad", mean=0.3, std=0.1)
    data = DataConfig(image_size=16, resize="pad")
    assert training_pixels(data, samples, carried, "run") == carried
    mean, std = pixel_statistics(samples, 16, "pad")
    assert training_pixels(data, samples, None, None) == Pixels(size=16, resize="pad", mean=mean, std=std)
    given = DataConfig(image_size=16, resize="pad", mean=0.5, std=0.2)
    assert training_pixels(given, samples, carried, "run") == Pixels(size=16, resize="pad", mean=0.5, std=0.2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig(image_size=20), "data.image_size: 20, but the backbone in run was trained at 16"),
        (DataConfig(image_size=16, resize="pad"), "data.resize: pad, but the backbone in run was trained with stretch"),
    ],
)
def test_settings_that_the_backbone_contradicts(samples, data, message):
    with pytest.raises(UserError, match=message):
        training_pixels(data, samples, Pixels(size=16, resize="stretch", mean=0.3, std=0.1), "run")
