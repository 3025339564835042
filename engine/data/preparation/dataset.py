"""Declaration of a data set: its name, its settings and its reader."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt

from ...config import Seed
from .rows import Journal, Row


@dataclass(kw_only=True)
class PrepareConfig:
    """Settings of every data set."""

    source: str = ""
    """folder of the official files, as downloaded; tables may be gzipped, archives of images must be unpacked"""
    output: str = ""
    """new folder for manifests, classes.txt, statistics.json, cooccurrence.csv, prepare.json and dropped.csv"""
    image_root: str | None = None
    """folder of the images, where it is not the source: the manifests' filepaths are relative to it, and prepare.json
    notes it"""
    missing: Literal["error", "skip", "keep"] = "error"
    """a row without its image file: stop, leave it out and list it, or keep it (files are not looked for at all)"""
    pixel_samples: NonNegativeInt = 1024
    """training images that the pixel mean and standard deviation are measured on, unless missing is keep; 0: none"""
    image_size: PositiveInt = 224
    """side that they are resized to, pixels"""
    salt: str | None = None
    """secret that patient ids are hashed with: the same salt gives the same ids; it is written nowhere. null: a random
    one, so that ids group images within this output only. Splits do not depend on it"""
    plugins: str | list[str] = field(default_factory=list)
    """modules or Python files of your own, which are imported and may register data sets; one or a list"""
    dry_run: bool = False
    """print everything, write nothing"""


@dataclass(kw_only=True)
class SplitConfig(PrepareConfig):
    """Settings of data sets without official splits: patients are split by a hash of their id."""

    val_fraction: ClosedUnitInterval = 0.1
    """share of the patients for validation, where no official list says which"""
    test_fraction: ClosedUnitInterval = 0.2
    """share of the patients for the test, where no official list says which; 1 with val_fraction 0: all"""
    seed: Seed = 0
    """seed of the split"""


@dataclass(frozen=True)
class DataSet:
    """A data set that `pspg-engine prepare` makes manifests from: `DATASET` in each module of `data/datasets/`."""

    name: str
    """word of the command line"""
    help: str
    """line in the list of commands"""
    settings: type[PrepareConfig]
    """a dataclass; its docstring is the description of `--help`"""
    read: Callable[[Any, Journal], tuple[list[str], Iterable[Row]]]
    """class names and rows of its settings; notes in the journal what it leaves out"""
    example: str | None = None
    """its most common use, for `--help`: what stands after its name"""
