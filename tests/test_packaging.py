"""The wheel holds what the tree holds, and dependencies point one way."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "engine", "kernels")
# package folder → what it may import of the project
ALLOWED = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "benchmarks": {"benchmarks", "engine", "kernels"},
    "tools": {"tools", "engine", "kernels"},
}


def sources(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import, relative ones resolved."""
    package = path.relative_to(ROOT).parent.parts
    names: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names.append((node.lineno, ".".join([*base, *([node.module] if node.module else [])])))
    return names


def project_part(name: str) -> str | None:
    """engine, kernels, … if `name` belongs to the project."""
    parts = name.split(".")
    if parts[0] == "pspg":
        return parts[1] if len(parts) > 1 else None
    return parts[0] if parts[0] in ALLOWED else None


@pytest.mark.parametrize("folder", ALLOWED)
def test_import_direction(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(folder)
        for line, name in imported(path)
        if project_part(name) not in ALLOWED[folder] | {None}
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("library", "file"),
    [
        ("deepspeed", "engine/distributed/deepspeed.py"),
        ("pydicom", "engine/data/dicom.py"),
        ("nvidia", "engine/data/loaders/dali_loader.py"),
        ("simplejpeg", "engine/data/strict.py"),
    ],
)
def test_one_file_imports(library: str, file: str) -> None:
    importers = {
        str(path.relative_to(ROOT))
        for folder in ("engine", "kernels")
        for path in sources(folder)
        for _, name in imported(path)
        if name.split(".")[0] == library
    }
    assert importers == {file}


def test_nobody_imports_the_folders_by_bare_name() -> None:
    """`import kernels` beside `pspg.kernels` makes two copies of every module."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in [*ALLOWED, "tests"]
        for path in sources(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Import) and any(a.name.split(".")[0] in {"engine", "kernels"} for a in node.names))
        or (
            isinstance(node, ast.ImportFrom)
            and not node.level
            and (node.module or "").split(".")[0] in {"engine", "kernels"}
        )
    ]
    assert not wrong


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist, which is built from a copy: what an earlier build left would end in both."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = folder.glob("pspg_engine-*.whl")
    return found


@pytest.mark.slow
def test_wheel_holds_the_tree(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("pspg/")}
    tree = {
        f"pspg/{path.relative_to(ROOT)}"
        for folder in PACKAGES
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".j2", ".typed", ".json", ".yaml", ".sh"} and "__pycache__" not in path.parts
    } | {f"pspg/{folder}/py.typed" for folder in ("engine", "kernels")}
    assert packed == tree


@pytest.mark.slow
def test_installed_it_runs_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    """With the packages of this environment; the engine and what comes with it are the wheel's."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)

    def python(*words: str, status: int = 0) -> str:
        found = subprocess.run(
            [sys.executable, *words],
            cwd=elsewhere,
            env={**os.environ, "PYTHONPATH": str(site)},
            check=False,
            capture_output=True,
        )
        assert found.returncode == status, found.stderr.decode()
        return (found.stderr if status else found.stdout).decode()

    def run(*words: str) -> str:
        return python("-m", "pspg.engine", *words)

    assert run("--version").split()[-1] == metadata.version("pspg-engine")
    assert "output: runs/chexpert_phase2" in run("train", "chexpert_phase2.yaml", "--print_config")
    folder = site / "pspg/configs"
    assert str(folder) in "".join(run("train", "--help").split())
    for script in folder.glob("launch/*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
    error = python("-c", "import pspg.engine as pspg; pspg.bench('spcl', C=28)", status=1).splitlines()[-1]
    assert "UserError: bench: the benchmarks come with a checkout of the repository" in error
