"""PNG files with rows missing, and with much metadata."""

import struct
import zlib

import numpy as np
import pytest

from pspg.engine.data.bad_image import BadImage
from pspg.engine.data.images import read_image
from pspg.engine.data.png import PASSES, lacks_rows
from pspg.engine.data.strict import read_strictly

WIDTH, HEIGHT = 48, 64
COLOURS = {(8, 0): 48, (16, 0): 96, (8, 2): 144, (1, 0): 6, (2, 0): 12, (4, 0): 24, (8, 3): 48, (8, 4): 96, (8, 6): 192}
"""(depth, colour type) → bytes a row"""


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(raw, depth=8, colour=0, interlaced=0, extra=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour, 0, 0, interlaced))
    palette = chunk(b"PLTE", bytes(range(256)) * 3) if colour == 3 else b""
    pixels = zlib.compress(raw)
    parts = chunk(b"IDAT", pixels[:9]) + chunk(b"IDAT", b"") + chunk(b"IDAT", pixels[9:])
    return b"\x89PNG\r\n\x1a\n" + header + palette + extra + parts + chunk(b"IEND", b"")


@pytest.mark.parametrize("read", [read_image, read_strictly])
@pytest.mark.parametrize(("depth", "colour"), COLOURS)
def test_missing_rows_are_refused_and_not_shown_black(tmp_path, depth, colour, read):
    row, path = b"\0" + b"\x81" * COLOURS[depth, colour], tmp_path / "a.png"
    for rows in (HEIGHT, HEIGHT + 1):
        path.write_bytes(png(row * rows, depth, colour))
        assert np.asarray(read(path)).all(axis=1).any() or depth < 8
    for rows in (1, 40, HEIGHT - 1):
        path.write_bytes(png(row * rows, depth, colour))
        with pytest.raises(BadImage, match=r"fewer rows of pixels than its header says|image file is truncated"):
            read(path)


def test_rows_that_are_black_are_no_missing_rows(tmp_path):
    row, black = b"\0" + b"\x81" * WIDTH, b"\0" * (WIDTH + 1)
    (tmp_path / "a.png").write_bytes(png(row * 32 + black * 32))
    assert np.asarray(read_image(tmp_path / "a.png"))[32:].max() == 0


def test_missing_rows_of_an_interlaced_image(tmp_path):
    path = tmp_path / "a.png"
    lines = [
        b"\0" + b"\x81" * len(range(left, WIDTH, across))
        for left, top, across, down in PASSES
        for _ in range(top, HEIGHT, down)
    ]
    path.write_bytes(png(b"".join(lines), interlaced=1))
    assert np.asarray(read_image(path)).min() == 0x81
    for missing in (1, 20):
        path.write_bytes(png(b"".join(lines[:-missing]), interlaced=1))
        with pytest.raises(BadImage, match="fewer rows"):
            read_image(path)


def test_no_more_is_unpacked_than_the_header_asks_for():
    assert not lacks_rows(png(b"\0" * 10**8))


LONG = zlib.compress(b"a" * 1_200_000)
METADATA = {
    "profile": chunk(b"iCCP", b"p\0\0" + LONG),
    "packed text": chunk(b"zTXt", b"c\0\0" + LONG),
    "international text": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
    "much text": chunk(b"tEXt", b"c\0" + b"a" * 10**6) * 70,
    "broken packed text": chunk(b"zTXt", b"c\0\0junk"),
}


@pytest.mark.parametrize("kind", METADATA)
def test_much_metadata_does_no_harm(tmp_path, kind):
    turned = chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")
    (tmp_path / "a.png").write_bytes(png((b"\0" + b"\x81" * WIDTH) * HEIGHT, extra=METADATA[kind] + turned))
    assert read_image(tmp_path / "a.png").size == (HEIGHT, WIDTH)
