"""YAML as people mean it: a key twice is an error, and the words of lists and keys stay words.

PyYAML drops the first value of a key that is given twice, and takes the words no, on and 1 for values of other types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_STRING, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


def as_written(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """A function that loads YAML text, with `check_keys` and `plain_words` before.

    It raises:
        yaml.YAMLError: whatever is wrong with the text.
    """

    def loaded(text: str) -> Any:
        check_keys(text)
        return load(plain_words(text))

    return loaded


def check_keys(text: str) -> None:
    """Refuse a key that is given twice, in one group or as its dotted name beside it.

    Raises:
        yaml.YAMLError: naming line and key.
    """
    seen: set[tuple[int, str]] = set()
    groups: list[tuple[int, str, bool]] = []  # of each open collection: its list, the name before its keys, is a group
    key: str | None = None  # the name that waits for its value
    lists = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionEndEvent):
            groups.pop()
            key = None
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        scope, prefix, is_group = groups[-1] if groups else (0, "", False)
        if is_group and key is None and isinstance(event, yaml.ScalarEvent):
            key = prefix + event.value
            if (scope, key) in seen:
                problem = f"{key} is given twice; keep one of them"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]
            seen.add((scope, key))
            continue
        if isinstance(event, yaml.CollectionStartEvent):
            if isinstance(event, yaml.MappingStartEvent) and key is not None:
                groups.append((scope, f"{key}.", True))
            else:  # groups in a list are apart from one another
                lists += bool(groups)
                groups.append((lists, "", isinstance(event, yaml.MappingStartEvent)))
        key = None


def plain_words(text: str) -> str:
    """The same YAML with keys and what lists hold as strings, as they are written: class names such as no, on and 1.

    A setting that is a list of numbers takes strings of digits.
    """
    root = yaml.compose(text, Loader=_LOADER)
    if root is None or not _quote(root, set()):
        return text
    return str(yaml.serialize(root, allow_unicode=True, width=2**20))


def _quote(node: yaml.Node, seen: set[int]) -> bool:
    """Quote the words of keys and lists within `node`; whether there were any."""
    if isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return False
    seen.add(id(node))
    pairs = isinstance(node, yaml.MappingNode)
    words, found = [key for key, _ in node.value] if pairs else node.value, False
    for word in words:
        if isinstance(word, yaml.ScalarNode) and word.style in (None, "") and word.tag not in (_STRING, _MERGE):
            word.tag, found = _STRING, True
    for part in [value for _, value in node.value] if pairs else node.value:
        found = _quote(part, seen) or found
    return found
