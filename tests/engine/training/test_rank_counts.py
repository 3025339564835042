"""A run goes on at another number of ranks with the same bits of state, and validates to the same bits.

As a script this file is what one rank of such a run does.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pspg.engine.checkpoints.run import last_checkpoint, load_tensors, read_json
from pspg.engine.cli import parse
from pspg.engine.commands.train import make_trainer
from pspg.engine.distributed.collectives import all_gather_object
from pspg.engine.distributed.world import World, start
from pspg.engine.training.losses import PromptLoss

EPOCHS = 2


def begin(config: Any, world: World) -> None:
    """Train the first epoch of the run."""
    trainer = make_trainer(config, world)
    trainer.config.optim.epochs = 1
    trainer.fit()


def go_on(config: Any, world: World) -> list[str]:
    """Load the checkpoint under every ZeRO stage, compare the state, and train to the end under the last.

    Returns the validation metrics of all ranks, to the bit.
    """
    checkpoint = last_checkpoint(Path(config.output))
    assert checkpoint is not None
    metrics = []
    for stage in (0, 1, 2, 3) if config.task == "contrastive" else (0, 1, 2):
        trainer = make_trainer(replace(config, resume="latest", zero_stage=stage), world)
        loaded = {"model": trainer.engine.state(), "optimizer": trainer.engine.optimizer_state()}
        for name, tensors in loaded.items():
            expected = load_tensors(checkpoint / f"{name}.safetensors")
            assert tensors.keys() == expected.keys(), name
            unlike = [key for key, value in expected.items() if not torch.equal(value, tensors[key])]
            assert not unlike, (stage, name, unlike)
        if stage == 3 and world.size > 1:
            held = sum(parameter.numel() for parameter in trainer.task.module.parameters())
            assert held < 0.1 * sum(tensor.numel() for tensor in loaded["model"].values())
        with trainer.engine.whole() as module:
            found = trainer.task.validate(module)
        metrics += [
            f"{key} {value.hex()}" for ranks_own in all_gather_object(found) for key, value in ranks_own.items()
        ]
    trainer.fit()
    return metrics


def settings_of(arguments: Sequence[str]) -> Any:
    config = parse(arguments)[1]
    return replace(config, loss=PromptLoss(config.loss).config)


def more(settings: Callable[[str], list[str]], task: str, run: Path) -> list[str]:
    # 24 validation images make three batches, the last of them partial: of four ranks one has none.
    return [*settings(task), "--output", str(run), "--optim.epochs", str(EPOCHS), "--evaluation.batch_size", "10"]


def on(ranks: Callable[..., Any], count: int, work: str, arguments: list[str]) -> str:
    """Output of rank 0."""
    processes = ranks([__file__, work, *arguments], count)
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)[-3000:]
    return outputs[0]


def alone(work: Callable[[Any, World], Any], arguments: list[str]) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have: sums depend on it
    try:
        return work(settings_of(arguments), start("cpu"))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "before", "stage", "after"),
    # Three ranks do not divide the weights, which are sharded then.
    [("contrastive", 1, 0, 2), ("contrastive", 2, 3, 3), ("prompt", 2, 0, 4)],
)
def test_run_goes_on(tmp_path: Path, settings, ranks, task: str, before: int, stage: int, after: int) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    first = [*more(settings, task, run), "--zero_stage", str(stage)]
    if before == 1:
        alone(begin, first)
    else:
        on(ranks, before, "begin", first)
    shutil.copytree(run, copy)
    metrics = set(alone(go_on, more(settings, task, run)))
    assert len(metrics) == 1
    output = on(ranks, after, "go_on", more(settings, task, copy))
    assert {line for line in output.splitlines() if line.startswith("val_")} == metrics
    for folder in (run, copy):
        assert read_json(last_checkpoint(folder) / "state.json")["epoch"] == EPOCHS


if __name__ == "__main__":
    work, *arguments = sys.argv[1:]
    world = start("cpu")
    config = settings_of(arguments)
    if work == "begin":
        begin(config, world)
    else:
        print(*go_on(config, world), sep="\n")
    sys.stdout.flush()
    os._exit(0)
