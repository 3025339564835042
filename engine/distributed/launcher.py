"""Start of several processes: what their launcher set in the environment, checked, and the store that they share.

torch's `env://` rendezvous does the same but names neither the ranks that are missing nor what to do.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..utils.errors import UserError

ADVICE = "start the processes with torchrun, deepspeed or configs/launch/slurm.sh"
OF_A_MACHINE = frozenset(["device", "timeout_s", "workers", "image_root", "cache"])
"""settings in which the ranks of a run may differ"""
GRACE = 1.0
"""seconds after the timeout in which torch's own words for what went wrong may come"""


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


def run_marks(what: str, settings: Any) -> list[str]:
    """What tells two runs apart: `what`, and a digest of a dataclass of settings without those of a machine."""
    flat = json.dumps(_of_all_ranks(asdict(settings)), sort_keys=True, default=str)
    return [what, hashlib.sha256(flat.encode()).hexdigest()[:12]]


def _of_all_ranks(settings: Mapping[str, Any]) -> dict[str, Any]:
    nested = {key: _of_all_ranks(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    return {key: value for key, value in nested.items() if key not in OF_A_MACHINE}


def rendezvous(info: RankInfo, timeout: float, run: Sequence[str] = ()) -> dist.Store:
    """The store that all ranks share, once all are there. Each has set `beat/<rank>`.

    Args:
        timeout: seconds from now in which all ranks must have come.
        run: kind of device, then `run_marks`: the same on all ranks of a run.

    Raises:
        UserError: the port is taken, rank 0 does not answer, ranks are missing, or another run is there.
    """
    found: list[dist.Store | Exception] = []

    def meet() -> None:
        try:
            found.append(_meet(info, time.monotonic() + timeout, timeout, [f"{info.world_size} ranks", *run]))
        except Exception as error:
            found.append(error)

    # torch's client waits for ever on what takes its connection and does not answer; then its thread is left behind.
    thread = threading.Thread(target=meet, name="rendezvous", daemon=True)
    thread.start()
    thread.join(timeout + GRACE)
    if not found:
        raise _local_error(f"MASTER_ADDR: {info.address}:{info.port} {_silence(info, timeout)}")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _silence(info: RankInfo, timeout: float) -> str:
    """Why nothing came from rank 0."""
    try:
        socket.create_connection((info.address, info.port), GRACE).close()
    except OSError as error:
        return f"cannot be reached within {timeout:g} s (timeout_s): {error.strerror or error}"
    return (
        f"takes connections and does not answer within {timeout:g} s (timeout_s): another program listens there, or "
        "rank 0 stands still; choose another MASTER_PORT"
    )


def _meet(info: RankInfo, deadline: float, timeout: float, run: Sequence[str]) -> dist.Store:
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
    try:
        return _join(store, info, deadline, run)
    except dist.DistError:  # what follows says who did not come
        pass
    # Those who wait for rank 0 have come, too.
    raise _missing(store, info, "beat" if _is_set(store, info, "run") else "came", f"did not come to {where}", timeout)


def not_joined(store: dist.Store, info: RankInfo, timeout: float, error: Exception) -> UserError:
    """Why the ranks that had met have no process group.

    Args:
        store: of `rendezvous`; each rank has set `joining/<rank>` before it began to connect with the others.
        timeout: seconds that it waited for them.
        error: what torch says.
    """
    if all(_is_set(store, info, f"joining/{rank}") for rank in range(info.world_size)):
        reason = " ".join(str(error).split())
        return _local_error(f"the ranks met and could not connect within {timeout:g} s (timeout_s): {reason}")
    return _missing(store, info, "joining", "came and was lost before the ranks were connected", timeout)


def _missing(store: dist.Store, info: RankInfo, sign: str, what: str, timeout: float) -> UserError:
    """Error that names the ranks without a sign; the first of those that have one speaks."""
    missing = [rank for rank in range(info.world_size) if not _is_set(store, info, f"{sign}/{rank}")]
    listing = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
    error = UserError(f"rank {listing} of {info.world_size} {what} within {timeout:g} s (timeout_s)")
    error.local = info.rank == min({*range(info.world_size)} - {*missing})
    return error


def _is_set(store: dist.Store, info: RankInfo, key: str) -> bool:
    try:
        found: bool = store.check([key])
    except dist.DistError:
        raise _local_error(f"MASTER_ADDR: rank 0 at {info.address}:{info.port} ended while the ranks met") from None
    return found


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(deadline - time.monotonic(), 0.01))


def _join(store: dist.Store, info: RankInfo, deadline: float, run: Sequence[str]) -> dist.Store:
    """Take this rank's place in the run that the store belongs to, which is the one of its rank 0; wait for the others.

    Raises:
        UserError: it is another run, or the place is taken.
        DistError: not all are there by the deadline.
    """
    own = [part or "-" for part in run]
    store.set(f"came/{info.rank}", "")
    if info.rank == 0:
        _take_place(store, info)
        store.set("run", "\n".join(own))
    else:
        store.wait(["run"], _left(deadline))
        theirs = store.get("run").decode().split("\n")
        if theirs != own:
            raise _other_run(theirs, own, f"{info.address}:{info.port}")
        _take_place(store, info)
    store.compare_set("verdict", "", "")
    store.set(f"beat/{info.rank}", "")
    store.wait([f"beat/{rank}" for rank in range(info.world_size)], _left(deadline))
    return store


def _other_run(theirs: Sequence[str], own: Sequence[str], where: str) -> UserError:
    found, this = (", ".join(parts[:3]) for parts in (theirs, own))
    what = f"{found}; this is {this}" if found != this else f"{found} with other settings"
    return _local_error(
        f"MASTER_PORT: {where} serves another run: {what}; start all ranks of a run alike, and each run with a port "
        "of its own"
    )


def _take_place(store: dist.Store, info: RankInfo) -> None:
    own = f"{socket.gethostname()}, process {os.getpid()}#{secrets.token_hex(8)}"
    first = store.compare_set(f"place/{info.rank}", "", own).decode()
    if first != own:
        other = first.partition("#")[0]
        raise _local_error(
            f"RANK: there are two ranks {info.rank} at {info.address}:{info.port}, the other on {other}: two runs mix, "
            "or a rank was started twice; start each run with a port of its own"
        )
