"""What one GPU does: products by chunk size, convolutions, torch's attention with wide heads, launch gap, copies.

`python -m benchmarks.gpu.probe NAME OUT`: needs torch alone. Times are of calls within a CUDA graph.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pspg.engine.utils.errors import first_line
from pspg.engine.utils.files import write_text

CALLS, REPLAYS = 20, 7
CHUNKS = (91, 367, 440, 482, 488, 496, 550, 700, 964)
"""pairs of a chunk: 17 tokens each are the rows of its products"""
PRODUCTS = ((1536, 512), (512, 512), (2048, 512), (512, 2048), (512, 1536))
"""columns and inner length of the text tower's products, forward and backward"""
CONVOLUTIONS = (
    (32, 112, 3, 64),
    (64, 56, 1, 256),
    (64, 56, 3, 64),
    (256, 56, 1, 64),
    (128, 28, 3, 128),
    (512, 28, 1, 128),
    (256, 14, 3, 256),
    (1024, 14, 1, 256),
    (512, 7, 3, 512),
)
"""channels, side, kernel and output channels of RN50's convolutions"""


class Timed(NamedTuple):
    """One function, and what it does."""

    name: str
    function: Callable[[], object]
    flops: float = 0
    bytes: float = 0


class Probe:
    """Functions to time on a device; tiny shapes on a CPU, where nothing but the code is tried."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.small = device, device.type == "cpu"

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def gap(self) -> Iterator[Timed]:
        """Kernels that do nothing, one after the other: what a launch costs within a graph."""
        x = self.rand(1024)
        yield Timed("gap", lambda: x.add_(1))

    def copy(self) -> Iterator[Timed]:
        """A copy that no cache holds."""
        a, b = (self.rand(2**10 if self.small else 2**28) for _ in range(2))
        yield Timed("copy", lambda: a.copy_(b), bytes=2 * a.nbytes)

    def products(self) -> Iterator[Timed]:
        """Products of the text tower, by the pairs of a chunk, and one that is large."""
        size = 64 if self.small else 8192
        a, b = self.rand(size, size), self.rand(size, size)
        yield Timed("large", lambda: a @ b, flops=2 * size**3)
        for pairs in CHUNKS[:1] if self.small else CHUNKS:
            rows = 34 if self.small else 17 * pairs
            for columns, inner in PRODUCTS:
                x, w, bias = self.rand(rows, inner), self.rand(columns, inner), self.rand(columns)
                moved = 2 * (rows * inner + columns * inner + rows * columns)
                name = f"1x{rows}x{columns}x{inner}"
                yield Timed(name, partial(F.linear, x, w, bias), 2 * rows * columns * inner, moved)

    def attention(self) -> Iterator[Timed]:
        """torch's attention of one query a sequence with heads as wide as the tower, forward and with backward."""
        rows = 2 if self.small else 367
        q, k = (self.rand(rows, 1, tokens, 512).requires_grad_() for tokens in (8, 34))

        def attend() -> Tensor:
            return F.scaled_dot_product_attention(q, k, k, scale=0.125)

        yield Timed(f"forward {rows}", lambda: attend().detach())
        yield Timed(f"both {rows}", lambda: torch.autograd.grad(attend().sum(), [q, k]))

    def convolutions(self) -> Iterator[Timed]:
        """Convolutions of RN50 at 64 images, their ReLU after them or inside."""
        for channels, side, kernel, out in CONVOLUTIONS[-1:] if self.small else CONVOLUTIONS:
            images, pad = 2 if self.small else 64, kernel // 2
            x, w = self.rand(images, channels, side, side), self.rand(out, channels, kernel, kernel)
            x, w = (tensor.to(memory_format=torch.channels_last) for tensor in (x, w))
            bias = self.rand(out)
            flops = 2 * images * side**2 * channels * out * kernel**2
            name = f"{channels}to{out} {side} k{kernel}"
            yield Timed(f"{name} plain", partial(_plain, x, w, bias, pad), flops)
            if not self.small:
                shape = ((1, 1), (pad, pad), (1, 1), 1)
                yield Timed(f"{name} fused", partial(torch.cudnn_convolution_relu, x, w, bias, *shape), flops)
                z = F.conv2d(x, w, bias, padding=pad)
                added = partial(torch.cudnn_convolution_add_relu, x, w, z, 1.0, bias, *shape)
                yield Timed(f"{name} fused add", added, flops)


NAMES = ("gap", "copy", "products", "attention", "convolutions")


def measure(name: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of one group of functions: name, µs (null with an error), TFLOP/s and GB/s."""
    for timed in getattr(Probe(device), name)():
        try:
            us = _microseconds(timed.function, device)
        except RuntimeError as error:
            yield {"name": timed.name, "us": None, "error": first_line(error)[:120]}
            continue
        yield {"name": timed.name, "us": us, "tflops": timed.flops / us / 1e6, "gbs": timed.bytes / us / 1e3}


def _plain(x: Tensor, w: Tensor, bias: Tensor, pad: int) -> Tensor:
    return F.conv2d(x, w, bias, padding=pad).relu_()


def _microseconds(function: Callable[[], object], device: torch.device) -> float:
    """Median time of a call: on a GPU of `CALLS` calls that one graph replays."""
    if device.type == "cpu":
        function()
        return 1.0
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            function()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * statistics.median(times) / CALLS


def main(name: str, output: str) -> None:
    """Measure one group; the file is complete after every row."""
    rows: list[dict[str, Any]] = []
    for row in measure(name, torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        rows.append(row)
        write_text(Path(output), json.dumps(rows) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
