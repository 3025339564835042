"""Choices of a setting, one file each: the name of a file in a package is a value of the setting."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Generic, TypeVar

from .errors import UserError

T = TypeVar("T", bound=type)


def choices(folder: Path) -> tuple[str, ...]:
    """Names of a folder's modules but those with a leading underscore, sorted; nothing is imported."""
    return tuple(sorted(file.stem for file in folder.glob("*.py") if not file.stem.startswith("_")))


_registered: dict[str, set[str]] = {}
"""setting → names of the classes registered so far"""
_listeners: list[Callable[[], None]] = []


def registered(setting: str) -> tuple[str, ...]:
    """Names of the classes registered so far for a setting, sorted; among them those of no file of the engine's."""
    return tuple(sorted(_registered.get(setting, ())))


def on_register(listener: Callable[[], None]) -> None:
    """Call a function whenever a class has been registered."""
    _listeners.append(listener)


class Registry(Generic[T]):
    """Classes of a package by the value of the setting that chooses them; each is imported when it is asked for.

    A module `<package>/<name>.py` holds one class with the attribute `name`, under the decorator `register`. A class of
    your own can be registered from any module, before it is asked for; defined anew, as in a notebook, it takes the
    place of the one before.

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
        other = self._classes.get(name)
        taken = name in choices(self._folder) and not cls.__module__.startswith(f"{self._package}.")
        if taken or (other is not None and _place(other) != _place(cls)):
            raise ValueError(f"{self.setting}: {name!r} is registered twice")
        self._classes[name] = cls
        _registered.setdefault(self.setting, set()).add(name)
        for listener in _listeners:
            listener()
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


def _place(cls: type) -> tuple[str, str]:
    """Module and name, by which a class that is defined anew is known."""
    return cls.__module__, cls.__qualname__
