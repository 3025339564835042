"""Stored values of a DICOM image to grey: the pipeline of PS3.3 C.11, on a table of the values, not on every pixel.

What an attribute leaves open is refused with its name. No message holds the value of an attribute.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bad_image import BadImage

Dataset = Any
"""a pydicom Dataset; `dicom.py` alone imports pydicom"""
Values = NDArray[np.float64]
BLOCK = 2**20
"""pixels that are handled at a time, so that what is made of them on the way takes no memory to speak of"""


def blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of an image (h,w), about `BLOCK` pixels at a time."""
    rows = max(1, BLOCK // max(1, shape[1]))
    return (slice(start, start + rows) for start in range(0, shape[0], rows))


def render(path: Path, stored: NDArray[np.integer], ds: Dataset) -> NDArray[np.uint8]:
    """Grey (h,w), uint8, air dark and bone bright, of stored values (h,w) whose range is below 65536.

    Modality LUT or rescale; the first VOI LUT, else the first window, else the range of the pixels; MONOCHROME1 is
    inverted last; padding pixels are black.

    Raises:
        BadImage: an attribute that cannot be used, or whose meaning cannot be known.
    """
    lowest, highest = int(stored.min()), int(stored.max())
    values = np.arange(lowest, highest + 1)
    shown = np.zeros(len(values), dtype=bool)
    for rows in blocks(stored.shape):
        shown[stored[rows].astype(np.int64) - lowest] = True
    padding = _padding(path, values, shown, ds)
    grey = _to_unit(path, values, shown & ~padding, ds)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        grey = 1 - grey
    grey[padding] = 0
    table, image = np.rint(grey * 255).astype(np.uint8), np.empty(stored.shape, dtype=np.uint8)
    for rows in blocks(stored.shape):
        image[rows] = table[stored[rows].astype(np.int64) - lowest]
    return image


def stored_range(ds: Dataset) -> tuple[int, int]:
    """Smallest and largest value that BitsStored bits hold."""
    bits = int(ds.BitsStored)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if ds.PixelRepresentation else (0, 2**bits - 1)


def _padding(path: Path, values: NDArray[np.int64], shown: NDArray[np.bool_], ds: Dataset) -> NDArray[np.bool_]:
    """Which values are padding.

    The two attributes have the pixels' sign, whatever their VR says. A value that no pixel can have is no padding,
    unless it may be one whose upper bits were cut.
    """
    limits = []
    low, high = stored_range(ds)
    for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        if ds.get(name) is None:
            continue
        (value,) = _integers(path, ds, name, 1)
        value = _signed(value) if ds.PixelRepresentation else value % 2**16
        if not low <= value <= high:
            cut = low + (value - low) % (high - low + 1)
            if shown[values == cut].any():
                raise BadImage(path, f"{name} needs more bits than BitsStored, so its pixels are not known")
        limits.append(value)
    if not limits or ds.get("PixelPaddingValue") is None:
        return np.zeros(len(values), dtype=bool)
    return (values >= min(limits)) & (values <= max(limits))


def _to_unit(path: Path, values: NDArray[np.int64], shown: NDArray[np.bool_], ds: Dataset) -> Values:
    """Stored values to [0, 1]; `shown`: those that an image's range is taken of."""
    bounds = stored_range(ds)
    if ds.get("ModalityLUTSequence"):
        table = _Table(path, "ModalityLUTSequence", ds, *bounds)
        modality, low, high = table(values), table.low, table.high
    else:
        slope, intercept = _number(path, ds, "RescaleSlope", 1), _number(path, ds, "RescaleIntercept", 0)
        if slope == 0:
            raise BadImage(path, "RescaleSlope is 0")
        modality = (values * slope + intercept).astype(np.float64)
        low, high = sorted(bound * slope + intercept for bound in bounds)
    if ds.get("VOILUTSequence"):
        table = _Table(path, "VOILUTSequence", ds, low, high)
        return _spread(table(modality), table.low, table.high)
    if ds.get("WindowCenter") is None or ds.get("WindowWidth") is None:
        seen = modality[shown]
        return _spread(modality, seen.min(), seen.max()) if len(seen) else np.zeros(len(values))
    return _window(path, modality, ds)


def _spread(values: Values, low: float, high: float) -> Values:
    """low to 0, high to 1; all to 0 where they are equal."""
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros(len(values))


def _window(path: Path, values: Values, ds: Dataset) -> Values:
    """PS3.3 C.11.2.1.2 and .3."""
    center, width = (_number(path, ds, name) for name in ("WindowCenter", "WindowWidth"))
    function = str(ds.get("VOILUTFunction") or "LINEAR").strip().upper()
    if function == "LINEAR":
        if width < 1:
            raise BadImage(path, "WindowWidth is below 1, which VOILUTFunction LINEAR does not allow")
        return _ramp(values, center - 0.5, width - 1)
    if function not in ("LINEAR_EXACT", "SIGMOID"):
        raise BadImage(path, "VOILUTFunction is not LINEAR, LINEAR_EXACT or SIGMOID")
    if width <= 0:
        raise BadImage(path, "WindowWidth is not positive")
    return (
        _ramp(values, center, width) if function == "LINEAR_EXACT" else 1 / (1 + np.exp(-4 * (values - center) / width))
    )


def _ramp(values: Values, center: float, width: float) -> Values:
    if width == 0:
        return (values > center).astype(np.float64)
    return np.clip((values - center) / width + 0.5, 0, 1)


class _Table:
    """A modality or VOI LUT; `low` and `high` are its smallest and largest entry.

    pydicom's own functions wrap indices of LUTs with 8-bit entries and refuse some depths.
    """

    def __init__(self, path: Path, sequence: str, ds: Dataset, lowest: float, highest: float) -> None:
        """lowest, highest: bounds of the values that may be looked up."""
        item = ds[sequence].value[0]
        self.path = path
        count, first, bits = _integers(path, item, "LUTDescriptor", 3)
        count = count % 2**16 or 2**16
        self.entries = self._data(item, count, bits, ds)
        self.first = self._first(first, count, lowest, highest)
        self.low, self.high = float(self.entries.min()), float(self.entries.max())

    def __call__(self, values: NDArray[Any]) -> Values:
        index = np.clip(np.rint(values).astype(np.int64) - self.first, 0, len(self.entries) - 1)
        return self.entries[index]

    def _first(self, first: int, count: int, lowest: float, highest: float) -> int:
        """The first value mapped: its VR (US or SS) is often wrong, so the sign is the one that fits the values."""
        starts = {_signed(first), first % 2**16}
        fits = [start for start in starts if start <= highest and start + count > lowest]
        if len(fits) == 1:
            return fits[0]
        if first in fits and first >= 0 and lowest >= 0:
            return first
        kind = "can be signed or not" if fits else "is beyond all pixels"
        raise BadImage(self.path, f"LUTDescriptor's first mapped value {kind}")

    def _data(self, item: Dataset, count: int, bits: int, ds: Dataset) -> Values:
        """Entries: a word each, or two 8-bit ones a word, the first in its lower half."""
        data = item.get("LUTData")
        if data is None:
            raise BadImage(self.path, "LUTData is missing")
        if isinstance(data, bytes):
            order = "<" if ds.file_meta.TransferSyntaxUID.is_little_endian else ">"
            words = np.frombuffer(data[: len(data) // 2 * 2], f"{order}u2").astype(np.int64)
        else:
            words = np.atleast_1d(np.asarray(data, dtype=np.int64))
        if len(words) < count and bits <= 8 and len(words) == (count + 1) // 2:
            words = np.stack([words & 255, words >> 8 & 255], axis=1).reshape(-1)
        if len(words) < count:
            raise BadImage(self.path, "LUTData has fewer entries than LUTDescriptor says")
        words = words[:count]
        if words.min() < 0:
            raise BadImage(self.path, "LUTData holds negative entries")
        return words.astype(np.float64)


def _integers(path: Path, ds: Dataset, name: str, count: int) -> list[int]:
    """The `count` integers of an attribute.

    Raises:
        BadImage: others, more or fewer.
    """
    try:
        values = [int(value) for value in np.atleast_1d(ds[name].value)]
    except Exception:  # on broken values pydicom raises any type
        values = []
    if len(values) != count:
        raise BadImage(path, f"{name} is not {count} whole number{'s' if count > 1 else ''}")
    return values


def _number(path: Path, ds: Dataset, name: str, default: float | None = None) -> float:
    """The first number of an attribute; the default where it is absent or empty.

    Raises:
        BadImage: something else.
    """
    try:
        if default is not None and ds.get(name) is None:
            return default
        value = float(np.atleast_1d(ds[name].value)[0])
    except Exception:
        value = np.nan
    if not np.isfinite(value):
        raise BadImage(path, f"{name} is not a number")
    return value


def _signed(value: int) -> int:
    """The 16 bits of an integer as a signed one."""
    return (value + 2**15) % 2**16 - 2**15
