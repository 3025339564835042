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
from .bounds import check_streams

if TYPE_CHECKING:
    from pydicom import Dataset


def read_dicom(
    path: str | Path, data: bytes | None = None, *, max_megapixels: float = MAX_MEGAPIXELS
) -> NDArray[np.uint8]:
    """Read a one-frame monochrome DICOM image; uint8 (h,w), air dark and bone bright.

    The grey pipeline of DICOM PS3.3 C.11: modality LUT or rescale, then the first VOI LUT, else the first
    window, else the range of the pixels; MONOCHROME1 is inverted last; padding pixels are black. Stored
    values of 8 to 16 bits, signed or not. The pipeline runs on a table of the stored values, not on every
    pixel.

    Args:
        path: the file; named in errors.
        data: its content, if already read.
        max_megapixels: million pixels that are still decoded.

    Raises:
        UserError: pydicom is not installed.
        BadImage: not DICOM, no pixels, truncated, colour, several frames, too large, no decoder, an unusable
            window.
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
            stored = ds.pixel_array
            return _render(path, stored, ds)
    except (BadImage, MemoryError):
        raise
    except FileNotFoundError:
        raise BadImage(path, "no such file") from None
    except pydicom.errors.InvalidDicomError:
        raise BadImage(path, "not a DICOM file") from None
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

    if "PixelData" not in ds:
        raise BadImage(path, "a DICOM file without pixels, or cut short")
    if int(ds.get("NumberOfFrames") or 1) != 1:
        raise BadImage(path, "a DICOM file of several frames; give one frame a file")
    if ds.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise BadImage(path, "a DICOM file that is not monochrome")
    check_extent(path, ds.Columns, ds.Rows, max_megapixels)
    syntax = ds.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated and len(ds.PixelData) < get_expected_length(ds):
        raise BadImage(path, "cut short")
    if syntax.is_encapsulated and not get_decoder(syntax).is_available:
        raise BadImage(path, "compressed in a way that needs a decoder: pip install 'pspg-engine[dicom]'")


def _render(path: Path, stored: NDArray[Any], ds: Dataset) -> NDArray[np.uint8]:
    lowest, highest = int(stored.min()), int(stored.max())
    if stored.ndim != 2 or not np.issubdtype(stored.dtype, np.integer) or highest - lowest > 65535:
        raise BadImage(path, "a DICOM file whose pixels are not 8 to 16 bits of grey")
    values, index = np.arange(lowest, highest + 1), stored.astype(np.int32) - lowest
    padding = _padding(values, ds)
    shown = np.zeros(len(values), dtype=bool)
    shown[index] = True
    grey = _window(path, _modality(values, ds), ds, shown & ~padding)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        grey = 1 - grey
    grey[padding] = 0
    return np.rint(grey * 255).astype(np.uint8)[index]


def _padding(values: NDArray[np.int64], ds: Dataset) -> NDArray[np.bool_]:
    first = ds.get("PixelPaddingValue")
    if first is None:
        return np.zeros(len(values), dtype=bool)
    limit = ds.get("PixelPaddingRangeLimit", first)
    return (values >= min(first, limit)) & (values <= max(first, limit))


def _modality(values: NDArray[np.int64], ds: Dataset) -> NDArray[np.float64]:
    if ds.get("ModalityLUTSequence"):
        return _lookup(values, ds.ModalityLUTSequence[0], ds)[0]
    slope, intercept = float(ds.get("RescaleSlope") or 1), float(ds.get("RescaleIntercept") or 0)
    return values.astype(np.float64) * slope + intercept


def _window(path: Path, values: NDArray[np.float64], ds: Dataset, shown: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Modality values to [0, 1] (PS3.3 C.11.2)."""
    if ds.get("VOILUTSequence"):
        grey, low, high = _lookup(values, ds.VOILUTSequence[0], ds)
        return (grey - low) / max(high - low, 1)
    if ds.get("WindowCenter") is None or ds.get("WindowWidth") is None:
        if not shown.any():
            return np.zeros(len(values))
        low, high = values[shown].min(), values[shown].max()
        return np.clip((values - low) / max(high - low, 1), 0, 1)
    center, width = (float(np.atleast_1d(ds[key].value)[0]) for key in ("WindowCenter", "WindowWidth"))
    function = str(ds.get("VOILUTFunction") or "LINEAR").upper()
    if not np.isfinite([center, width]).all() or width < (1 if function == "LINEAR" else 1e-9):
        raise BadImage(path, "a DICOM file whose window is not usable")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    if function == "LINEAR":
        center, width = center - 0.5, max(width - 1, 1e-9)
    return np.clip((values - center) / width + 0.5, 0, 1)


def _lookup(values: NDArray[Any], item: Dataset, ds: Dataset) -> tuple[NDArray[np.float64], float, float]:
    """Values through a modality or VOI LUT, and the LUT's smallest and largest entry.

    pydicom's own functions wrap indices of LUTs with 8-bit entries and refuse some depths.
    """
    (entries, first, _), data = item.LUTDescriptor, item.LUTData
    if isinstance(data, bytes):
        order = "<" if ds.file_meta.TransferSyntaxUID.is_little_endian else ">"
        data = np.frombuffer(data, "u1" if len(data) == entries else f"{order}u2")
    table = np.atleast_1d(np.asarray(data, dtype=np.float64))
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)
    return table[index], float(table.min()), float(table.max())
