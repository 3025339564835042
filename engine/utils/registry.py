"""Choices of a setting, one file each: the name of a file in a package is a value of the setting."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Generic, TypeVar

from .errors import UserError

T = TypeVar("T", bound=type)


def choices(folder: Path) -> tuple[str, ...]:
    """Names of a folder's modules but those with a leading underscore, sorted; nothing is imported."""
    return tuple(sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_")))


class Registry(Generic[T]):
    """Classes of a package by the value of the setting that chooses them; each is imported when it is asked for.

    A module `<package>/<name>.py` holds one class with the attribute `name`, under the decorator `register`. A class of
    your own can be registered from any module, before it is asked for.

    Args:
        setting: dotted name of the setting, for messages.
        package: `__name__` of the package.
        file: `__file__` of the package.
    """

    def __init__(self, setting: str, package: str, file: str) -> None:
        self.setting, self._package, self._folder = setting, package, Path(file).parent
        self._classes: dict[str, T] = {}

    def register(self, cls: T) -> T:
        """Class decorator.

        Raises:
            ValueError: another class has that name.
        """
        name: str = cls.name  # type: ignore[attr-defined]
        if self._classes.setdefault(name, cls) is not cls:
            raise ValueError(f"{self.setting}: {name!r} is registered twice")
        return cls

    def names(self) -> tuple[str, ...]:
        """Every value of the setting, sorted."""
        return tuple(sorted({*choices(self._folder), *self._classes}))

    def __getitem__(self, name: str) -> T:
        """The class of that name.

        Raises:
            UserError: there is none.
        """
        if name not in self._classes and name in choices(self._folder):
            import_module(f"{self._package}.{name}")
        if name not in self._classes:
            raise UserError(f"{self.setting}: {name!r} is not one of {', '.join(self.names())}")
        return self._classes[name]
