"""The public names exist, and settings can be read without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import pspg.engine
from pspg.engine.commands import bench as bench_module
from pspg.engine.utils.errors import UserError


def test_every_public_name_is_there() -> None:
    assert sorted(pspg.engine.__all__) == sorted(pspg.engine._HOME)
    for name in pspg.engine.__all__:
        assert getattr(pspg.engine, name).__name__ == name if name != name.upper() else getattr(pspg.engine, name)


def test_the_package_is_light_until_it_is_used() -> None:
    """Neither the import nor the version needs torch."""
    script = (
        "import sys, pspg.engine as pspg; print(pspg.__version__, sorted(set(pspg.__all__) - set(dir(pspg))));"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'open_clip', 'jsonargparse')))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [metadata.version("pspg-engine"), "[]"]


def test_settings_of_a_run_are_read_without_torch() -> None:
    script = "import sys; from pspg.engine.training.config import TrainConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, "GOMP_SPINCOUNT = '10000'"),
        ({"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT = '7'"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "GOMP_SPINCOUNT = '0'"),
    ],
)
def test_threads_that_wait_give_way_unless_the_user_says_otherwise(own: dict[str, str], expected: str) -> None:
    """What libgomp says that it has read, in a process that imports torch after the engine."""
    clean = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = {**clean, **own, "OMP_DISPLAY_ENV": "VERBOSE"}
    script = "import pspg.engine, torch"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert expected in done.stderr


def test_bench_measures_from_any_folder(tmp_path: Path) -> None:
    """The rows of a tiny case, behind their gate, where the benchmarks are not on the path."""
    script = (
        "import pspg.engine as pspg; rows = pspg.bench('asymmetric_loss', B=4, C=3, impl='eager', direction='forward');"
        "print([(row.impl, row.status) for row in rows])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(pspg.engine.__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[('eager', 'ok')]"


def test_bench_without_the_benchmarks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("benchmarks")
    other.__file__ = str(tmp_path / "benchmarks.py")
    monkeypatch.setitem(sys.modules, "benchmarks", other)
    with pytest.raises(UserError, match=r"^bench: .*/benchmarks\.py is called benchmarks, too, and hides those of"):
        pspg.engine.bench("spcl", C=28)
    monkeypatch.setattr(bench_module, "CHECKOUT", tmp_path)
    with pytest.raises(UserError, match=r"^bench: the benchmarks come with a checkout of the repository"):
        pspg.engine.bench("spcl", C=28)
