"""Bounds on what an image file decodes to, taken from its bytes before any decoder sees them.

A DICOM header says one size and the stream within it another; a deflated file says none. And a pixel takes from 2 to 13
bytes on its way to 8-bit grey, depending on the format.
"""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

from .bad_image import BadImage, check_extent

DEFLATED = b"1.2.840.10008.1.2.1.99"
NOT_JPEG = re.compile(rb"\x02\x00\x10\x00UI..1\.2\.840\.10008\.1\.2(?!\.4\.)", re.DOTALL)
"""a transfer syntax of native or RLE pixels"""
BESIDE = 16 * 2**20
"""bytes that a file's attributes may take beside its pixels"""
PIXEL_DATA = (b"\xe0\x7f\x10\x00OB", b"\xe0\x7f\x10\x00OW", b"\xe0\x7f\x10\x00\xff\xff\xff\xff")
"""the element's tag, explicit or implicit, little-endian as all compressed syntaxes are"""
FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7}
"""JPEG markers with the size of an image, JPEG-LS's included"""
MOST_SCANS = 100
"""of one JPEG: a progressive one has about 10, and each may cost a pass over all pixels"""


BYTES = 3
"""bytes of memory for each of the `max_megapixels` million pixels: the file, and all between it and 8-bit grey"""
BASELINE = {0xC0, 0xC1}
"""JPEG frames that are decoded row by row, if they have one scan"""


def check_memory(path: Path, width: int, height: int, each: float, file: int, max_megapixels: float) -> None:
    """Refuse, before it is decoded, an image that would take more memory than grey ones of its number of pixels may.

    Args:
        each: bytes a pixel takes while it is decoded.
        file: bytes that the file takes.

    Raises:
        BadImage: more than `BYTES` for each of `max_megapixels` million pixels and 16 MiB.
    """
    need = width * height * each + file
    if need > BYTES * max_megapixels * 1e6 + BESIDE:
        raise BadImage(
            path,
            f"{width} × {height} pixels of its kind take {need / 1e6:,.0f} MB to decode, more than {BYTES} bytes for "
            f"each of max_megapixels {max_megapixels:g} million; raise the limit, or save it as 8-bit grey",
        )


def bytes_a_pixel(data: bytes) -> float:
    """Bytes that a pixel of a PNG or JPEG takes while Pillow makes it 8-bit grey, measured as process memory.

    Pillow keeps 1 byte a grey pixel, 2 of 16 bits and 4 of any colour; the grey result takes 1 more. A JPEG of several
    scans has all its coefficients in memory, 2 bytes each.
    """
    if data.startswith(b"\x89PNG"):
        depth, colour = data[24:25], data[25:26]
        return 3 if depth == b"\x10" else 2 if colour in (b"\x00", b"\x03") else 5
    marker, factors = _jpeg_frame(data, 2)
    coefficients = 0.0
    if marker not in BASELINE or data.count(b"\xff\xda") > 1:
        largest = max((factor >> 4) * (factor & 15) for factor in factors) or 1
        coefficients = 2 * sum((factor >> 4) * (factor & 15) for factor in factors) / largest
    return coefficients + (2 if len(factors) == 1 else 5)


def check_streams(path: Path, data: bytes, max_megapixels: float) -> None:
    """Refuse a DICOM file that unpacks to more than its limit.

    Raises:
        BadImage: a deflated file with more bytes than so many pixels and their attributes take, or a JPEG, JPEG-LS or
            JPEG 2000 stream of more than `max_megapixels` million pixels or of very many scans.
    """
    if DEFLATED in data[132:1024]:
        _check_deflated(path, data, int(2e6 * max_megapixels) + BESIDE)
        return
    if NOT_JPEG.search(data, 132, 1024):  # its pixels can look like a stream
        return
    start = max(data.find(tag) for tag in PIXEL_DATA)
    if start >= 0 and (size := stream_size(data, start)) is not None:
        width, height, _ = size
        check_extent(path, width, height, max_megapixels)
        check_scans(path, data[start:])


def check_scans(path: Path, data: bytes) -> None:
    """Refuse a JPEG of very many scans: a few bytes of a scan make a decoder visit every pixel.

    Raises:
        BadImage: more than `MOST_SCANS`.
    """
    if data.count(b"\xff\xda") > MOST_SCANS:  # within a scan no other byte than 0 or a marker follows ff
        raise BadImage(path, f"a JPEG of more than {MOST_SCANS} scans; save it anew")


def stream_size(data: bytes, start: int = 0) -> tuple[int, int, int] | None:
    """Width, height and components that the first JPEG, JPEG-LS or JPEG 2000 stream after `start` declares."""
    codestream = data.find(b"\xff\x4f\xff\x51", start)
    jpeg = data.find(b"\xff\xd8\xff", start)
    try:
        if codestream >= 0 and (jpeg < 0 or codestream < jpeg):
            width, height, left, top = struct.unpack_from(">4I", data, codestream + 8)
            (components,) = struct.unpack_from(">H", data, codestream + 40)
            # What a decoder reserves lies between the origin of the grid and its end.
            return max(width, width - left), max(height, height - top), components
        if jpeg >= 0:
            return _jpeg_size(data, jpeg + 2)
    except struct.error:  # cut short; the decoder says so
        pass
    return None


def _jpeg_size(data: bytes, at: int) -> tuple[int, int, int] | None:
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = struct.unpack_from(">xBH", data, at)
        if marker in FRAMES:
            height, width, components = struct.unpack_from(">HHB", data, at + 5)
            return width, height, components
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        at += 2 + max(length, 2)
    return None


def _jpeg_frame(data: bytes, at: int) -> tuple[int, bytes]:
    """Marker of a JPEG's frame, and the sampling factors of its components, 4 bits across and 4 down each."""
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in FRAMES:
            return marker, data[at + 11 : at + 2 + length : 3] or b"\x11"
        at += 1 if marker == 0xFF else 2 + max(length, 2)
    return 0, b"\x11"


def _check_deflated(path: Path, data: bytes, most: float) -> None:
    """Count what the file inflates to, a piece at a time."""
    if len(data) < 144 or data[132:136] != b"\x02\x00\x00\x00":
        raise BadImage(path, "a deflated DICOM file without its group length")
    inflate, found = zlib.decompressobj(-zlib.MAX_WBITS), 0
    rest = data[144 + struct.unpack_from("<I", data, 140)[0] :]
    try:
        while rest and not inflate.eof:
            piece = inflate.decompress(rest, 2**20)
            if not found:
                most = min(most, _header_bytes(piece))
            found += len(piece)
            rest = inflate.unconsumed_tail
            if found > most:
                raise BadImage(
                    path, f"inflates to more than {int(most) >> 20} MiB; raise max_megapixels or save it anew"
                )
    except zlib.error:
        raise BadImage(path, "a deflated DICOM file that is damaged") from None


def _header_bytes(beginning: bytes) -> float:
    """Most bytes that a file of this header's Rows and Columns takes; infinite where it does not begin with them."""
    sides = [
        [struct.unpack_from("<H", beginning, found.end())[0] for found in re.finditer(tag, beginning[:-2])]
        for tag in (rb"\x28\x00\x10\x00US\x02\x00", rb"\x28\x00\x11\x00US\x02\x00")
    ]
    return 4 * max(sides[0]) * max(sides[1]) + BESIDE if all(sides) else float("inf")
