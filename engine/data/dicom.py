"""DICOM radiographs as properly exposed 8-bit grey; the one file that imports pydicom.

No message holds the value of a DICOM attribute, and pydicom's own warnings and log, which can, are kept
quiet.

GDCM must be loaded after Pillow (it is, here): loaded first, its own zlib takes over the system's symbols
and the next PNG corrupts the heap. A corrupt JPEG stream can make GDCM end the process; a loader process is
reported dead.

Damage within compressed pixels mostly decodes to wrong ones: of 16 random bytes in an image, JPEG-LS notices 40 of 40,
RLE 11, JPEG Lossless 2, JPEG 2000 none.
"""

from __future__ import annotations

import functools
import io
import logging
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..utils.errors import UserError
from .bad_image import MAX_MEGAPIXELS, BadImage, check_extent
from .bounds import check_memory, check_streams, stream_size
from .dicom_grey import blocks, render

if TYPE_CHECKING:
    from pydicom import Dataset

NEEDED = (
    "PhotometricInterpretation",
    "SamplesPerPixel",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
)
NATIVE, COMPRESSED = 4.5, 9
"""bytes that a pixel of 16 bits takes beside twice the file, measured as process memory (gdcm's JPEG takes most)"""
NOT_GREY = "a DICOM file whose pixels are not 8 to 16 bits of grey"


def read_dicom(
    path: str | Path, data: bytes | None = None, *, max_megapixels: float = MAX_MEGAPIXELS
) -> NDArray[np.uint8]:
    """Read a one-frame monochrome DICOM image; uint8 (h,w), air dark and bone bright.

    Stored values of 8 to 16 bits, signed or not, go through `dicom_grey.render`.

    Args:
        path: the file; named in errors.
        data: its content, if already read.
        max_megapixels: million pixels that are still decoded.

    Raises:
        UserError: pydicom is not installed.
        BadImage: not DICOM, no pixels, truncated, colour, several frames, too large, no decoder, or an attribute that
            is missing, unusable or of unknown meaning.
    """
    path = Path(path)
    pydicom = _pydicom()
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            data = path.read_bytes() if data is None else data
            check_streams(path, data, max_megapixels)
            ds = pydicom.dcmread(io.BytesIO(data))
            _check(path, ds, max_megapixels)
            compressed = ds.file_meta.TransferSyntaxUID.is_encapsulated
            each = COMPRESSED if compressed else NATIVE * max(1, ds.BitsAllocated / 16)
            check_memory(path, ds.Columns, ds.Rows, each, 2 * len(data), max_megapixels)
            return render(path, _stored(path, ds), ds)
    except (BadImage, MemoryError):
        raise
    except FileNotFoundError:
        raise BadImage(path, "no such file") from None
    except pydicom.errors.InvalidDicomError:
        raise BadImage(path, "not a DICOM file: bytes 129 to 132 are not DICM (see PS3.10); write it anew") from None
    except BaseException as error:  # on broken files pydicom raises any type; its text can hold attribute values
        # A panic in a decoder written in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadImage(path, f"cannot be decoded as DICOM ({type(error).__name__})") from None


@functools.cache
def _pydicom() -> ModuleType:
    try:
        import pydicom
        import pydicom.errors
        import pydicom.pixels
    except ModuleNotFoundError:
        raise UserError("reading DICOM needs pydicom: pip install 'pspg-engine[dicom]'") from None
    logging.getLogger("pydicom").propagate = False
    return pydicom


def _check(path: Path, ds: Dataset, max_megapixels: float) -> None:
    from pydicom.pixels import get_decoder
    from pydicom.pixels.utils import get_expected_length
    from pydicom.uid import RLELossless

    if "PixelData" not in ds:
        raise BadImage(path, "a DICOM file without pixels, or cut short")
    missing = [name for name in NEEDED if ds.get(name) is None]
    if "TransferSyntaxUID" not in ds.file_meta:
        missing.append("TransferSyntaxUID")
    if missing:
        raise BadImage(path, f"a DICOM file without {', '.join(missing)}, so its pixels are not known")
    if int(ds.get("NumberOfFrames") or 1) != 1:
        raise BadImage(path, "a DICOM file of several frames; give one frame a file")
    if ds.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise BadImage(path, "a DICOM file that is not monochrome")
    if ds.SamplesPerPixel != 1:
        raise BadImage(path, "SamplesPerPixel is not 1, as PhotometricInterpretation asks for")
    if ds.PixelRepresentation not in (0, 1):
        raise BadImage(path, "PixelRepresentation is neither 0 nor 1")
    if not 1 <= ds.BitsStored <= ds.HighBit + 1 <= ds.BitsAllocated:
        raise BadImage(path, "BitsStored, HighBit and BitsAllocated contradict each other")
    check_extent(path, ds.Columns, ds.Rows, max_megapixels)
    syntax = ds.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated and len(ds.PixelData) < get_expected_length(ds):
        raise BadImage(path, "cut short")
    if syntax.is_encapsulated and not get_decoder(syntax).is_available:
        raise BadImage(path, "compressed in a way that needs a decoder: pip install 'pspg-engine[dicom]'")
    if syntax.is_encapsulated and syntax != RLELossless:
        _check_size(path, ds)


