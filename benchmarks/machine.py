"""The machine a number comes from: its description, its measured peaks, and the memory a process has used."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pspg.engine.utils.numerics import numerics

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKAGES = ("torch", "triton", "numpy", "open_clip_torch", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130")


def environment(device: torch.device, code: str | None = None) -> dict[str, Any]:
    """Device, machine, versions, settings, and commit (`code`, or the working tree's): what numbers depend on."""
    machine: dict[str, Any] = {
        "processor": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "memory_bytes": 1024 * int((_first("/proc/meminfo", "MemTotal") or "0").split()[0]),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    facts: dict[str, Any] = {"device": device.type, "machine": machine, "versions": versions}
    return {**facts, "numerics": numerics(), "commit": code or _commit()}


def _commit() -> str | None:
    """Commit of the working tree, marked `-dirty` where it differs; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--match", ""]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or None


def measure_peaks(device: torch.device, dtypes: Iterable[str]) -> dict[str, float]:
    """FLOP/s of large matrix products by dtype, and bytes/s of large copies, of this device now."""
    rates = {name: peak_flops(device, DTYPES[name]) for name in dtypes if name in DTYPES}
    a, b = (torch.rand(2**28 if device.type == "cuda" else 2**26, device=device) for _ in range(2))
    return {**rates, "bandwidth": 2 * a.nbytes / _median_time(lambda: a.copy_(b), device)}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large square matrix products: what this device reaches, not what it is sold as."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _median_time(lambda: a @ b, device)


def _median_time(function: Callable[[], object], device: torch.device) -> float:
    return statistics.median([timed(function, device) for _ in range(8)][1:])


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the launch and the device's work included."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def cache_bytes(device: torch.device) -> int:
    """Size of the largest cache that a device's cores share."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    known = [int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes if size[-1:] in ("K", "M")]
    return max(known, default=2**25)


def peak_bytes(device: torch.device) -> int:
    """Largest resident set of this process so far; on a GPU the most memory its tensors have held."""
    # Not getrusage: its maximum is inherited from the process that started this one.
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


class PeakMemory:
    """The most memory that is held from here on, beyond what is held here.

    On a CPU it is the resident set of this process; what the allocator keeps of earlier work is given back first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _resident("VmRSS")

    def bytes(self) -> int:
        """Bytes so far."""
        return max(peak_bytes(self._device) - self._before, 0)


def memory_limit() -> int:
    """Bytes that this process can come to hold before Linux runs short: what it holds and most of what is free."""
    free = 1024 * int((_first("/proc/meminfo", "MemAvailable") or "0").split()[0])
    return _resident("VmData") + int(0.95 * free) if free else -1


def _resident(key: str) -> int:
    return 1024 * int((_first("/proc/self/status", key) or "0").split()[0])


def _first(path: str, key: str) -> str | None:
    """Value of the first line `key: value` of a file of /proc."""
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return None
