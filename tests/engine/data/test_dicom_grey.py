"""DICOM: stored values and the grey pipeline over generated files, against the same arithmetic on the true values."""

import itertools
import tempfile

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")

from pydicom.dataelem import DataElement  # noqa: E402
from pydicom.dataset import Dataset  # noqa: E402
from pydicom.encaps import encapsulate, get_frame  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import (  # noqa: E402
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from pspg.engine.data.bad_image import BadImage  # noqa: E402
from pspg.engine.data.dicom import read_dicom  # noqa: E402
from tests.engine.data.dicom_files import dataset, saved  # noqa: E402

SYNTAXES = {
    "explicit": ExplicitVRLittleEndian,
    "implicit": ImplicitVRLittleEndian,
    "big endian": ExplicitVRBigEndian,
    "rle": RLELossless,
    "jpeg 2000": JPEG2000Lossless,
    "jpeg-ls": UID("1.2.840.10008.1.2.4.80"),
    "jpeg lossless": UID("1.2.840.10008.1.2.4.70"),
}


def film(values, bits, *, high=None, signed=False, syntax="explicit", above=0, photometric="MONOCHROME2", **attributes):
    """True values (h,w) as a data set.

    Args:
        high: HighBit.
        above: what stands in the bits above HighBit.
    """
    high = bits - 1 if high is None else high
    words = np.uint8 if high < 8 and bits <= 8 else np.uint16
    pattern = (values & (2**bits - 1)) << (high + 1 - bits) | above << (high + 1)
    ds = dataset(pattern.astype(words), bits=bits, photometric=photometric)
    ds.PixelRepresentation, ds.HighBit = int(signed), high
    for name, value in attributes.items():
        setattr(ds, name, value)
    uid = SYNTAXES[syntax]
    ds.file_meta.TransferSyntaxUID = uid
    if syntax == "big endian":
        ds.PixelData = pattern.astype(words).astype(f">u{words().itemsize}").tobytes()
    if uid == RLELossless:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.BitsStored, ds.HighBit = ds.BitsAllocated, ds.BitsAllocated - 1  # or half of each word is left out
        ds.compress(uid)
        ds.BitsStored, ds.HighBit = bits, high
    elif uid.is_encapsulated:
        ds.PixelData = encapsulate([encoded(pattern.astype(words), syntax, 16 if np.any(above) else high + 1)])
        ds["PixelData"].VR = "OB"
    return ds


def encoded(words, syntax, precision):
    """A compressed stream; openjpeg's own encoder aborts in a process that has loaded gdcm."""
    gdcm = pytest.importorskip("gdcm", reason="python-gdcm encodes the image")
    name = {"jpeg-ls": "JPEGLSLossless", "jpeg lossless": "JPEGLosslessProcess14_1", "jpeg 2000": "JPEG2000Lossless"}
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/a.dcm"
        reader.SetFileName(str(saved(path, dataset(words, bits=precision))))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, name[syntax])))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(path)
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        return get_frame(pydicom.dcmread(path).PixelData, 0, number_of_frames=1)


def read(tmp_path, ds):
    path = tmp_path / "a.dcm"
    ds.save_as(path, enforce_file_format=True)
    return read_dicom(path).astype(int)


