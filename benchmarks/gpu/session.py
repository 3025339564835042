"""Parts of a measurement session, each a process of its own with a time limit, and what has come of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pspg.engine.utils.files import write_text

OK, FAILED, STOPPED = "ok", "FAILED", "stopped"
RESERVE_S = 10.0
"""seconds of the budget that the table at the end may take"""


@dataclass(frozen=True)
class Part:
    """One process of a session; `json` stands in `command` for the file that it writes its result to."""

    name: str
    command: Sequence[str]
    seconds: float
    """after which it is stopped; what it has written by then is kept"""
    needs: str | None = None
    """package without which it cannot run"""


@dataclass
class Record:
    """What has come of a part."""

    name: str
    status: str
    seconds: float
    detail: str = ""
    """last line that a process wrote which did not end well"""
    result: Any = None

    @property
    def unfinished(self) -> bool:
        """To be run again: it failed, or its result says under `left` that not all was done."""
        return self.status == FAILED or (isinstance(self.result, dict) and bool(self.result.get("left")))


@dataclass
class Session:
    """Runs parts until the budget is spent.

    Args:
        folder: of results.json, of the parts' own files and of what they print.
        budget: seconds.
        environment: variables that the processes get beside those of this one.
    """

    folder: Path
    budget: float
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self.folder / "results.json"
        self.records: dict[str, Record] = {}
        if self._file.is_file():
            self.records = {row["name"]: Record(**row) for row in json.loads(self._file.read_text())["parts"]}

    def run(self, parts: Sequence[Part], facts: Mapping[str, Any]) -> list[str]:
        """Run what is not done; returns the names of what is left for another call.

        A part that failed is run again, and one whose result says that something is left; one that was stopped at its
        own limit is not.
        """
        left = [part for part in parts if part.name not in self.records or self.records[part.name].unfinished]
        while left:
            part, rest = left[0], self.budget - RESERVE_S - (time.monotonic() - self._began)
            if rest < min(part.seconds, 30):
                break
            print(f"[{time.monotonic() - self._began:.0f} s] {part.name}", file=sys.stderr, flush=True)
            self.records[part.name] = self._run(part, min(part.seconds, rest))
            document = {"environment": dict(facts), "parts": [asdict(record) for record in self.records.values()]}
            write_text(self._file, json.dumps(document, indent=1) + "\n")
            left.pop(0)
        return [part.name for part in left]

    def _run(self, part: Part, limit: float) -> Record:
        output, log = self.folder / f"{part.name}.json", self.folder / f"{part.name}.log"
        output.unlink(missing_ok=True)
        words = [str(output) if word == "json" else word for word in part.command]
        began = time.monotonic()
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
            try:
                status = OK if process.wait(limit) == 0 else FAILED
            except subprocess.TimeoutExpired:
                status = STOPPED
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        seconds = time.monotonic() - began
        result = json.loads(output.read_text()) if output.is_file() else None
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        detail = "" if status == OK else f"after {limit:.0f} s" if status == STOPPED else f"exit {process.returncode}"
        if status != OK and lines:
            detail += f": {lines[-1][:160]}"
        return Record(part.name, status, seconds, detail, result)
