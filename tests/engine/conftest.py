"""A phantom data set, tiny random CLIPs, and commands on both. What is slow to import is imported by its fixture."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

NAMES = ["cardiomegaly", "pleural effusion", "edema", "no finding"]
PHANTOM_CLIP = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "head_width": 32},
    "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
ports = itertools.count(10_000 + 10 * (os.getpid() % 2000))


def next_port() -> int:
    """Port that nothing listens on, below those that the system hands out by itself, from this process's own range."""
    for port in ports:
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port
    raise AssertionError


@pytest.fixture
def free_port() -> int:
    return next_port()


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 training, 24 validation and 40 test images of 64 pixels, and clip.json."""
    from pspg.engine.data.phantoms.dataset import PhantomConfig, write_phantoms

    folder = tmp_path_factory.mktemp("data") / "phantoms"
    write_phantoms(PhantomConfig(train=72, val=24, test=40, image_size=64, classes=20), folder, workers=1)
    (folder / "clip.json").write_text(json.dumps(PHANTOM_CLIP))
    return folder


@pytest.fixture(scope="session")
def settings(phantoms: Path) -> Callable[[str], list[str]]:
    """Arguments of `pspg-engine train` for a task; later ones win."""

    def arguments(task: str) -> list[str]:
        common = {
            "task": task,
            "model.backbone": phantoms / "clip.json",
            "model.pretrained": "random",
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
def killed_run() -> Callable[..., None]:
    """Run `pspg-engine` until its metrics hold `rows` rows, then SIGKILL it with its loader workers."""

    def run(arguments: Sequence[object], rows: int) -> None:
        command = [sys.executable, str(Path(__file__).parent / "ranks" / "killed.py"), str(rows), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]

    return run


@pytest.fixture
def ranks() -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """Start the ranks of a run without a launcher, which would end the others by itself; none outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def start(arguments: list[str], count: int) -> list[subprocess.Popen[str]]:
        port = next_port()
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


def tiny_config(vit: bool = False, quick_gelu: bool = True) -> dict[str, Any]:
    """D = 24, W = 16, two text layers of two heads; 32×32 pixels, S = 2 (ResNet) or 5 (ViT)."""
    vision: dict[str, Any] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 4, "head_width": 16}
    if vit:
        vision = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    return {"embed_dim": 24, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}


@pytest.fixture
def make_clip() -> Callable[..., Any]:
    """Function (vit=False, quick_gelu=True) → float64 CLIP in eval mode, every weight and statistic random."""
    import torch

    from pspg.engine.models.clip import build_clip

    def make(vit: bool = False, quick_gelu: bool = True) -> Any:
        torch.manual_seed(0)
        clip = build_clip(tiny_config(vit, quick_gelu)).double().eval()
        with torch.no_grad():
            for name, tensor in clip.state_dict().items():
                if tensor.is_floating_point() and tensor.ndim == 1:
                    offset = 1.0 if "var" in name or name.endswith("weight") else 0.0
                    tensor.copy_(offset + 0.1 * torch.randn_like(tensor).abs())
        return clip

    return make


@pytest.fixture
def names() -> list[str]:
    return list(NAMES)


@pytest.fixture
def model_folder(make_clip: Callable[..., Any], names: list[str], tmp_path: Path) -> Callable[..., Path]:
    """Function (vit=False, resize="stretch", bank=True, tokens=True, **settings of the head) → folder of an untrained
    model whose scores differ from image to image."""
    import torch

    from pspg.engine.checkpoints.model_folder import bank_tensors, describe, write_model
    from pspg.engine.config import ModelConfig
    from pspg.engine.data.pixels import Pixels
    from pspg.engine.models.pspg import PsPG

    def make(vit: bool = False, resize: Any = "stretch", bank: bool = True, tokens: bool = True, **head: Any) -> Path:
        folder, clip = tmp_path / "model", make_clip(vit=vit).float()
        torch.manual_seed(1)
        config = ModelConfig(**{"prompt_length": 3, "hidden_size": 8, "decoder_heads": 2, **head})
        model = PsPG(clip, config, names)
        with torch.no_grad():
            for parameter in model.prompt_learner.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        pixels = Pixels(size=32, resize=resize, mean=0.4, std=0.2)
        tensors = {"clip": dict(clip.state_dict()), "model": dict(model.head.state_dict())}
        if bank:
            tensors["bank"] = bank_tensors(model.image_features(torch.randn(6, 3, 32, 32)))
            if not tokens:  # as before there were blends
                del tensors["bank"]["tokens"]
        described = describe("pspg", clip, pixels, head=config, class_names=names, training="trained on noise")
        write_model(folder, described, tensors)
        return folder

    return make


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder of five grey PNGs of noise, two of them below it."""
    import numpy as np
    from PIL import Image

    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for name in ("a.png", "A_.png", "a?.png", "b/a.png", "b/c d.png"):
        Image.fromarray(noise.integers(0, 256, (50, 40), dtype=np.uint8)).save(folder / name)
    return folder
