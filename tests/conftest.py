"""A phantom data set and a CLIP small enough for tests of whole commands."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides at its import whether kernels compile or run in its interpreter, and the engine imports it.
    os.environ["TRITON_INTERPRET"] = "1"

from pspg.engine.data.phantoms.dataset import PhantomConfig, write_phantoms
from pspg.engine.training.telemetry import read_metrics

# A shell that starts tests in the background has them ignore Ctrl-C, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

CLIP = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "head_width": 32},
    "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 training, 24 validation and 40 test films of 64 pixels, and clip.json."""
    folder = tmp_path_factory.mktemp("data") / "phantoms"
    write_phantoms(PhantomConfig(train=72, val=24, test=40, size=64, classes=20), folder, workers=1)
    (folder / "clip.json").write_text(json.dumps(CLIP))
    return folder


@pytest.fixture(scope="session")
def settings(phantoms: Path) -> Callable[[str], list[str]]:
    """Arguments of `pspg-engine train` for a task; later ones win."""

    def arguments(task: str) -> list[str]:
        common = {
            "task": task,
            "model.backbone": phantoms / "clip.json",
            "data.train": phantoms / "train.jsonl",
            "data.val": phantoms / "val.jsonl",
            "data.image_size": 64,
            "data.workers": 0,
            "batch_size": 12,
            "optim.name": "adamw",
            "optim.lr": "1e-3",
            "optim.epochs": 2,
            "optim.warmup_epochs": 1,
            "model.prompt_length": 3,
            "model.hidden_size": 16,
            "model.decoder_heads": 2,
            "log_every": 1,
            "evaluation.batch_size": 12,
            "evaluation.bank_size": 12,
            "device": "cpu",
        }
        return ["train", *(word for key, value in common.items() for word in (f"--{key}", str(value)))]

    return arguments


@pytest.fixture(scope="session")
def engine_command() -> Callable[..., subprocess.Popen[str]]:
    """Start `pspg-engine` in a process group of its own, on `processes` ranks."""

    def start(arguments: Sequence[object], *, processes: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, "-m"]
        if processes:
            command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        return subprocess.Popen(
            [*command, "pspg.engine", *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="session")
def kill_after() -> Callable[..., None]:
    """SIGKILL a training process and its loader workers once `rows` rows of metrics are written."""

    def kill(process: subprocess.Popen[str], run: Path, rows: int) -> None:
        deadline = time.monotonic() + 120
        while len(read_metrics(run / "metrics.jsonl")) < rows:
            assert process.poll() is None, process.communicate()[0][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

    return kill


@pytest.fixture
def ranks() -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """Start the ranks of a run without a launcher, which would end the others by itself; none outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def start(arguments: list[str], count: int) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
            started.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "MASTER_PORT": str(port)}
                    | {key: str(value) for key, value in place.items()},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )
        return started[-count:]

    yield start
    for process in started:
        for number in (signal.SIGKILL, signal.SIGCONT):
            if process.poll() is None:
                os.killpg(process.pid, number)
        process.communicate()
