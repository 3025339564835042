"""YAML within bounds: aliases that multiply, deep nesting, tags and numbers too long cost nothing and are refused.

PyYAML reads any of them for as long as it takes, and raises other errors than its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import UserError

T = TypeVar("T")

LARGEST = 4 * 2**20
"""characters of a document"""
MOST_NODES = 200_000
"""values of a document, each alias counted with all that it stands for"""
DEEPEST = 50


def bounded(load: Callable[[str], T]) -> Callable[[str], T]:
    """A function that loads YAML text, for texts from anybody.

    It raises:
        yaml.YAMLError: whatever is wrong with the text; one line.
    """

    def loaded(text: str) -> T:
        check_bounds(text)
        try:
            return load(text)
        except yaml.YAMLError:
            raise
        except RecursionError:
            raise yaml.YAMLError("nested too deep") from None
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            reason = "a number is too long" if "digits" in str(error) else str(error)
            raise yaml.YAMLError(f"a value cannot be read ({reason})") from None

    return loaded


def read_yaml(path: Path, load: Callable[[str], Any] = yaml.safe_load, key: str = "") -> Any:
    """Value of a YAML file, as `load` makes it of the text; `key` is the setting that names it, for messages.

    Raises:
        UserError: missing, or not YAML within the bounds.
    """
    where = f"{key}: {path}" if key else f"{path}"
    try:
        if path.stat().st_size > 4 * LARGEST:
            raise UserError(f"{where}: longer than {LARGEST >> 20} million characters")
        return bounded(load)(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{where}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: is not a UTF-8 text file") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = "" if mark is None else f":{mark.line + 1}"
        raise UserError(f"{where}{place}: not readable as YAML ({problem or ' '.join(str(error).split())})") from None


def check_bounds(text: str) -> None:
    """Refuse a text that no settings need.

    Raises:
        yaml.YAMLError: too long, too deep, too many values, an alias within itself, or a tag.
    """
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"longer than {LARGEST >> 20} million characters")
    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []  # anchors of the collections that are open, and the values before each
    count = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor is not None:
                sizes[anchor] = count - before
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        if (tag := getattr(event, "tag", None)) is not None:
            raise yaml.YAMLError(f"the tag {tag}: settings need none, leave it out")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"the alias *{event.anchor} stands for nothing, or for what it is part of")
            count += sizes[event.anchor]
        else:
            count += 1
        if count > MOST_NODES:
            raise yaml.YAMLError(f"more than {MOST_NODES} values, with those that aliases repeat")
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, count - 1))
            if len(open_) > DEEPEST:
                raise yaml.YAMLError(f"nested deeper than {DEEPEST} levels")
        elif isinstance(event, yaml.ScalarEvent) and event.anchor is not None:
            sizes[event.anchor] = 1
