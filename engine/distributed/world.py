"""This process among the processes of a run: its device, its rank, and the process group that it joins."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..utils.device import pick_device
from ..utils.errors import UserError
from ..utils.numerics import fix_numerics
from .launcher import RankInfo, launcher_environment, not_joined, rendezvous


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0
    """among the processes of this machine"""
    store: dist.Store | None = None
    """that the ranks share; None: one process without a launcher"""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


_store: dist.Store | None = None
"""store of this process, once it has joined"""


def start(device: str, timeout: float = 600, *, hosts_only: bool = False, run: Sequence[str] = ()) -> World:
    """Join the process group that a launcher announced, or make a group of one.

    Args:
        device: auto, cpu or cuda.
        timeout: seconds that ranks wait for each other.
        hosts_only: what ranks tell each other never lies on a GPU.
        run: from `run_marks`; ranks of another run are refused.

    Raises:
        UserError: what the launcher announced does not fit, no GPU for a rank that was asked to use one, the port is
            taken, ranks are missing, or another run is there.
    """
    global _store
    info = launcher_environment()
    torch_device = device_of(device, info)
    os.environ["DS_ACCELERATOR"] = torch_device.type
    fix_numerics(torch_device)
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
    if not dist.is_initialized():
        # Once a process: DeepSpeed keeps the group for good, so a second run in this process joins the same one.
        over_hosts = torch_device.type == "cpu" or (hosts_only and info is not None)
        _store = _join_group("gloo" if over_hosts else "nccl", info, timeout, [torch_device.type, *run])
    return World(dist.get_rank(), dist.get_world_size(), torch_device, info.local_rank if info else 0, _store)


def device_of(device: str, info: RankInfo | None) -> torch.device:
    """Device of this process: `pick_device`, but where a machine has too few GPUs all its processes are refused."""
    try:
        pick_device(device, info.local_world_size - 1 if info else 0)
    except UserError as error:
        error.local = info is not None and info.local_rank == 0
        raise
    return pick_device(device, info.local_rank if info else 0)


def _join_group(backend: str, info: RankInfo | None, timeout: float, run: Sequence[str]) -> dist.Store | None:
    if info is None:
        # No launcher. A group of one needs no port, and with these set DeepSpeed does not look for MPI.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        store = None
    else:
        store = rendezvous(info, timeout, run)
        place: dict[str, Any] = {"rank": info.rank, "world_size": info.world_size}
        try:
            store.set(f"joining/{info.rank}", "")
            dist.init_process_group(backend, store=store, timeout=timedelta(seconds=timeout), **place)
        except RuntimeError as error:
            raise not_joined(store, info, timeout, error) from None
        # From now on later than the watch, which names the rank that is missing.
        # Public since torch 2.14.
        set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
        set_timeout(timedelta(seconds=timeout + 30), dist.group.WORLD)
    atexit.register(dist.destroy_process_group)
    return store
