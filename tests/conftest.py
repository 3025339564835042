"""Settings that every test needs before torch or triton is imported; fixtures stand in the folders that use them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Generator, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

# Each test process has a core of its own, and so has each process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def has_gpu() -> bool:
    """Answer as torch would, without its import where no driver is loaded."""
    if not any(Path("/dev", node).exists() for node in ("nvidiactl", "nvmap", "dxg", "kfd")):
        return False
    import torch

    return torch.cuda.is_available()


if not has_gpu():
    # Triton decides at its import whether kernels compile or run in its interpreter, and the engine imports it.
    os.environ["TRITON_INTERPRET"] = "1"

# A shell that starts tests in the background has them ignore Ctrl-C, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def is_installed() -> bool:
    try:
        return find_spec("pspg.kernels") is not None
    except ModuleNotFoundError:
        return False


if not is_installed():
    # A checkout without an installation: the links that `make build/typing/pspg` makes, for subprocesses too.
    links = ROOT / "build" / "typing"
    (links / "pspg").mkdir(parents=True, exist_ok=True)
    for name in ("engine", "kernels"):
        with contextlib.suppress(FileExistsError):
            (links / "pspg" / name).symlink_to(Path("../../..", name))
    sys.path.insert(0, str(links))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(links), os.environ.get("PYTHONPATH"))))

# Missing packages

# What a rented GPU often lacks, by import name.
MAY_BE_MISSING = {
    *("deepspeed", "jinja2", "jsonargparse", "matplotlib", "open_clip", "PIL", "pydicom", "safetensors"),
    *("scipy", "simplejpeg", "sklearn", "tensorboard", "torchvision", "torchxrayvision", "tqdm", "transformers"),
    *("triton", "yaml"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--complete",
        action="store_true",
        help="a package that is not installed fails the tests that need it; without this they are skipped",
    )


def missing(error: BaseException | None) -> str | None:
    """Name of the package that is not installed, if that and nothing else is what an import failed of."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            package = error.name.partition(".")[0]
            return package if package in MAY_BE_MISSING else None
        error = error.__cause__
    return None


class Module(pytest.Module):
    """Test file that is skipped, with the reason, where a package that it imports is not installed."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            if (name := missing(error)) is None:
                raise
            raise pytest.skip.Exception(f"needs {name}", allow_module_level=True) from None


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if parent.config.getoption("complete"):
        return None
    return Module.from_parent(parent, path=module_path)


def _skip_where_missing(item: pytest.Item) -> Generator[None, Any, Any]:
    """Run a phase of a test; an import in a fixture or a test body that finds no package skips the test."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if item.config.getoption("complete") or (name := missing(error)) is None:
            raise
        pytest.skip(f"{item.name} needs {name}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _skip_where_missing(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _skip_where_missing(item))


# GPU


LONGEST = ("test_demo.py", "test_global_batch.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest starts first; kernel tests that run compiled on a GPU are `gpu` tests too."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
