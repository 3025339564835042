"""DICOM: the grey pipeline against hand-made files, a real radiograph, and what must never be printed."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")

from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.pixels import apply_modality_lut, apply_voi_lut  # noqa: E402
from pydicom.uid import RLELossless  # noqa: E402

from pspg.engine.data import dicom as module  # noqa: E402
from pspg.engine.data.bad_image import BadImage  # noqa: E402
from pspg.engine.data.dicom import read_dicom  # noqa: E402
from pspg.engine.data.images import read_image  # noqa: E402
from pspg.engine.utils.errors import UserError  # noqa: E402
from tests.engine.data.dicom_files import SECRET, dataset, lut, saved  # noqa: E402


def read(tmp_path, *args, **attributes):
    return read_dicom(saved(tmp_path / "a.dcm", dataset(*args, **attributes)))


RAMP = np.array([[0, 1024, 2048, 3072, 4095]], np.uint16)


def test_window_clips_and_monochrome1_is_inverted(tmp_path):
    window = {"WindowCenter": 2048, "WindowWidth": 2048}
    plain = read(tmp_path, RAMP, **window)
    assert plain.dtype == np.uint8
    assert plain.tolist() == [[0, 0, 128, 255, 255]]
    assert read(tmp_path, RAMP, photometric="MONOCHROME1", **window).tolist() == [[255, 255, 127, 0, 0]]


def test_without_a_window_the_range_of_the_pixels_is_used(tmp_path):
    assert read(tmp_path, RAMP // 2 + 100).tolist() == [[0, 64, 128, 191, 255]]
    assert read(tmp_path, RAMP // 16, bits=8).tolist() == [[0, 64, 128, 192, 255]]
    assert read(tmp_path, np.full((2, 2), 7, np.uint16)).tolist() == [[0, 0], [0, 0]]


def test_first_of_several_windows_and_other_functions(tmp_path):
    assert read(tmp_path, RAMP, WindowCenter=[2048, 9], WindowWidth=[2048, 2]).tolist() == [[0, 0, 128, 255, 255]]
    exact = read(tmp_path, RAMP, WindowCenter=2048, WindowWidth=4096, VOILUTFunction="LINEAR_EXACT")
    assert exact.tolist() == [[0, 64, 128, 191, 255]]
    sigmoid = read(tmp_path, RAMP, WindowCenter=2048, WindowWidth=2048, VOILUTFunction="SIGMOID")
    assert sigmoid.tolist() == [[5, 30, 128, 225, 250]]


def test_rescale_comes_before_the_window(tmp_path):
    grey = read(tmp_path, RAMP, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=1048.5, WindowWidth=4097)
    assert grey.tolist() == [[0, 128, 255, 255, 255]]


def test_signed_pixels(tmp_path):
    grey = read(tmp_path, np.array([[-2048, 0, 2047]], np.int16), WindowCenter=0, WindowWidth=4096)
    assert grey.tolist() == [[0, 128, 255]]


def test_modality_and_voi_luts_with_8_bit_entries(tmp_path):
    # 4096 inputs onto 8-bit entries: an index kept in 8 bits would wrap
    voi = lut(4096, 0, 8, (np.arange(4096) // 16).astype("<u2").tobytes())
    voi[0]["LUTData"].VR = "OW"
    grey = read(tmp_path, RAMP, VOILUTSequence=voi, WindowCenter=1, WindowWidth=1)
    assert grey.tolist() == [[0, 64, 128, 192, 255]]
    modality = lut(4, 1024, 12, [4095, 2048, 100, 0])
    modality[0]["LUTData"].VR = "US"
    grey = read(tmp_path, np.array([[0, 1025, 4000]], np.uint16), ModalityLUTSequence=modality)
    assert grey.tolist() == [[255, 128, 0]]


def test_padding_is_black_and_does_not_stretch_the_range(tmp_path):
    pixels = np.array([[4095, 1000, 1500, 2000]], np.uint16)
    assert read(tmp_path, pixels, PixelPaddingValue=4095).tolist() == [[0, 0, 128, 255]]
    inverted = read(tmp_path, pixels, photometric="MONOCHROME1", PixelPaddingValue=4095)
    assert inverted.tolist() == [[0, 255, 128, 0]]


def real_radiograph(name):
    pytest.importorskip("data_store", reason="pydicom-data holds the real radiograph")
    return get_testdata_file(name, download=False)


def test_real_chest_film():
    path = real_radiograph("RG1_UNCR.dcm")
    film = np.asarray(read_image(path))
    ds = pydicom.dcmread(path)
    expected = 255 * (1 - apply_voi_lut(ds.pixel_array, ds) / (2**ds.BitsStored - 1))
    assert np.abs(film - expected).max() <= 0.51
    check_exposure(film)


def check_exposure(film):
    """A chest as radiologists see it: air darker than lung, lung darker than spine, nothing saturated."""
    h, w = film.shape
    lung, spine, air = (
        film[h // 4 : h // 3, w // 4 : w // 3],
        film[h // 2, w // 2 - 40 : w // 2 + 40],
        film[40:80, 60],
    )
    assert air.mean() + 20 < lung.mean() < spine.mean() - 20
    assert len(np.unique(film)) > 200
    assert np.isin(film, (0, 255)).mean() < 0.01


@pytest.mark.parametrize("encoding", ["UNCI", "J2KR", "J2KI"])
def test_real_radiograph_in_the_encodings_it_comes_in(tmp_path, encoding):
    """Implicit or explicit, uncompressed, JPEG 2000 lossless (R) or lossy (I), and without a suffix."""
    film = read_dicom(real_radiograph("RG1_UNCR.dcm"))
    copy = tmp_path / "film"
    copy.write_bytes(Path(real_radiograph(f"RG1_{encoding}.dcm")).read_bytes())
    found = np.asarray(read_image(copy))
    check_exposure(found)
    # UNCI is the lossy image, decoded.
    lossless = read_dicom(real_radiograph("RG1_UNCI.dcm")) if encoding == "J2KI" else film
    assert np.abs(found.astype(int) - lossless).max() == (3 if encoding == "UNCI" else 0)
    assert np.abs(found.astype(int) - film).mean() < 0.5


def test_real_radiograph_in_rle(tmp_path):
    ds = pydicom.dcmread(real_radiograph("RG1_UNCR.dcm"))
    ds.compress(RLELossless)
    np.testing.assert_array_equal(
        read_dicom(saved(tmp_path / "a.dcm", ds)), read_dicom(real_radiograph("RG1_UNCR.dcm"))
    )


@pytest.mark.parametrize(
    ("syntax", "uid"),
    [
        ("JPEGLosslessProcess14", "1.2.840.10008.1.2.4.57"),
        ("JPEGLosslessProcess14_1", "1.2.840.10008.1.2.4.70"),
        ("JPEGLSLossless", "1.2.840.10008.1.2.4.80"),
        ("JPEG2000Lossless", "1.2.840.10008.1.2.4.90"),
        ("ExplicitVRBigEndian", "1.2.840.10008.1.2.2"),
        ("DeflatedExplicitVRLittleEndian", "1.2.840.10008.1.2.1.99"),
    ],
)
def test_real_radiograph_in_other_lossless_encodings(tmp_path, syntax, uid):
    gdcm = pytest.importorskip("gdcm", reason="python-gdcm encodes the image")
    source = real_radiograph("RG1_UNCR.dcm")
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(source)
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(tmp_path / "a.dcm"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    assert pydicom.dcmread(tmp_path / "a.dcm", stop_before_pixels=True).file_meta.TransferSyntaxUID == uid
    np.testing.assert_array_equal(read_dicom(tmp_path / "a.dcm"), read_dicom(source))


@pytest.mark.parametrize("name", ["vlut_04.dcm", "mlut_18.dcm"])
def test_lookup_tables_of_real_files(name):
    ds = pydicom.dcmread(real_radiograph(name))
    values = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds).astype(float)
    expected = 255 * (values - values.min()) / np.ptp(values)
    assert np.abs(read_dicom(real_radiograph(name)) - expected).max() <= 0.51


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 15, 16])
def test_every_bit_depth_uses_the_whole_range(tmp_path, bits, photometric):
    ramp = np.linspace(0, 2**bits - 1, 64).astype(np.uint8 if bits == 8 else np.uint16).reshape(1, 64)
    for window in ({}, {"WindowCenter": 2 ** (bits - 1), "WindowWidth": 2**bits}):
        grey = read(tmp_path, ramp, bits=bits, photometric=photometric, **window).astype(float)[0]
        expected = np.linspace(0, 255, 64)
        assert np.abs(grey - (expected if photometric == "MONOCHROME2" else expected[::-1])).max() <= 1.5


def without(ds, name):
    delattr(ds, name)
    return ds


BAD = {
    "truncated": lambda: dataset(RAMP, Rows=500),
    "no pixels": lambda: without(dataset(RAMP), "PixelData"),
    "colour": lambda: dataset(RAMP, photometric="RGB"),
    "no photometric": lambda: without(dataset(RAMP), "PhotometricInterpretation"),
    "frames": lambda: dataset(RAMP, NumberOfFrames=2),
    "window": lambda: dataset(RAMP, WindowCenter=5, WindowWidth=0),
    "large": lambda: dataset(RAMP, Rows=60000, Columns=60000),
    "32 bits": lambda: dataset(RAMP.astype(np.uint32) * 1000, bits=32),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named_and_nothing_of_them_is_printed(tmp_path, kind, capfd, recwarn):
    ds = BAD[kind]()
    with pytest.raises(BadImage) as caught:
        read_image(saved(tmp_path / "a.dcm", ds))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'a.dcm'}: ")
    assert "\n" not in message
    assert caught.value.__cause__ is None
    assert SECRET not in message + "".join(capfd.readouterr())
    assert not recwarn.list


def test_fewer_pixels_than_rows_and_columns_is_cut_short(tmp_path):
    with pytest.raises(BadImage, match="cut short"):
        read_image(saved(tmp_path / "a.dcm", dataset(RAMP, Rows=500)))


@pytest.mark.parametrize("name", ["RG1_J2KR.dcm", "JPEG-LL.dcm"])
def test_cut_streams(tmp_path, name, recwarn):
    with open(real_radiograph(name), "rb") as file:
        data = file.read()
    (tmp_path / name).write_bytes(data[: len(data) // 2] + bytes(1000))
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append
    logging.getLogger().addHandler(handler)
    try:
        with pytest.raises(BadImage, match=r"\.dcm: .*cut short"):
            read_image(tmp_path / name)
    finally:
        logging.getLogger().removeHandler(handler)
    assert not logged
    assert not recwarn.list


def test_a_decoder_that_panics(tmp_path):
    """A run longer than the image: the RLE decoder raises what is no Exception."""
    ds = dataset(np.arange(256, dtype=np.uint16).reshape(16, 16) * 4)
    ds.compress(RLELossless)
    data = bytearray(saved(tmp_path / "a.dcm", ds).read_bytes())
    first_run = data.rindex(b"\xfe\xff\x00\xe0") + 8 + 64  # item, RLE header
    data[first_run : first_run + 64] = bytes([127] * 64)
    (tmp_path / "a.dcm").write_bytes(data)
    with pytest.raises(BadImage, match="cannot be decoded as DICOM"):
        read_dicom(tmp_path / "a.dcm")


@pytest.mark.parametrize("name", ["US1_J2KR.dcm", "SC_rgb.dcm", "OBXXXX1A.dcm", "SC_ybr_full_uncompressed.dcm"])
def test_real_colour_files_are_refused(name):
    with pytest.raises(BadImage, match=r"not monochrome"):
        read_dicom(real_radiograph(name))


def test_the_limit_of_pixels(tmp_path):
    path = saved(tmp_path / "a.dcm", dataset(np.zeros((1000, 2000), np.uint16)))
    assert read_image(path, max_megapixels=2).size == (2000, 1000)
    with pytest.raises(BadImage, match=r"2000 × 1000 pixels, more than max_megapixels 1\.5 million"):
        read_image(path, max_megapixels=1.5)


def test_not_dicom_and_not_installed(tmp_path, monkeypatch):
    (tmp_path / "a.dcm").write_bytes(b"text" * 100)
    with pytest.raises(BadImage, match="not a DICOM file"):
        read_image(tmp_path / "a.dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    module._pydicom.cache_clear()
    with pytest.raises(UserError, match="pip install") as caught:
        read_image(tmp_path / "a.dcm")
    assert not isinstance(caught.value, BadImage)
