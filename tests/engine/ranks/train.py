"""Run several `pspg-engine` commands, one after the other, in one group of processes: starting one takes seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pspg.engine.cli import main

if __name__ == "__main__":
    statuses = [main(arguments) for arguments in json.loads(Path(sys.argv[1]).read_text())]
    sys.exit(max(statuses))
