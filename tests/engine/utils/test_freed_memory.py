"""Memory of freed tensors on a CPU."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest
import torch

from pspg.engine.utils.freed_memory import freed_memory_kept

SCRIPT = """
import json, torch
from pspg.engine.utils.freed_memory import freed_memory_kept

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def change():  # of resident memory by 256 MiB that were there for a moment
    before = resident()
    torch.ones(2**26)
    return resident() - before

torch.ones(2)
found = [change()]
with freed_memory_kept(torch.device("cpu")) as kept:
    found += [change()]
found += [change(), kept]
print(json.dumps(found))
"""


def outcome(**environment: str) -> list[int]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True)
    found: list[int] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limits are glibc's")
def test_it_stays_with_the_process_within_and_not_before_or_after() -> None:
    before, within, after, kept = outcome()
    assert kept
    assert before < 2**25
    assert within > 2**27
    assert after < 2**25


def test_limits_of_the_user_stay() -> None:
    _, within, _, kept = outcome(MALLOC_TRIM_THRESHOLD_="1048576")
    assert not kept
    assert within < 2**25


def test_where_memory_is_limited_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a request for memory fails, a run ends in one line (test_standing_still.py); keeping more made it wait."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2**40, 2**40))
    with freed_memory_kept(torch.device("cpu")) as kept:
        assert not kept


def test_nothing_is_set_for_a_gpu() -> None:
    with freed_memory_kept(torch.device("cuda")) as kept:
        assert not kept
