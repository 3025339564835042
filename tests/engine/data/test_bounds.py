"""Files of a few hundred bytes that unpack to gigabytes are refused before they are unpacked."""

from __future__ import annotations

import gzip
import io
import struct
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from pspg.engine.data import manifest, tables
from pspg.engine.data.bad_image import BadImage
from pspg.engine.data.bounds import check_streams, stream_size
from pspg.engine.data.images import read_image
from pspg.engine.utils.errors import UserError


def jpeg(width: int, height: int, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("L", (16, 16)).save(out, kind, **({"no_jp2": True} if kind == "JPEG2000" else {}))
    content = bytearray(out.getvalue())
    if kind == "JPEG2000":
        at = content.find(b"\xff\x51")
        struct.pack_into(">II", content, at + 6, width, height)
        struct.pack_into(">II", content, at + 22, width, height)
    else:
        at = content.find(b"\xff\xc0")
        struct.pack_into(">HH", content, at + 5, height, width)
    return bytes(content)


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
@pytest.mark.parametrize("size", [(12_000, 12_000), (65_000, 65_000), (1, 65_535)])
def test_streams_say_their_own_size(kind: str, size: tuple[int, int]) -> None:
    assert stream_size(jpeg(*size, kind)) == (*size, 1)
    syntax = b"\x02\x00\x10\x00UI\x16\x001.2.840.10008.1.2.4." + (b"50" if kind == "JPEG" else b"90")
    data = bytes(128) + b"DICM" + syntax + b"\xe0\x7f\x10\x00OB" + bytes(20) + jpeg(*size, kind)
    if size[0] * size[1] > 1e6:
        with pytest.raises(BadImage, match="max_megapixels"):
            check_streams(Path("a.dcm"), data, 1)
    else:
        check_streams(Path("a.dcm"), data, 1)
    for length in range(132, len(data), 7):
        with suppress(BadImage):
            check_streams(Path("a.dcm"), data[:length], 1)
    # Other syntaxes hold no such stream, whatever their bytes look like.
    check_streams(Path("a.dcm"), data.replace(b"1.2.4.", b"1.2.5\0"), 1)


def test_a_deflated_file_is_counted_not_kept() -> None:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = b"".join(deflate.compress(bytes(2**20)) for _ in range(300)) + deflate.flush()
    meta = b"\x02\x00\x10\x00UI\x16\x001.2.840.10008.1.2.1.99"
    data = bytes(128) + b"DICM" + b"\x02\x00\x00\x00UL\x04\x00" + struct.pack("<I", len(meta)) + meta + body
    tracemalloc.start()
    with pytest.raises(BadImage, match="inflates to more than"):
        check_streams(Path("a.dcm"), data, 1)
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()
    check_streams(Path("a.dcm"), data, 1000)
    sides = b"\x28\x00\x10\x00US\x02\x00\x10\x00\x28\x00\x11\x00US\x02\x00\x10\x00"
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    small = deflate.compress(sides) + b"".join(deflate.compress(bytes(2**20)) for _ in range(20)) + deflate.flush()
    with pytest.raises(BadImage, match="inflates to more than 16 MiB"):
        check_streams(Path("a.dcm"), data[: len(data) - len(body)] + small, 100)
    with pytest.raises(BadImage, match="damaged"):
        check_streams(Path("a.dcm"), data[: len(data) - len(body)] + b"\xff" * 50, 1)


def test_endless_lines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LONGEST_LINE", 1000)
    monkeypatch.setattr(manifest, "LONGEST_LINE", 1000)
    with gzip.open(tmp_path / "a.csv.gz", "wb") as file:
        file.write(b"a," * 100_000)
    with pytest.raises(UserError, match=r"a\.csv\.gz:1: longer than"):
        tables.Table(tmp_path / "a.csv.gz")
    with gzip.open(tmp_path / "b.csv.gz", "wb") as file:
        file.write(b'"a\n",' * 1000)
    with pytest.raises(UserError, match=r"b\.csv\.gz:201: longer than"):
        tables.Table(tmp_path / "b.csv.gz")
    (tmp_path / "c.csv").write_bytes(b"a,b\n" + b'"1\n2",3\n' * 1000)
    assert len(list(tables.Table(tmp_path / "c.csv"))) == 1000
    (tmp_path / "a.jsonl").write_bytes(b"{" * 100_000)
    with pytest.raises(UserError, match=r"a\.jsonl:1: longer than"):
        manifest.load_manifest(tmp_path / "a.jsonl", need="image")


def test_a_jpeg_of_very_many_scans_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("L", (64, 64)).save(out, "JPEG", progressive=True)
    content = out.getvalue()
    scan = content[content.rfind(b"\xff\xda") : -2]
    assert read_image(tmp_path / "a.jpg", content).size == (64, 64)
    with pytest.raises(BadImage, match="more than 100 scans"):
        read_image(tmp_path / "a.jpg", content[:-2] + scan * 5000 + b"\xff\xd9")


@pytest.mark.parametrize("syntax", [b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"])
def test_native_and_rle_pixels_may_look_like_a_stream(syntax: bytes) -> None:
    meta = b"\x02\x00\x10\x00UI" + struct.pack("<H", len(syntax)) + syntax
    pixels = b"\xe0\x7f\x10\x00OW" + bytes(6) + jpeg(65_000, 65_000) + b"\xff\xda" * 200
    check_streams(Path("a.dcm"), bytes(128) + b"DICM" + meta + pixels, 1)
