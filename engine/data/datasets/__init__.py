"""Data sets that `pspg-engine prepare` knows, one file each; see `preparation.dataset.DataSet`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ..preparation.dataset import DataSet

_own: dict[str, DataSet] = {}


def register_dataset(dataset: DataSet) -> DataSet:
    """Make a data set of your own a word of `pspg-engine prepare`; defined anew, it takes the place of the one before.

    Raises:
        ValueError: the engine has one of that name.
    """
    if dataset.name in {"check", "cache", *(module.name.replace("_", "-") for module in iter_modules(__path__))}:
        raise ValueError(f"prepare: there is {dataset.name!r} already; choose another name")
    _own[dataset.name] = dataset
    return dataset


def all_datasets() -> list[DataSet]:
    """The `DATASET` of every module here, in the order of the file names, then those registered from elsewhere."""
    own = [import_module(f"{__name__}.{module.name}").DATASET for module in iter_modules(__path__)]
    return [*own, *_own.values()]
