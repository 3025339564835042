"""Start of several processes: what their launcher set in the environment, checked, and the store that they share.

torch's `env://` rendezvous does the same but names neither the ranks that are missing nor what to do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from ..utils.errors import UserError

ADVICE = "start the processes with torchrun, deepspeed or configs/launch/slurm.sh"


@dataclass(frozen=True)
class RankInfo:
    """Place of this process among those that a launcher started."""

    rank: int
    world_size: int
    local_rank: int
    """among the processes of this machine"""
    local_world_size: int
    address: str
    """address of the machine of rank 0"""
    port: int


def launcher_environment(environment: Mapping[str, str] = os.environ) -> RankInfo | None:
    """Read what torchrun, deepspeed or another launcher set; None: one process without a launcher.

    Raises:
        UserError: several processes of which this one knows too little.
    """
    if not {"RANK", "WORLD_SIZE"} & environment.keys():
        for key in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
            if environment.get(key, "1") != "1":
                raise _local_error(f"{key} is {environment[key]}, but RANK and WORLD_SIZE are not set; {ADVICE}")
        return None
    if environment.get("WORLD_SIZE") == "1" and "MASTER_ADDR" not in environment:
        return None
    for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(key):
            known = "WORLD_SIZE" if "WORLD_SIZE" in environment and key != "WORLD_SIZE" else "RANK"
            raise _local_error(f"{key}: is not set, though {known} is {environment.get(known)}; {ADVICE}")
    size = _number(environment, "WORLD_SIZE", 1, 2**31)
    rank = _number(environment, "RANK", 0, size)
    port = _number(environment, "MASTER_PORT", 1, 2**16)
    local_rank = _number(environment, "LOCAL_RANK", 0, size) if "LOCAL_RANK" in environment else rank
    counted = next((key for key in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if key in environment), None)
    local_size = local_rank + 1 if counted is None else _number(environment, counted, 1, size + 1)
    return RankInfo(rank, size, local_rank, local_size, environment["MASTER_ADDR"], port)


def _number(environment: Mapping[str, str], key: str, low: int, high: int) -> int:
    value = environment[key]
    if not value.isdecimal() or not low <= int(value) < high:
        raise _local_error(f"{key}: must be a whole number from {low} to {high - 1}, got {value!r}; {ADVICE}")
    return int(value)


def _local_error(message: str) -> UserError:
    """Error that only this process is known to have met."""
    error = UserError(message)
    error.local = True
    return error


def rendezvous(info: RankInfo, timeout: float) -> dist.Store:
    """The store that all ranks share, once all are there. Each has set `beat/<rank>`.

    Args:
        timeout: seconds to wait for the others.

    Raises:
        UserError: the port is taken, rank 0 does not answer, or ranks are missing.
    """
    where = f"{info.address}:{info.port}"
    # Under torchrun its agent serves the store, else rank 0.
    serves = info.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        tcp = dist.TCPStore(
            info.address,
            info.port,
            info.world_size,
            is_master=serves,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise _local_error(f"MASTER_PORT: port {info.port} is in use on this machine; choose another") from None
        reason = " ".join(str(error).split(". ")[0].split())
        raise _local_error(f"MASTER_ADDR: {where} cannot be {'served' if serves else 'reached'} ({reason})") from None
    # A launcher that starts the ranks again may serve the same store again.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)
    store.compare_set("verdict", "", "")
    store.set(f"beat/{info.rank}", "")
    everyone = [f"beat/{rank}" for rank in range(info.world_size)]
    try:
        store.wait(everyone, timedelta(seconds=timeout))
    except dist.DistError:
        missing = [rank for rank, key in enumerate(everyone) if not store.check([key])]
        listing = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
        late = UserError(
            f"rank {listing} of {info.world_size} did not come to {where} within {timeout:g} s (timeout_s)"
        )
        # The first of those that came speaks.
        late.local = info.rank == min({*range(info.world_size)} - {*missing})
        raise late from None
    return store
