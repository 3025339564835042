"""The scripts of `configs/launch`, run: two nodes are two loopback addresses, SLURM's commands are stood in for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pspg.engine.training.telemetry import read_metrics
from tests.engine.distributed.conftest import Spawn

SCRIPTS = Path(__file__).parents[3] / "configs" / "launch"
Launch = Callable[..., subprocess.Popen[str]]
NODES = ("127.0.0.1", "127.0.0.2")
SRUN = """#!/bin/bash
echo "srun $*"
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & SLURM_NODEID=1 "$@"
wait $!
"""


@pytest.fixture
def launch(spawn: Spawn) -> Launch:
    """Function that starts a script with variables and arguments."""

    def start(script: str, variables: dict[str, object], arguments: list[object]) -> subprocess.Popen[str]:
        tools = [str(variables.pop("TOOLS", "")), str(Path(sys.executable).parent), os.environ["PATH"]]
        path = os.pathsep.join(filter(None, tools))
        return spawn(["bash", SCRIPTS / script, *arguments], {"OMP_NUM_THREADS": 1, "PATH": path, **variables})

    return start


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def places(output: str) -> list[tuple[str, ...]]:
    """Rank, ranks, local rank, local ranks, images of a batch that each rank told."""
    pattern = (
        r"rank (\d) of (\d) on \S+ \(local (\d) of (\d)\), rank 0 at \S+:\d+: cpu, (\d+) of the 12 images of a batch"
    )
    return sorted(match.groups() for match in re.finditer(pattern, output))


TWO_NODES = [("0", "2", "0", "1", "6"), ("1", "2", "0", "1", "6")]


@pytest.mark.slow
@pytest.mark.parametrize("dry", [True, False])
def test_torchrun_on_two_nodes(tmp_path: Path, settings, launch: Launch, free_port: int, dry: bool) -> None:
    run = tmp_path / "run"
    variables = {"NODES": 2, "GPUS": 1, "MASTER": NODES[0], "PORT": free_port, "RUN": "two"}
    arguments = [*settings("prompt")[1:], "--output", run, "--optim.epochs", 1, *(["--dry_run"] if dry else [])]
    processes = [launch("torchrun.sh", {**variables, "ADDRESS": node}, arguments) for node in NODES]
    output = "".join(finish(process) for process in processes)
    if dry:
        assert places(output) == TWO_NODES
        assert "72 images with 20 classes, 12 images a batch, 6 steps an epoch, 6 in all\n" in output
        assert not run.exists()
    else:
        assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_deepspeed_with_a_hostfile_and_no_ssh(tmp_path: Path, settings, launch: Launch, free_port: int) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{node} slots=1\n" for node in NODES))
    variables = {"HOSTFILE": hosts, "MASTER": NODES[0], "PORT": free_port, "DS_ACCELERATOR": "cpu"}
    arguments = [*settings("prompt")[1:], "--output", tmp_path / "run", "--dry_run"]
    processes = [launch("deepspeed.sh", {**variables, "NODE_RANK": rank}, arguments) for rank in (0, 1)]
    assert places("".join(finish(process) for process in processes)) == TWO_NODES


@pytest.mark.slow
def test_slurm_on_two_nodes(tmp_path: Path, settings, launch: Launch) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": f"#!/bin/bash\necho {NODES[0]}\n"}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "activate").write_text("echo sourced $NEVER_SET\n")
    job = {"JOB_ID": os.getpid(), "JOB_NUM_NODES": 2, "JOB_NODELIST": "node[1-2]", "CPUS_ON_NODE": 6, "GPUS_ON_NODE": 1}
    # A batch job of SLURM has ENVIRONMENT=BATCH, whatever sbatch was given.
    own = {"TOOLS": tools, "ENVIRONMENT": "BATCH", "ACTIVATE": tmp_path / "activate"}
    variables = {**own, **{f"SLURM_{k}": v for k, v in job.items()}}
    arguments = [*settings("prompt")[1:], "--output", tmp_path / "run", "--dry_run"]
    output = finish(launch("slurm.sh", variables, arguments))
    assert output.startswith("sourced\nsrun --kill-on-bad-exit=1 --cpus-per-task=6 torchrun --nnodes=2 ")
    assert places(output) == TWO_NODES


def test_torchrun_without_gpus_is_one_line(launch: Launch, tmp_path: Path) -> None:
    process = launch("torchrun.sh", {"TOOLS": tmp_path, "GPUS": ""}, [])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == "torchrun.sh: GPUS: nvidia-smi lists none; give the processes of a node\n"
