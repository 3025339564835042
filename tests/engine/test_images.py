"""Reading, windowing and resizing images."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from pspg.engine.data.images import BadImage, read_image, resize, to_tensor, window16

GRADIENT = np.tile(np.linspace(0, 1, 256), (32, 1))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bit_png_neither_collapses_nor_saturates(tmp_path, bits):
    path = tmp_path / "film.png"
    Image.fromarray(np.rint(GRADIENT * (2**bits - 1)).astype(np.uint16)).save(path)
    image = read_image(path)
    assert image.mode == "L"
    assert np.abs(np.asarray(image) - GRADIENT * 255).max() <= 0.6


def test_window_keeps_exposure_within_a_bit_depth():
    # an underexposed 12-bit film stays darker than a well exposed one
    dim, bright = np.array([[0, 2048]]), np.array([[0, 4095]])
    assert window16(dim).tolist() == [[0, 128]]
    assert window16(bright).tolist() == [[0, 255]]
    assert window16(np.array([[0, 65535]])).tolist() == [[0, 255]]
    assert window16(np.zeros((2, 2), dtype=np.uint16)).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK"])
def test_modes_and_formats_become_grey(tmp_path, mode):
    grey = Image.fromarray((GRADIENT > 0.5).astype(np.uint8) * 255)
    path = tmp_path / ("film.jpg" if mode == "CMYK" else "film.png")
    grey.convert("RGB").convert(mode).save(path)
    assert np.abs(np.asarray(read_image(path)).astype(int) - np.asarray(grey)).mean() < 3


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((GRADIENT * 255).astype(np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    image = read_image(tmp_path / "a.jpg")
    assert image.size == (32, 256)
    assert image.getpixel((16, 0)) < image.getpixel((16, 255))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.png", None, "no such file"),
        ("empty.jpg", b"", "empty"),
        ("text.jpg", b"No acute process.", "not a PNG, JPEG or DICOM"),
        ("short.jpg", "JPEG", "truncated"),
        ("short.png", "PNG", "cannot be decoded"),
        ("other.gif", "GIF", "not a PNG, JPEG or DICOM"),
    ],
)
def test_bad_files_are_named_with_their_reason(tmp_path, name, content, reason):
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 255, (200, 200), dtype=np.uint8)
    if isinstance(content, str):
        Image.fromarray(noise).save(path, format=content)
        content = path.read_bytes()
        content = content if name == "other.gif" else content[: len(content) // 2]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadImage) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert "\n" not in message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_folder_and_16_bit_colour_are_refused(tmp_path):
    with pytest.raises(BadImage, match="not a file"):
        read_image(tmp_path)
    path = tmp_path / "rgb48.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    data[24] = 16
    path.write_bytes(data)
    with pytest.raises(BadImage, match="16-bit PNG"):
        read_image(path)


@pytest.mark.parametrize("excess", [1.5, 3])
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, excess):
    path = tmp_path / "large.png"
    Image.new("L", (2000, int(500 * excess))).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(BadImage, match="more than 1 million pixels"):
        read_image(path)


def test_resize_stretch_and_pad():
    image = Image.new("L", (100, 50), 200)
    assert np.asarray(resize(image, 20, "stretch")).tolist() == [[200] * 20] * 20
    padded = np.asarray(resize(image, 20, "pad"))
    assert padded.shape == (20, 20)
    assert (padded[5:15] == 200).all()
    assert (padded[:5] == 0).all()
    assert (padded[15:] == 0).all()
    assert resize(Image.new("L", (1000, 1)), 10, "pad").size == (10, 10)


def test_tensor_is_normalised_grey_in_three_channels():
    tensor = to_tensor(Image.fromarray(np.array([[0, 255, 51]], np.uint8)), 0.5, 0.25)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    torch.testing.assert_close(tensor, torch.tensor([[-2.0, 2.0, -1.2]]).expand(3, 1, 3).contiguous())
