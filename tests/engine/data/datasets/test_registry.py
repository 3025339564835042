"""Data sets are found by themselves."""

import subprocess
import sys

from pspg.engine.data.datasets import all_datasets

CODE = """
import sys
from pspg.engine import cli
cli.make_parser(tuple(cli.COMMANDS.items()))
sys.exit("torch" in sys.modules)
"""


def test_every_module_declares_one() -> None:
    datasets = all_datasets()
    names = [dataset.name for dataset in datasets]
    assert names == ["chestxray14", "chexpert", "folder", "mimic-cxr", "padchest", "table", "vindr-cxr"]
    assert all((dataset.settings.__doc__ or "").startswith("Manifests from") for dataset in datasets)


def test_help_of_all_commands_imports_no_torch() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)
