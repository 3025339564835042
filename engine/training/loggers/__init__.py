"""Where metrics go beside metrics.jsonl, one file each: the file's name is a value of `logger`."""

from ...utils.registry import Registry
from ._base import Logger, RunStart

LOGGERS: Registry[type[Logger]] = Registry("logger", __name__, __file__)

__all__ = ["LOGGERS", "Logger", "RunStart"]