def ramp(bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    return np.rint(np.linspace(low, low + 2**bits - 1, 4096)).astype(np.int64).reshape(64, 64)


def expected(unit, photometric="MONOCHROME2"):
    unit = np.clip(unit, 0, 1)
    return np.rint(255 * (1 - unit if photometric == "MONOCHROME1" else unit))


PHOTOMETRIC = ("MONOCHROME1", "MONOCHROME2")


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 9, 10, 12, 13, 14, 15, 16])
def test_stored_values_of_every_depth_sign_and_syntax(tmp_path, bits, signed, syntax):
    values = ramp(bits, signed)
    for photometric, slope in itertools.product(PHOTOMETRIC, (1, -0.5)):
        low, high = sorted((slope * values.min() + 3, slope * values.max() + 3))
        unit = (slope * values + 3 - low) / (high - low)
        rescale = {"RescaleSlope": str(slope), "RescaleIntercept": "3", "photometric": photometric}
        window = {"WindowCenter": (low + high) / 2, "WindowWidth": high - low, "VOILUTFunction": "LINEAR_EXACT"}
        for attributes in (rescale, rescale | window):
            found = read(tmp_path, film(values, bits, signed=signed, syntax=syntax, **attributes))
            assert np.abs(found - expected(unit, photometric)).max() <= 1


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("bits", "high"), [(12, 15), (10, 15), (12, 13), (8, 15), (15, 15), (8, 11)])
def test_samples_that_are_left_justified(tmp_path, bits, high, signed, syntax):
    values = ramp(bits, signed)
    found = read(tmp_path, film(values, bits, high=high, signed=signed, syntax=syntax))
    unit = (values - values.min()) / np.ptp(values)
    assert np.abs(found - expected(unit)).max() <= 1


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("bits", "high"), [(12, 11), (10, 9), (12, 13), (15, 14)])
def test_bits_above_the_stored_ones_are_no_pixels(tmp_path, bits, high, signed, syntax):
    values, above = ramp(bits, signed), np.zeros((64, 64), np.int64)
    above[10:20, 10:20] = 1
    found = read(tmp_path, film(values, bits, high=high, signed=signed, syntax=syntax, above=above))
    unit = (values - values.min()) / np.ptp(values)
    assert np.abs(found - expected(unit)).max() <= 1


@pytest.mark.parametrize("photometric", PHOTOMETRIC)
@pytest.mark.parametrize("syntax", ["explicit", "implicit", "big endian", "rle"])
@pytest.mark.parametrize(
    ("signed", "vr", "value", "padding"),
    [
        (True, "SS", -2000, -2000),
        (True, "US", 63536, -2000),
        (False, "US", 40000, 40000),
        (False, "SS", -25536, 40000),
        (True, "US", 0, 0),
    ],
)
def test_padding_has_the_sign_of_the_pixels(tmp_path, signed, vr, value, padding, syntax, photometric):
    values = np.array([[padding, 100, 200, 300, 400]])
    ds = film(values, 16, signed=signed, syntax=syntax, photometric=photometric)
    ds[0x00280120] = DataElement(0x00280120, vr, value)
    grey = [0, 85, 170, 255] if photometric == "MONOCHROME2" else [255, 170, 85, 0]
    assert read(tmp_path, ds).tolist() == [[0, *grey]]


def test_padding_beyond_the_stored_bits(tmp_path):
    """No pixel has it, or it may be one that was cut: which, cannot be known."""
    assert read(tmp_path, film(np.array([[0, 100, 200]]), 12, PixelPaddingValue=65535)).tolist() == [[0, 128, 255]]
    with pytest.raises(BadImage, match="PixelPaddingValue"):
        read(tmp_path, film(np.array([[0, 100, 4095]]), 12, PixelPaddingValue=65535))


def table(vr, descriptor, entries, data_vr="OW"):
    item = Dataset()
    item.add(DataElement(0x00283002, vr, descriptor))
    item.add(DataElement(0x00283006, data_vr, entries))
    return Sequence([item])


SIGNED_RAMP = np.array([[-2048, -1024, 0, 1024, 2047]])
FIRST = [
    (SIGNED_RAMP, True, "SS", -2048),
    (SIGNED_RAMP, True, "US", 63488),
    (SIGNED_RAMP + 2048 + 40000, False, "SS", -25536),
    (SIGNED_RAMP + 2048 + 40000, False, "US", 40000),
    (SIGNED_RAMP + 2048, False, "US", 0),
]


@pytest.mark.parametrize("key", ["VOILUTSequence", "ModalityLUTSequence"])
@pytest.mark.parametrize("photometric", PHOTOMETRIC)
@pytest.mark.parametrize(("values", "signed", "vr", "first"), FIRST)
def test_the_first_value_of_a_table_fits_the_pixels(tmp_path, values, signed, vr, first, key, photometric):
    lut = table(vr, [4096, first, 12], np.arange(4096).astype("<u2").tobytes())
    found = read(tmp_path, film(values, 16, signed=signed, photometric=photometric, **{key: lut}))
    assert found.tolist() == [expected((values - values.min()) / 4095, photometric)[0].tolist()]


