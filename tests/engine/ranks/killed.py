"""Run `pspg-engine ARGUMENTS` and SIGKILL it, loader workers included, once its metrics hold ROWS rows.

The run counts them itself: from outside, a loaded machine would see them too late.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from pspg.engine.cli import main
from pspg.engine.training.telemetry import Telemetry, read_metrics

if __name__ == "__main__":
    rows, log = int(sys.argv[1]), Telemetry.log

    def log_and_die(self: Telemetry, row: dict[str, Any]) -> None:
        log(self, row)
        self._file.flush()
        if len(read_metrics(Path(self._file.name))) >= rows:
            os.killpg(0, signal.SIGKILL)

    Telemetry.log = log_and_die  # type: ignore[method-assign]
    sys.exit(main(sys.argv[2:]))
