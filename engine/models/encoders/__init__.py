"""Image encoders of your own: `vision_cfg.encoder` of a backbone's JSON file names one. The engine's are open_clip's.

A registered class says how it makes an image's features, see `ImageEncoder`.
"""

from ...utils.registry import Registry
from ._base import ImageEncoder

ENCODERS: Registry[type[ImageEncoder]] = Registry("vision_cfg.encoder", __name__, __file__)

__all__ = ["ENCODERS", "ImageEncoder"]
