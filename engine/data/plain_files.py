"""Image files that any decoder reads alike: plain and whole by their structure, without decoding them.

Everything else (DICOM, 16-bit PNG, palettes, transparency, interlacing, CMYK, turned by EXIF, cut short, damaged, not
an image) is for `images.read_image`, which decodes it or says what is wrong with it.
"""

from __future__ import annotations

import struct
import zlib

from PIL import Image

from .images import JPEG_MAGIC
from .png import PNG_MAGIC

PLAIN_PNG = {b"IHDR", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME", b"tEXt"}
"""chunks that change no pixel"""
PLAIN_FRAMES = {0xC0, 0xC1, 0xC2}
"""JPEG markers: baseline, extended and progressive frames, Huffman-coded"""
OTHER_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
"""lossless, hierarchical, arithmetically coded"""
START_OF_SCAN, APP1, APP14 = 0xDA, 0xE1, 0xEE
ORIENTATION = 0x0112
"""the EXIF tag"""


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Width and height, pixels, of a plain JPEG or PNG; None: of another kind."""
    try:
        if data[128:132] == b"DICM":
            return None
        return _png_size(data) if data.startswith(PNG_MAGIC) else _jpeg_size(data)
    except (struct.error, IndexError):  # it ends within a field
        return None


def _png_size(data: bytes) -> tuple[int, int] | None:
    """Size of an 8-bit grey or RGB PNG, not interlaced, with every chunk whole."""
    at, view, size = len(PNG_MAGIC), memoryview(data), None
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind not in PLAIN_PNG or struct.unpack_from(">I", data, end - 4)[0] != zlib.crc32(view[at + 4 : end - 4]):
            return None
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, at + 8)
            if depth != 8 or colour not in (0, 2) or interlaced:
                return None
            size = (width, height) if width and height else None
        if kind == b"tEXt" and b"profile" in data[at + 8 : end].lower():  # EXIF as text
            return None
        if kind == b"IEND":
            return size
        at = end
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Size of an 8-bit grey or YCbCr JPEG, upright, that has a scan and ends where it should."""
    if not (data.startswith(JPEG_MAGIC) and data.endswith(b"\xff\xd9")):
        return None
    at, size = 2, None
    while True:
        prefix, marker, length = struct.unpack_from(">BBH", data, at)
        segment = data[at + 4 : at + 2 + length]
        if marker == START_OF_SCAN:
            return size
        if marker in PLAIN_FRAMES:
            depth, height, width, components = struct.unpack_from(">BHHB", segment)
            colour = {1: True, 3: segment[6::3] != b"RGB"}.get(components, False)
            if depth != 8 or not colour:
                return None
            size = (width, height) if width and height else None
        if (
            prefix != 0xFF
            or marker in OTHER_FRAMES
            or (marker == APP1 and _turned(segment))
            or (marker == APP14 and segment.startswith(b"Adobe") and segment[11] != 1)  # not YCbCr
        ):
            return None
        at += 2 + length


def _turned(segment: bytes) -> bool:
    """The APP1 segment of a JPEG may ask to turn the image."""
    if segment.startswith(b"Exif\0\0"):
        exif = Image.Exif()
        try:
            exif.load(segment)
            return exif.get(ORIENTATION, 1) != 1
        except Exception:  # on broken EXIF Pillow raises almost any type
            return True
    return b"rientation" in segment  # XMP
