"""The rules that the tree keeps: rooms, their order, and one file a choice."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / "engine"
LAYERS = ("utils", "distributed data", "models", "checkpoints", "evaluation", "training", "commands")
"""rooms from the ground up; those in one entry know nothing of each other"""
ORDER = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms.split()}
SETTINGS = "config"
"""engine/config.py: settings that several rooms read; it reads the ground floor alone"""


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def module(path: Path) -> tuple[str, ...]:
    """Dotted name of a file below engine/ without its first part; a package is named by its folder."""
    parts = path.relative_to(ENGINE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path) -> list[tuple[int, tuple[str, ...]]]:
    """(line, module of engine/) of every import of the engine by itself, those within functions too."""
    package = path.relative_to(ENGINE).parent.parts
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = (*base, *(node.module.split(".") if node.module else ()))
            found += [(node.lineno, narrowed(target, alias.name)) for alias in node.names]
    return found


def narrowed(target: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The submodule where a name is one, else the module that has it."""
    file = ENGINE.joinpath(*target, name)
    return (*target, name) if file.with_suffix(".py").is_file() or (file / "__init__.py").is_file() else target


def test_nothing_lies_flat() -> None:
    files = {path.name for path in ENGINE.iterdir() if path.is_file()}
    assert files <= {"__init__.py", "__main__.py", "cli.py", "config.py", "py.typed", "README.md"}
    assert {path.name for path in ENGINE.iterdir() if (path / "__init__.py").is_file()} == ORDER.keys()


def test_no_import_points_up() -> None:
    wrong = []
    for path in sources(ENGINE):
        here = module(path)
        if not here or here[0] not in ORDER:
            continue  # the command line sees everything
        for line, target in imports(path):
            there = target[0] if target else ""
            floor = -1 if there == SETTINGS else ORDER.get(there, len(LAYERS))
            if there != here[0] and floor >= ORDER[here[0]]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports engine.{'.'.join(target)}")
    assert not wrong, "\n".join(wrong)


def test_shared_settings_read_the_ground_floor_alone() -> None:
    assert {target[0] for _, target in imports(ENGINE / f"{SETTINGS}.py")} == {"utils"}


def test_no_imports_run_in_a_circle() -> None:
    """Modules, not packages: a registry and the classes that register in it name each other through the package."""
    graph = {module(path): {target for _, target in imports(path)} for path in sources(ENGINE)}
    done: set[tuple[str, ...]] = set()

    def walk(name: tuple[str, ...], trail: tuple[tuple[str, ...], ...]) -> None:
        assert name not in trail, " → ".join(".".join(step) for step in (*trail, name))
        if name not in done:
            for target in graph.get(name, ()):
                if target != name:
                    walk(target, (*trail, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_git_carries_no_bulk() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout: nothing is tracked")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    sizes = {name: (ROOT / name).stat().st_size for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    assert sum(sizes.values()) < 8_000_000, sorted(sizes.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("folder", ["engine", "kernels", "benchmarks", "tools"])
def test_files_are_short_enough_to_read(folder: str) -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(ROOT / folder)}
    assert not {path: lines for path, lines in long.items() if lines > 450}


@pytest.mark.parametrize("folder", ["engine", "kernels"])
def test_users_files_are_not_checked_with_assert(folder: str) -> None:
    """An assert tells a type checker what is known; one with a comparison or a call checks a value.

    Kernels assert nothing; the engine asserts types and what is not None.
    """
    wrong = []
    for path in sources(ROOT / folder):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert) and not narrows(node.test):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def narrows(test: ast.expr) -> bool:
    """`x is not None` or isinstance(…)."""
    if isinstance(test, ast.Compare):
        return all(isinstance(op, ast.Is | ast.IsNot) for op in test.ops)
    return isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "isinstance"


def test_the_list_of_mutations_names_what_is_there() -> None:
    """The table in tests/README.md: a source file and a test in each row."""
    rows = re.findall(r"\| `([\w/]+\.py)` \| `(test_\w+\.py)::(\w+)`", (ROOT / "tests/README.md").read_text())
    assert len(rows) > 50
    tests = {path.name: path.read_text() for path in sources(ROOT / "tests")}
    gone = [row for row in rows if not (ROOT / row[0]).is_file() or f"def {row[2]}(" not in tests.get(row[1], "")]
    assert not gone
