"""The machine a number comes from: its description, its peak, and the memory a process has used."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import subprocess
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores that torch uses, memory, and the GPU if it is one."""
    found: dict[str, Any] = {
        "processor": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "memory_bytes": 1024 * int((_first("/proc/meminfo", "MemTotal") or "0").split()[0]),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "open_clip_torch"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str | None:
    """Commit of the working tree, marked `-dirty` where it differs; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--match", ""]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or None


def peak_flops(device: torch.device, dtype: torch.dtype, repeats: int = 7) -> float:
    """FLOP/s of large square matrix products, the median of a few: what this device reaches, not what it is sold as."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(repeats + 1):
        times.append(timed(lambda: a @ b, device))
    return 2 * size**3 / statistics.median(times[1:])


def peak_bandwidth(device: torch.device, repeats: int = 7) -> float:
    """Bytes/s of a large copy within the device's memory, read and written, the median of a few."""
    count = 2**28 if device.type == "cuda" else 2**26
    a, b = (torch.rand(count, device=device) for _ in range(2))
    times = [timed(lambda: a.copy_(b), device) for _ in range(repeats + 1)]
    return 2 * a.nbytes / statistics.median(times[1:])


def timed(function: Any, device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def cache_bytes(device: torch.device) -> int:
    """Of the largest cache that a device's cores share."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    known = [int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes if size[-1:] in ("K", "M")]
    return max(known, default=2**25)


def peak_bytes(device: torch.device) -> int:
    """Largest resident set of this process so far; on a GPU the most memory its tensors have held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: its maximum is inherited from the process that started this one.
    return _resident("VmHWM")


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
        """So far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(_resident("VmHWM") - self._before, 0)


def _resident(key: str) -> int:
    return 1024 * int((_first("/proc/self/status", key) or "0").split()[0])


def _first(path: str, key: str) -> str | None:
    """Value of the first line `key: value` of a file of /proc."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)
