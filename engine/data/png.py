"""PNG by its chunks: what Pillow lets pass in silence, and what it refuses without need."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""colour type → values a pixel"""
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""of an interlaced image: first column and row, steps to the next ones"""
METADATA = {b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"sPLT"}
MAX_METADATA = 2**20
"""bytes of a chunk of metadata, unpacked, that are passed on: Pillow refuses the image of a larger one"""


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind of each chunk, and where its content begins and ends; the last may end beyond the data.

    Raises:
        struct.error: the data end within a chunk's header.
    """
    at = len(PNG_MAGIC)
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, at + 8, at + 8 + length
        at += 12 + length


def without_large_metadata(data: bytes) -> bytes:
    """The PNG less colour profile and the texts that are larger than Pillow allows; what turns an image is smaller."""
    view, kept = memoryview(data), 0
    parts = [view[: len(PNG_MAGIC)]]
    for kind, start, end in chunks(data):
        size = _unpacked(kind, data[start:end]) if kind in METADATA else 0
        if kind != b"iCCP" and kept + size <= MAX_METADATA:
            parts.append(view[start - 8 : end + 4])
            kept += size
        if kind == b"IEND":
            break
    same = len(data) == sum(map(len, parts))  # then a copy would only take memory
    return data if same else b"".join(parts)


def _unpacked(kind: bytes, content: bytes) -> int:
    """Bytes of a text chunk, at most one more than the limit of the packed ones."""
    _, _, rest = content.partition(b"\0")
    if kind == b"zTXt":
        rest = rest[1:]
    elif kind == b"iTXt" and rest[:1] == b"\1":
        rest = rest[2:].split(b"\0", 2)[-1]
    else:
        return len(content)
    try:
        return len(content) + len(zlib.decompressobj().decompress(rest, MAX_METADATA + 1))
    except zlib.error:
        return MAX_METADATA + 1


def lacks_rows(data: bytes) -> bool:
    """Whether the pixels unpack to fewer bytes than the header asks for; Pillow and others show the rest black."""
    need, unpack = 0, zlib.decompressobj()
    for kind, start, end in chunks(data):
        if kind == b"IHDR":
            need = _expected(data[start:end])
        if kind == b"IDAT":
            rest = data[start:end]
            while rest and need > 0 and not unpack.eof:
                need -= len(unpack.decompress(rest, min(need, 2**20)))
                rest = unpack.unconsumed_tail
        if kind == b"IEND":
            break
    return need > 0


def _expected(header: bytes) -> int:
    """Bytes of all rows, each with its filter's number."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header[:13])
    bits = depth * CHANNELS.get(colour, 1)
    parts = PASSES if interlaced else ((0, 0, 1, 1),)
    sizes = [(-((left - width) // across), -((top - height) // down)) for left, top, across, down in parts]
    return sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0 and rows > 0)