def _check_size(path: Path, ds: Dataset) -> None:
    """A decoder reserves what the stream asks for, and pydicom compares it with the header only after.

    Raises:
        BadImage: the compressed stream says a far larger size than the header, or several components.
    """
    from pydicom.encaps import get_frame

    size, pixels = stream_size(get_frame(ds.PixelData, 0, number_of_frames=1)), int(ds.Columns) * int(ds.Rows)
    if size is not None and size[0] * size[1] > 2 * pixels + 2**20:  # a grid may begin beside the image
        header = f"Columns × Rows are {ds.Columns} × {ds.Rows}"
        raise BadImage(path, f"{header}, its compressed pixels {size[0]} × {size[1]}; export it anew")
    if size is not None and size[2] != 1:
        raise BadImage(path, f"a DICOM file whose pixels have {size[2]} components; it must be grey")


def _stored(path: Path, ds: Dataset) -> NDArray[Any]:
    """Stored values (h,w): the BitsStored bits below and including HighBit, with the sign of PixelRepresentation.

    pydicom masks native pixels only, and takes HighBit to be BitsStored - 1.

    Raises:
        BadImage: not grey of at most 16 bits, or the compressed stream contradicts the attributes.
    """
    from pydicom.pixels import get_decoder

    precision, signed_stream = _stream(ds)
    settings: Any = {
        "correct_unused_bits": False,
        "apply_j2k_sign_correction": False,
        "apply_jls_sign_correction": False,
        "bits_stored": min(max(precision, int(ds.BitsStored)), int(ds.BitsAllocated)),  # GDCM clears the others
    }
    raw, _ = get_decoder(ds.file_meta.TransferSyntaxUID).as_array(ds, raw=True, **settings)
    if raw.ndim != 2 or not np.issubdtype(raw.dtype, np.integer):
        raise BadImage(path, NOT_GREY)
    negative = signed_stream if precision < ds.BitsStored else bool(ds.PixelRepresentation)
    values = np.empty(raw.shape, dtype=f"{'i' if negative else 'u'}{raw.dtype.itemsize}")
    for rows in blocks(raw.shape):
        values[rows] = _values(path, raw[rows], ds, precision, signed_stream)
    if int(values.max()) - int(values.min()) > 65535:
        raise BadImage(path, NOT_GREY)
    return values


def _values(path: Path, raw: NDArray[Any], ds: Dataset, precision: int, signed_stream: bool) -> NDArray[Any]:
    """Stored values of decoded words; raises like `_stored`."""
    pattern: NDArray[Any] = raw.astype(f"u{raw.dtype.itemsize}").astype(
        np.int32 if raw.dtype.itemsize <= 2 else np.int64
    )
    bits, shift, signed = int(ds.BitsStored), int(ds.HighBit) + 1 - int(ds.BitsStored), bool(ds.PixelRepresentation)
    if precision < bits:  # the stream's samples are whole values
        negative = pattern >> (precision - 1) & 1
        if signed != signed_stream and negative.any():
            raise BadImage(path, "PixelRepresentation and BitsStored contradict the compressed pixels")
        return raw.astype(pattern.dtype) if signed_stream else pattern
    if shift and precision <= ds.HighBit:
        if precision > bits:
            raise BadImage(path, "HighBit and BitsStored contradict the compressed pixels")
        shift = 0  # the stream's samples are as wide as a value
    values: NDArray[Any] = pattern >> shift & (2**bits - 1)
    if signed:
        values -= values >> (bits - 1) << bits
    return values


def _stream(ds: Dataset) -> tuple[int, bool]:
    """Bits of a decoded sample, and whether they are signed by the compressed stream itself.

    Native and RLE pixels are whole words of BitsAllocated; a stream that does not say has BitsStored.
    """
    from pydicom.encaps import get_frame
    from pydicom.pixels.utils import get_j2k_parameters
    from pydicom.uid import JPEG2000TransferSyntaxes, RLELossless

    syntax = ds.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated or syntax == RLELossless:
        return int(ds.BitsAllocated), False
    stream = get_frame(ds.PixelData, 0, number_of_frames=1)
    if syntax in JPEG2000TransferSyntaxes:
        found = get_j2k_parameters(stream)
        return found.get("precision", int(ds.BitsStored)), found.get("is_signed", bool(ds.PixelRepresentation))
    return _jpeg_precision(stream) or int(ds.BitsStored), False


def _jpeg_precision(stream: bytes) -> int | None:
    """Bits of a sample of a JPEG or JPEG-LS stream, by its frame header; None: there is none."""
    at = 2
    while at + 5 <= len(stream) and stream[at] == 0xFF:
        marker, length = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return stream[at + 4]
        at += 1 if marker == 0xFF else 2 + length
    return None
