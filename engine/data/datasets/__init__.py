"""Data sets that `pspg-engine prepare` knows, one file each; see `preparation.dataset.DataSet`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ..preparation.dataset import DataSet


def all_datasets() -> list[DataSet]:
    """The `DATASET` of every module here, in the order of the file names."""
    return [import_module(f"{__name__}.{module.name}").DATASET for module in iter_modules(__path__)]
