"""Reading, windowing and resizing images."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from pspg.engine.data.augment import OPERATIONS
from pspg.engine.data.bad_image import BadImage
from pspg.engine.data.images import normalize, read_image, resize, square_image, to_uint8, window16
from pspg.engine.data.strict import read_strictly

GRADIENT = np.tile(np.linspace(0, 1, 256), (32, 1))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bit_png_neither_collapses_nor_saturates(tmp_path, bits):
    path = tmp_path / "film.png"
    Image.fromarray(np.rint(GRADIENT * (2**bits - 1)).astype(np.uint16)).save(path)
    image = read_image(path)
    assert image.mode == "L"
    assert np.abs(np.asarray(image) - GRADIENT * 255).max() <= 0.6


def test_window_keeps_exposure_within_a_bit_depth():
    # an underexposed 12-bit image stays darker than a well exposed one
    dim, bright = np.array([[0, 2048]]), np.array([[0, 4095]])
    assert window16(dim, 12).tolist() == [[0, 128]]
    assert window16(bright, 12).tolist() == [[0, 255]]
    assert window16(np.array([[0, 65535]]), 16).tolist() == [[0, 255]]
    assert window16(np.zeros((2, 2), dtype=np.uint16), 8).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("marker", [65535, 16383, 40000])
def test_a_marker_burnt_in_does_not_decide_the_depth(tmp_path, marker):
    path, film = tmp_path / "film.png", np.rint(np.tile(np.linspace(0, 4095, 256), (100, 1))).astype(np.uint16)
    film[:4, :40] = marker
    Image.fromarray(film).save(path)
    with pytest.raises(BadImage, match=r"12 bits hold all but a few .* bit_depth"):
        read_image(path)
    found = np.asarray(read_image(path, bit_depth=12)).astype(int)
    assert (found[:4, :40] == 255).all()
    assert np.abs(found[4:] - np.linspace(0, 255, 256)).max() <= 0.51


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK"])
def test_modes_and_formats_become_grey(tmp_path, mode):
    grey = Image.fromarray((GRADIENT > 0.5).astype(np.uint8) * 255)
    path = tmp_path / ("film.jpg" if mode == "CMYK" else "film.png")
    grey.convert("RGB").convert(mode).save(path)
    assert np.abs(np.asarray(read_image(path)).astype(int) - np.asarray(grey)).mean() < 3


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_keeps_the_grey_levels(tmp_path, mode):
    Image.fromarray((GRADIENT * 255).astype(np.uint8)).convert(mode).save(tmp_path / "a.jpg", quality=95)
    grey = np.asarray(read_image(tmp_path / "a.jpg")).astype(float)
    assert np.abs(grey - GRADIENT * 255).max() <= 3


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
        ("short.jpg", "JPEG", "is truncated"),
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
    assert "bytes not processed" not in message  # the table of prepare check counts by reason
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


def test_the_limit_of_pixels_is_ours(tmp_path, monkeypatch):
    Image.new("L", (2000, 500), 7).save(tmp_path / "a.png")
    Image.new("L", (2000, 500), 7).save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name in ("a.png", "a.jpg"):
        assert read_image(tmp_path / name, max_megapixels=1).size == (2000, 500)
        with pytest.raises(BadImage, match=r"2000 × 500 pixels, more than max_megapixels 0\.9 million"):
            read_image(tmp_path / name, max_megapixels=0.9)


@pytest.mark.parametrize("mode", ["stretch", "pad"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 60_000), (60_000, 1), (3, 9000)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_elongated_films(tmp_path, mode, shape, dtype):
    Image.fromarray(np.full(shape, np.iinfo(dtype).max, dtype)).save(tmp_path / "a.png")
    square = square_image(tmp_path / "a.png", 32, mode)
    assert square.size == (32, 32)
    assert (np.asarray(square) == 255).sum() == (1024 if mode == "stretch" or shape == (1, 1) else 32)
    rng = torch.Generator().manual_seed(0)
    assert all(operation(rng, 32).apply(square).size == (32, 32) for operation in OPERATIONS)


def damaged(data, length, rng):
    """The JPEG with `length` other bytes somewhere within its scan."""
    start = rng.integers(data.index(b"\xff\xda") + 14, len(data) - length - 2)
    changed = bytes(byte ^ rng.integers(1, 256) for byte in data[start : start + length])
    return data[:start] + changed + data[start + length :]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_damage_within_a_scan(tmp_path, mode):
    """Pillow shows it as another picture; read strictly, most of it is refused."""
    rng, path = np.random.default_rng(0), tmp_path / "a.jpg"
    film = Image.fromarray((128 + 100 * np.sin(np.arange(40000) / 700)).astype(np.uint8).reshape(200, 200))
    film.convert(mode).save(path, quality=90)
    data = path.read_bytes()
    plain = np.asarray(read_image(path))
    np.testing.assert_array_equal(np.asarray(read_strictly(path)), plain)

    def refused(read):
        try:
            read(path)
        except BadImage:
            return True
        return False

    found = {read_image: 0, read_strictly: 0}
    for _ in range(100):
        path.write_bytes(damaged(data, 64, rng))
        for read in found:
            found[read] += refused(read)
    assert found[read_strictly] >= 70
    assert found[read_image] <= found[read_strictly] - 20


@pytest.mark.parametrize("mode", ["CMYK", "RGB", "L"])
def test_what_is_sound_passes_strictly(tmp_path, mode):
    film = Image.fromarray((GRADIENT * 255).astype(np.uint8)).convert("RGB").convert(mode)
    for name, settings in {"a.jpg": {}, "b.jpg": {"progressive": True}, "c.jpg": {"icc_profile": b"junk"}}.items():
        film.save(tmp_path / name, **settings)
        assert np.abs(np.asarray(read_strictly(tmp_path / name)) - GRADIENT * 255).mean() < 3


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
    tensor = normalize(to_uint8(Image.fromarray(np.array([[0, 255, 51]], np.uint8))), 0.5, 0.25)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    torch.testing.assert_close(tensor, torch.tensor([[-2.0, 2.0, -1.2]]).expand(3, 1, 3).contiguous())
