"""Loader processes: none is left behind, and a death is one line wherever it strikes."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from pspg.engine import cli

SCRIPT = """
import sys, time
from pspg.engine.data.loaders.torch_loader import data_loader, results

class Numbers:
    def __getitems__(self, keys):
        return len(keys)

if __name__ == "__main__":
    batches = results(data_loader(Numbers(), [[(0, 0)]] * 9, 2, fork=sys.argv[1] == "fork"))
    print(next(batches), flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_none_outlives_a_killed_run(tmp_path, start):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, script, start]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout.readline() == "1\n"
        process.kill()
        process.communicate(timeout=20)  # they all hold the pipe: its end is theirs
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_death_outside_the_loader_is_one_line(monkeypatch, capsys, tmp_path):
    def function(config):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr("pspg.engine.commands.phantom.draw", function)
    assert cli.main(["phantom", "--output", str(tmp_path / "phantoms")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pspg-engine phantom: error: a loader process was killed, for want of memory")
