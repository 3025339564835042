"""Images that Python has, as the 8-bit grey image that a file would give: files, PIL images, arrays, tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from ..utils.errors import UserError
from .images import depth_of, read_image, window16

AnyImage: TypeAlias = str | Path | Image.Image | NDArray[Any] | Tensor


def grey_image(image: AnyImage, *, bit_depth: int | None = None, name: str = "image") -> Image.Image:
    """An image as mode "L".

    Args:
        image: a PNG, JPEG or DICOM file; a PIL image; an array or tensor of uint8 or uint16, or of float in [0, 1]:
            (h,w), colour (h,w,3), or (3,h,w) of a tensor. Colour is reduced to luminance.
        bit_depth: true depth of 16-bit pixels; None: told by them, as in a 16-bit PNG.
        name: what to call it in errors.

    Raises:
        UserError: an unreadable file, or pixels of another type, shape or range.
    """
    if isinstance(image, str | Path):
        return read_image(image, bit_depth=bit_depth)
    if isinstance(image, Tensor):
        image = _last(image.detach().cpu().numpy())
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image)
        if not image.mode.startswith(("I", "F")):
            return image.convert("L")
        image = np.asarray(image)
    if not isinstance(image, np.ndarray):
        raise UserError(f"{name}: is of type {type(image).__name__}; give a path, a PIL image, an array or a tensor")
    return _of_array(image, bit_depth, name)


def _of_array(pixels: NDArray[Any], bit_depth: int | None, name: str) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    colour = pixels.ndim == 3 and pixels.shape[2] in (3, 4)
    if not pixels.size or not (pixels.ndim == 2 or colour):
        raise UserError(f"{name}: has the shape {tuple(pixels.shape)}; an image is (h,w) or (h,w,3)")
    kind = pixels.dtype.kind
    if kind == "f":
        if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
            raise UserError(f"{name}: has floating-point pixels outside [0, 1]; scale them, or give integers")
        pixels = np.rint(pixels * 255.0).astype(np.uint8)
    elif kind not in "iu" or pixels.min() < 0 or pixels.max() > 65535:
        raise UserError(f"{name}: has pixels of {pixels.dtype}; give uint8, uint16 or float in [0, 1]")
    elif pixels.dtype != np.uint8:
        if colour:
            raise UserError(f"{name}: has colour of {pixels.dtype}; give uint8")
        return Image.fromarray(window16(pixels, bit_depth or depth_of(Path(name), [pixels])))
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("L")


def _last(pixels: NDArray[Any]) -> NDArray[Any]:
    """Channels of a tensor (1,h,w) or (3,h,w) behind its pixels, where an array has them."""
    return np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4) else pixels
