"""Sources of scores, one file each: the file's name is the setting that selects the source."""

from ...utils.registry import Registry
from ._base import ImageMethod, Method, Source, Split

SOURCES: Registry[type[Source]] = Registry("other_source", __name__, __file__)

__all__ = ["SOURCES", "ImageMethod", "Method", "Source", "Split"]
