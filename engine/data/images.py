"""Files to 8-bit grey images, to squares, to tensors."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from ..config import Resize
from ..utils.errors import first_line
from .bad_image import MAX_MEGAPIXELS, BadImage, check_extent
from .bounds import bytes_a_pixel, check_memory, check_scans
from .dicom import read_dicom
from .dicom_grey import blocks
from .png import PNG_MAGIC, lacks_rows, without_large_metadata

BIT_DEPTHS = (8, 10, 12, 14, 16)
MARKER = 0.01
"""share of the pixels below which they may be a marker that is brighter than the depth of the film"""
JPEG_MAGIC = b"\xff\xd8\xff"
PLUGINS = {PNG_MAGIC: PngImageFile, JPEG_MAGIC: JpegImageFile}


def read_image(
    path: str | Path,
    data: bytes | None = None,
    *,
    max_megapixels: float = MAX_MEGAPIXELS,
    bit_depth: int | None = None,
) -> Image.Image:
    """Read a PNG, JPEG or DICOM file as an 8-bit grey image (mode "L").

    Colour is reduced to luminance, transparency ignored, EXIF orientation applied. 16-bit grey goes through `window16`.

    Truncation is detected, rows that a PNG lacks included. Bytes corrupted within a JPEG's scan decode to wrong
    pixels; `strict.read_strictly` finds many of them.

    Args:
        path: the file; named in errors.
        data: its content, if already read.
        max_megapixels: million pixels that are still decoded, and of colour and the like fewer, see `check_memory`.
        bit_depth: true depth of a 16-bit PNG; None: told by its pixels.

    Raises:
        BadImage: missing, empty, truncated, not one of these formats, more than `max_megapixels` million pixels or the
            memory that goes with them, or a 16-bit PNG whose depth its pixels do not tell.
    """
    path = Path(path)
    data = read_bytes(path) if data is None else data
    if data[128:132] == b"DICM" or path.suffix.lower() == ".dcm":
        return Image.fromarray(read_dicom(path, data, max_megapixels=max_megapixels))
    # Pillow keeps the high byte only of these: a 12-bit radiograph would be left with 16 levels.
    if data.startswith(PNG_MAGIC) and data[24:25] == b"\x10" and data[25:26] != b"\x00":
        raise BadImage(path, "a 16-bit PNG with colour or transparency; save it as 16-bit grey or 8-bit")
    plugin = next((plugin for magic, plugin in PLUGINS.items() if data.startswith(magic)), None)
    if plugin is None:
        raise BadImage(path, "not a PNG, JPEG or DICOM image")
    try:
        if plugin is PngImageFile:
            data = without_large_metadata(data)
        # Not Image.open: it has a limit of its own, one for the whole process.
        image: Image.Image = plugin(io.BytesIO(data))
        check_extent(path, *image.size, max_megapixels)
        check_memory(path, *image.size, bytes_a_pixel(data), len(data), max_megapixels)
        if plugin is JpegImageFile:
            check_scans(path, data)
        image.load()
        if plugin is PngImageFile and _may_lack_rows(image) and lacks_rows(data):
            raise BadImage(path, "a PNG with fewer rows of pixels than its header says")
        grey = _window(path, image, bit_depth) if image.mode.startswith("I") else _luminance(image)
        grey.info.update(image.info)  # what turns it
        del image
        ImageOps.exif_transpose(grey, in_place=True)
        return grey
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # on broken bytes Pillow raises almost any type
        raise BadImage(path, f"cannot be decoded: {_reason(error)}") from None


def _luminance(image: Image.Image) -> Image.Image:
    return image if image.mode == "L" else image.convert("L")


def _window(path: Path, image: Image.Image, bit_depth: int | None) -> Image.Image:
    """`window16`, some rows at a time."""
    width, height = image.size
    parts = [(rows.start, min(rows.stop, height)) for rows in blocks((height, width))]

    def pixels(part: tuple[int, int]) -> NDArray[np.integer]:
        return np.asarray(image.crop((0, part[0], width, part[1])))

    depth = bit_depth or depth_of(path, map(pixels, parts))
    grey = np.empty((height, width), dtype=np.uint8)
    for part in parts:
        grey[slice(*part)] = window16(pixels(part), depth)
    return Image.fromarray(grey)


def window16(pixels: NDArray[np.integer], bit_depth: int) -> NDArray[np.uint8]:
    """Window 16-bit pixels (h,w) to 8 bits by their true depth; uint8 (h,w).

    Radiographs of 10, 12 or 14 bits are stored in 16-bit PNGs as they are, so dividing by 257 leaves a 12-bit
    radiograph with 16 grey levels (black), and clipping at 255 saturates it (white). `round(255 · v / (2^bits - 1))` is
    one scale for each depth, not one for each image, so that exposure within a depth stays comparable; for 16 bits it
    is the division by 257. Brighter pixels, such as markers burnt in, are white.
    """
    table = np.rint(np.arange(2**bit_depth) * (255 / (2**bit_depth - 1))).astype(np.uint8)
    return table[np.clip(pixels, 0, 2**bit_depth - 1)]


def depth_of(path: Path, parts: Iterable[NDArray[np.integer]]) -> int:
    """The smallest of 8, 10, 12, 14, 16 bits that holds all pixels of an image's parts; PNG does not tell the true one.

    Raises:
        BadImage: a smaller one holds almost all, so the others may be a marker, brighter than the film can be.
    """
    beyond_of, total = Counter[int](), 0
    for pixels in parts:
        total += pixels.size
        beyond_of.update({depth: int(np.count_nonzero(pixels >= 2**depth)) for depth in BIT_DEPTHS})
    held = [(depth, beyond_of[depth]) for depth in BIT_DEPTHS]
    bits = next(depth for depth, beyond in held if not beyond)
    smaller = next((depth for depth, beyond in held if beyond < MARKER * total), bits)
    if smaller < bits:
        raise BadImage(
            path,
            f"a 16-bit PNG of unknown depth: {smaller} bits hold all but a few of its pixels, {bits} bits all; say"
            " which by bit_depth",
        )
    return bits


def _may_lack_rows(image: Image.Image) -> bool:
    """Pixels that a PNG lacks are 0, and the last ones: for most images a look at the last row is enough."""
    width, height = image.size
    return bool(image.info.get("interlace")) or not np.asarray(image.crop((0, height - 1, width, height))).any()


def resize(image: Image.Image, size: int, mode: Resize = "stretch") -> Image.Image:
    """Bicubic (antialiased) resize of a mode "L" image to size × size.

    `stretch` ignores the aspect ratio (the paper); `pad` keeps it and centres the image on black.
    """
    if mode == "stretch":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new("L", (size, size))
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(small, ((size - width) // 2, (size - height) // 2))
    return square


def square_image(
    path: str | Path,
    size: int,
    mode: Resize,
    *,
    max_megapixels: float = MAX_MEGAPIXELS,
    bit_depth: int | None = None,
) -> Image.Image:
    """Read and resize: what the loader augments and the cache keeps; raises like `read_image`."""
    return resize(read_image(path, max_megapixels=max_megapixels, bit_depth=bit_depth), size, mode)


def normalize(pixels: Tensor, mean: float, std: float) -> Tensor:
    """uint8 (...,h,w) to float32 (...,3,h,w): (x/255 - mean)/std, grey repeated over three channels."""
    grey = pixels.float().div_(255).sub_(mean).div_(std).unsqueeze(-3)
    return grey.expand(*grey.shape[:-3], 3, *grey.shape[-2:]).contiguous()


def to_uint8(image: Image.Image) -> Tensor:
    """A mode "L" image as uint8 (h,w)."""
    return torch.from_numpy(np.array(image, dtype=np.uint8))


def read_bytes(path: Path) -> bytes:
    """Content of an image file.

    Raises:
        BadImage: missing, empty, unreadable, or not a file.
    """
    try:
        if path.exists() and not path.is_file():
            raise BadImage(path, "not a file")
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadImage(path, "no such file") from None
    except OSError as error:
        raise BadImage(path, f"cannot be read: {error.strerror}") from None
    if not data:
        raise BadImage(path, "the file is empty")
    return data


def _reason(error: Exception) -> str:
    return re.sub(r" \(\d+ bytes not processed\)$", "", first_line(error))  # one reason, however much is missing
