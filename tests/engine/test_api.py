"""The public names exist, and settings can be read without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import pytest

import pspg.engine


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
