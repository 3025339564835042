"""The public names exist, and settings can be read without torch."""

from __future__ import annotations

import subprocess
import sys

import pspg.engine


def test_every_public_name_is_there() -> None:
    assert sorted(pspg.engine.__all__) == sorted(pspg.engine._HOME)
    for name in pspg.engine.__all__:
        assert getattr(pspg.engine, name).__name__ == name if name != name.upper() else getattr(pspg.engine, name)


def test_settings_of_a_run_are_read_without_torch() -> None:
    script = "import sys; from pspg.engine.training.config import TrainConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
