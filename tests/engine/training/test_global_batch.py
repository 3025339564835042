"""Several gloo processes under `scope: global` against one: every parameter after 20 steps, and every logged loss."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pspg.engine.checkpoints.run import last_checkpoint, load_tensors
from pspg.engine.data.batch import Batch
from pspg.engine.distributed.collectives import split
from pspg.engine.training import global_batch as global_scope
from pspg.engine.training.config import TrainConfig, graph_needs
from pspg.engine.training.global_batch import SharedBatch, SharedBatches
from pspg.engine.utils.metrics_log import read_metrics

RANKS = Path(__file__).parents[1] / "ranks"
# name → task, settings of the runs, number of processes → ZeRO stage
RUNS: dict[str, tuple[str, dict[str, object], dict[int, int]]] = {
    "spcl": ("prompt", {}, {2: 0, 4: 1}),
    "sampled, two batches a step": (
        "prompt",
        {"loss.pair_samples": 2, "optim.accumulate": 2, "optim.epochs": 10, "data.cache_features": True},
        {2: 2},
    ),
    "sampled": ("prompt", {"loss.pair_samples": 1, "model.dropout": 0.3}, {}),
    "pcl, means": (
        "prompt",
        {"loss.pair": "pcl", "loss.pair_reduction": "mean", "loss.classification_reduction": "mean"},
        {2: 1},
    ),
    "ranking": ("prompt", {"loss.pair": "ranking", "loss.classification": "bce"}, {2: 0}),
    # All classes pull at the same vectors, and rounding grows fast; small steps keep it in sight.
    "dualcoop": (
        "prompt",
        {
            "model.decoder": "context",
            "model.fusion": "regions",
            "loss.pair": "none",
            "optim.lr": 1e-7,
            "optim.warmup_lr": 1e-7,
            "optim.min_lr": 1e-7,
        },
        {2: 1},
    ),
    "a bad image": ("prompt", {"data.on_bad_image": "skip"}, {2: 2}),
    # Shares of one image, one of them unreadable; three classes and pairs, fewer than ranks.
    "less than a rank each": (
        "prompt",
        {
            "data.on_bad_image": "skip",
            "batch_size": 4,
            "optim.epochs": 2,
            "optim.lr": 2e-5,
            "data.class_names": "three.txt",
        },
        {4: 2},
    ),
    # Rounding grows fast in an untrained ResNet; small steps keep it in sight.
    "contrastive": ("contrastive", {"optim.clip_norm": 0.1, "optim.lr": 1e-3}, {2: 1, 4: 0}),
    # Wide enough that all its matrices are sharded; two batches a step.
    "sharded": (
        "contrastive",
        {
            "optim.clip_norm": 0.1,
            "optim.lr": 3e-4,
            "optim.accumulate": 2,
            "optim.epochs": 10,
            "model.backbone": "wide.json",
        },
        {2: 3, 4: 3},
    ),
}
# The same recorded by hand, without ZeRO: name → run that it equals, settings, numbers of processes.
RECORDED: dict[str, tuple[str, dict[str, object], tuple[int, ...]]] = {
    "recorded spcl": ("spcl", {}, (2, 3, 4)),
    "recorded ahead": ("spcl", {"images_ahead": True}, (2,)),
    "recorded sampled": ("sampled", {}, (2, 3, 4)),
    "recorded sampled, two batches a step": ("sampled, two batches a step", {}, (2,)),
    "recorded ranking": ("ranking", {}, (2,)),
    "recorded dualcoop": ("dualcoop", {}, (2,)),
    "recorded, a bad image": ("a bad image", {"images_ahead": True}, (2,)),
    "recorded contrastive": ("contrastive", {}, (2,)),
    "refused by one rank": ("spcl", {}, (2,)),
}


def launch(script: str, processes: int, *arguments: object, timeout: float) -> None:
    """Run a script of `ranks/` on so many ranks and leave none of them behind."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    process = subprocess.Popen(
        [*command, str(RANKS / script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-3000:]


@pytest.fixture(scope="module")
def trained(
    phantoms: Path, settings: Callable[[str], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Function (processes, recorded=False) → folder with a run of each name, on so many processes; one is local."""
    folder = tmp_path_factory.mktemp("global")
    rows = [json.loads(line) for line in (phantoms / "train.jsonl").read_text().splitlines()[:60]]
    (phantoms / "sixty.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows[7]["filepath"] = "images/unreadable.png"
    (phantoms / "images" / "unreadable.png").write_bytes(b"")
    (phantoms / "sixty_bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    names = (phantoms / "classes.txt").read_text().splitlines()
    (phantoms / "three.txt").write_text("\n".join(names[:3]))
    clip = json.loads((phantoms / "clip.json").read_text())
    text = {"context_length": 48, "width": 96, "layers": 2}
    (phantoms / "wide.json").write_text(json.dumps({**clip, "embed_dim": 64, "text_cfg": {**clip["text_cfg"], **text}}))

    def arguments(name: str, processes: int, **more: object) -> list[str]:
        like, changes, _ = RECORDED.get(name, (name, {}, ()))
        task, own, stages = RUNS[like]
        stages = {} if name in RECORDED else stages
        values = {
            "data.train": phantoms / ("sixty_bad.jsonl" if "data.on_bad_image" in own else "sixty.jsonl"),
            "data.mean": 0.5,
            "data.std": 0.25,
            "optim.name": "sgd",
            "optim.lr": 1e-4,
            "optim.epochs": 4,
            "zero_stage": stages.get(processes, 0),
            "output": folder / str(processes) / name,
            **own,
            **changes,
            **more,
        }
        for key in ("data.class_names", "model.backbone"):
            if key in own:
                values[key] = phantoms / str(own[key])
        if values.get("data.cache_features"):
            values.update({"data.augment": False, "data.flip": 0})
        words = settings(task)
        if task == "prompt":
            words[words.index("--data.val") : words.index("--data.val") + 2] = []
        return [*words, *(word for key, value in values.items() for word in (f"--{key}", str(value).lower()))]

    def train(processes: int) -> Path:
        commands = [arguments(name, processes) for name, run in RUNS.items() if processes == 1 or processes in run[2]]
        if processes == 2:
            commands.append(arguments("spcl", 2, scope="local", output=folder / "2" / "local"))
        file = folder / f"{processes}.json"
        file.write_text(json.dumps(commands))
        launch("train.py", processes, file, timeout=400)
        return folder / str(processes)

    def record(processes: int) -> Path:
        commands = [arguments(name, processes) for name, run in RECORDED.items() if processes in run[2]]
        file = folder / f"recorded{processes}.json"
        file.write_text(json.dumps(commands))
        launch("recorded.py", processes, file, timeout=400)
        return folder / str(processes)

    done: dict[tuple[int, bool], Path] = {}

    def folder_of(processes: int, recorded: bool = False) -> Path:
        if (processes, recorded) not in done:
            done[processes, recorded] = (record if recorded else train)(processes)
        return done[processes, recorded]

    return folder_of


def weights(run: Path, file: str = "model") -> dict[str, Tensor]:
    folder = last_checkpoint(run)
    assert folder is not None
    return load_tensors(folder / f"{file}.safetensors")


def apart(one: Path, other: Path) -> float:
    """Largest difference of two runs in a tensor, as a share of the tensor's largest element or 1."""
    expected, got = weights(one), weights(other)
    assert expected.keys() == got.keys()
    return max(
        (value.double() - got[key].double()).abs().max().item() / max(value.abs().max().item(), 1.0)
        for key, value in expected.items()
    )


def losses(run: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(run / "metrics.jsonl") if key in row]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [(name, count) for name, run in RUNS.items() for count in run[2]])
def test_any_number_of_processes_computes_the_step_of_one(
    trained: Callable[..., Path], name: str, processes: int
) -> None:
    one, several = trained(1) / name, trained(processes) / name
    assert len(losses(one)) >= 20
    assert losses(several) == pytest.approx(losses(one), rel=5e-6)
    assert apart(one, several) < 2e-6
    if RUNS[name][0] == "contrastive":
        assert losses(several, "val_loss") == pytest.approx(losses(one, "val_loss"), rel=5e-6)
        assert losses(one, "val_loss")
    if name == "sharded":
        # Steps are short: the momentum of a tensor shows a wrong gradient better than its weights do. On four ranks
        # rounding has grown to half a percent of it; a share that is lost or counted twice would be a quarter.
        momenta = weights(several, "optimizer")
        for key, value in weights(one, "optimizer").items():
            # The bias of the attention pool's keys has no gradient but rounding.
            assert (value - momenta[key]).norm() < 2e-2 * value.norm() + 1e-8, key
    elif RUNS[name][0] != "contrastive":  # encoded by parts
        bank = [load_tensors(run / "bank.safetensors") for run in (one, several)]
        assert all(torch.equal(tensor, bank[1][key]) for key, tensor in bank[0].items())
    peaks = [row["peak_bytes"] for row in read_metrics(several / "metrics.jsonl") if "peak_bytes" in row]
    assert peaks
    assert all(len(of_ranks) == processes and min(of_ranks) > 2**20 for of_ranks in peaks)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [(name, count) for name, run in RECORDED.items() for count in run[2]])
def test_recorded_steps_are_those_of_one_process(trained: Callable[..., Path], name: str, processes: int) -> None:
    """The recorder also fails where ranks differ in their collectives, a shape changes or the host reads a value."""
    one, several = trained(1) / RECORDED[name][0], trained(processes, recorded=True) / name
    assert losses(several) == pytest.approx(losses(one), rel=5e-6)
    assert apart(one, several) < 2e-6


@pytest.mark.slow
def test_local_scope_is_another_computation(trained: Callable[..., Path]) -> None:
    """What the test above would see if batch-level parts looked at a rank's share."""
    assert apart(trained(1) / "spcl", trained(2) / "local") > 0.1


@pytest.mark.slow
def test_primitives() -> None:
    launch("primitives.py", 3, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_recorded_steps_where_images_are_missing(processes: int) -> None:
    launch("missing.py", processes, timeout=300)


def test_batch_of_which_nothing_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has a stand-in. One of them counts, the last rank's, which is the one that one process takes."""
    labels = {"first": [1.0, 0.0], "last": [0.0, -1.0]}

    def shared(rank: int, *, readable: bool) -> SharedBatch:
        standing = [not readable, True]
        batches = [
            Batch([name], torch.zeros(1), torch.zeros(1, 2, 2), torch.tensor([row]), None, 0.5, 0.2, dummy=dummy)
            for (name, row), dummy in zip(labels.items(), standing, strict=True)
        ]
        messages = [
            torch.tensor([0.0 if dummy else 1.0, *row, 0.0, 0.0])
            for row, dummy in zip(labels.values(), standing, strict=True)
        ]

        def all_gather_host(own: Tensor) -> list[Tensor]:
            assert torch.equal(own, messages[rank])
            return messages

        monkeypatch.setattr(global_scope, "all_gather_host", all_gather_host)
        loader = SimpleNamespace(batches_per_epoch=1, bad={}, batches=lambda epoch, start: iter([batches[rank]]))
        (found,) = SharedBatches(loader, 2, rank).batches(0)
        return found

    for rank, count in enumerate([0, 1]):
        found = shared(rank, readable=False)
        assert (found.count, found.counts, found.labels.tolist()) == (count, [0, 1], [labels["last"]])
        found = shared(rank, readable=True)
        assert (found.count, found.counts, found.labels.tolist()) == (1 - count, [1, 0], [labels["first"]])


def test_pieces_are_contiguous_and_balanced() -> None:
    for count, pieces in ((0, 3), (2, 4), (91, 8), (5778, 7), (64, 1)):
        found = split(count, pieces)
        assert found[0][0] == 0
        assert found[-1][1] == count
        assert [stop for _, stop in found[:-1]] == [start for start, _ in found[1:]]
        sizes = [stop - start for start, stop in found]
        assert max(sizes) - min(sizes) <= 1


def test_ranks_record_a_graph_in_either_scope() -> None:
    assert graph_needs(TrainConfig()) is None
    assert graph_needs(TrainConfig(scope="local")) is None