@pytest.mark.parametrize(("vr", "first"), [("SS", -1024), ("US", 64512)])
def test_the_first_value_of_a_voi_table_after_a_rescale(tmp_path, vr, first):
    values = np.array([[0, 1024, 2048, 4095]])
    lut = table(vr, [4096, first, 12], np.arange(4096).astype("<u2").tobytes())
    ds = film(values, 12, VOILUTSequence=lut, RescaleSlope=1, RescaleIntercept=-1024)
    assert read(tmp_path, ds).tolist() == [[0, 64, 128, 255]]


@pytest.mark.parametrize("key", ["VOILUTSequence", "ModalityLUTSequence"])
@pytest.mark.parametrize("count", [256, 255])
@pytest.mark.parametrize("form", ["US packed", "OW packed", "US", "OW", "big endian OW packed"])
def test_entries_of_8_bits_in_a_word_each_or_two_a_word(tmp_path, form, count, key):
    entries = np.arange(count).astype(np.uint8)[::-1].copy()
    packed = np.append(entries, np.zeros(count % 2, np.uint8)).view("<u2")
    words = packed if "packed" in form else entries.astype(np.uint16)
    raw = words.astype(">u2" if "big" in form else "<u2").tobytes()
    data_vr = "US" if "US" in form else "OW"
    lut = table("US", [count, 0, 8], words.tolist() if data_vr == "US" else raw, data_vr)
    values = np.arange(count).reshape(1, -1)
    found = read(tmp_path, film(values, 12, syntax="big endian" if "big" in form else "explicit", **{key: lut}))
    assert found[0].tolist() == expected((count - 1 - values[0]) / (count - 1)).tolist()


@pytest.mark.parametrize("slope", [1, 1e-3, 1e-4, 1e-5, 1e-9])
def test_modality_values_that_span_less_than_one(tmp_path, slope):
    values = np.array([[0, 1024, 2048, 3072, 4095]])
    want = [[0, 64, 128, 191, 255]]
    rescale = {"RescaleSlope": f"{slope:g}", "RescaleIntercept": 0}
    assert read(tmp_path, film(values, 12, **rescale)).tolist() == want
    window = {"WindowCenter": f"{2048 * slope:g}", "WindowWidth": f"{4096 * slope:g}", "VOILUTFunction": "LINEAR_EXACT"}
    assert read(tmp_path, film(values, 12, **rescale, **window)).tolist() == want


def voi(**changes):
    item = {"vr": "US", "descriptor": [4, 0, 12], "entries": [0, 1, 2, 3], "data_vr": "US"} | changes
    return {"VOILUTSequence": table(**item)}


REFUSED = {
    "HighBit": {"HighBit": 9},
    "WindowWidth": {"WindowCenter": 0.2, "WindowWidth": 0.5},
    "VOILUTFunction": {"WindowCenter": 20, "WindowWidth": 50, "VOILUTFunction": "LOG"},
    "RescaleSlope": {"RescaleSlope": 0},
    "LUTData": voi(entries=[0, 1, 2]),
    "LUTDescriptor": voi(descriptor=[4, 60000, 12]),
    "PixelRepresentation": {"PixelRepresentation": 7},
    "SamplesPerPixel": {"SamplesPerPixel": 3},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_known_is_refused_by_name(tmp_path, name):
    with pytest.raises(BadImage, match=name):
        read(tmp_path, film(np.array([[0, 100, 4095]]), 12, **REFUSED[name]))


@pytest.mark.parametrize("name", ["BitsStored", "HighBit", "PixelRepresentation", "Rows", "SamplesPerPixel"])
def test_a_missing_attribute_is_named(tmp_path, name):
    ds = film(np.array([[0, 100, 4095]]), 12)
    delattr(ds, name)
    with pytest.raises(BadImage, match=f"without {name}"):
        read(tmp_path, ds)
