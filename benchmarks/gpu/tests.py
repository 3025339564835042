"""`python -m benchmarks.gpu.tests OUT PYTEST-ARGUMENTS`: run pytest, and write counts and failures."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pspg.engine.utils.files import write_text


class Outcomes:
    """A pytest plugin; the file is complete after every test."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._counts: Counter[str] = Counter()
        self._failed: list[str] = []
        self._reasons: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        self._counts[report.outcome] += 1
        if report.failed:
            lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            self._failed.append(f"{report.nodeid}: {lines[0][1:].strip()[:120] if lines else report.when}")
        if report.skipped:
            self._reasons[str(report.longrepr[-1])[:100]] += 1
        found = {"counts": self._counts, "failed": self._failed, "skipped": self._reasons}
        write_text(self._output, json.dumps(found, indent=1) + "\n")


def main(output: str, *arguments: str) -> int:
    """Exit status of pytest; that no test was selected is none."""
    status = int(pytest.main([*arguments, "-q", "-p", "no:cacheprovider"], plugins=[Outcomes(Path(output))]))
    return 0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
