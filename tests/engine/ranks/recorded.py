"""Run commands as `train.py` does, with every step recorded by hand: what a CUDA graph cannot hold fails."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from benchmarks.traffic import ALL_GATHER, KINDS, group_sizes, step_payload
from pspg.engine.cli import main
from pspg.engine.distributed.collectives import all_gather_object
from pspg.engine.training.cuda_graph import WARM_UP
from pspg.engine.training.losses import PromptLoss
from pspg.engine.training.trainer import Trainer
from tests.engine.recorder import CheckedRecorder, HostReads

original_pairs = PromptLoss.pairs


def refuses(trainer: Trainer) -> bool:
    """One rank of this run cannot record."""
    return trainer.run.name.startswith("refused")


def refuse(function: Any) -> Any:
    function()  # a true recording sends nothing, but this one of the others does
    raise RuntimeError("not here")


def pairs_noted(*arguments: Any, **settings: Any) -> Any:
    """`PromptLoss.pairs`, noted among the collectives."""
    if HostReads.active is not None:
        HostReads.active.collectives.append(("pairs",))
    return original_pairs(*arguments, **settings)


def check_order_and_bytes(trainer: Any) -> None:
    """Of full SPCL: the mean of the negative prompts begins before the pairs; what was sent is what the formula says.

    With images ahead, the last collective gathers the next batch's context.
    """
    task, config = trainer.task, trainer.config
    full = config.loss.pair == "spcl" and not config.loss.pair_samples
    if config.task != "prompt" or not full or not (trainer.graph or trainer.ahead.graph).reduce:
        return
    collectives = trainer.recorder.collectives
    classes, vectors = len(task._model.class_set), config.model.prompt_length
    width = task._model.tower.projection.shape[0]
    negative = ("allreduce_", [((1, classes, vectors, width), "torch.float32")])
    assert collectives.index(negative) < collectives.index(("pairs",)), collectives
    learner = sum(parameter.numel() for parameter in task.module.prompt_learner.parameters())
    groups = group_sizes(trainer.engine._optimizer)
    prompts = 2 * classes * vectors * width
    assert prompts < learner
    sizes = {"classes": classes, "batch": config.batch_size, "width": task._model.tower.projection.shape[1]}
    expected = step_payload(
        groups, trainer.world.size, 0, scope="global", reduced=sum(groups) - learner + prompts, **sizes
    )
    expected[ALL_GATHER] -= 4 * (trainer.world.size + config.batch_size * classes)  # labels go before the step
    sent: Counter[str] = Counter()
    for name, *sides in collectives:
        if sides:
            sent[KINDS[name]] += 4 * max(sum(math.prod(shape) for shape, _ in side) for side in sides)
    assert sent == expected, (sent, expected)
    if trainer.ahead is not None:
        name, *sides = collectives[-1]
        assert KINDS[name] == ALL_GATHER
        assert ((config.batch_size // trainer.world.size, sizes["width"]), "torch.float32") in sides[-1], sides


class RecordedTrainer:
    """What takes the place of two methods of the trainer."""

    start, fit = Trainer.__init__, Trainer.fit

    def __init__(self: Any, *arguments: Any) -> None:
        RecordedTrainer.start(self, *arguments)
        self.recorder = CheckedRecorder()
        self.record(refuse if refuses(self) and self.world.rank == 1 else self.recorder)

    def fit_and_compare(self: Any) -> dict[str, Any]:
        found = RecordedTrainer.fit(self)
        refusal = (self.graph or self.ahead.graph).refusal
        if refuses(self):
            assert refusal == "rank 1: not here", refusal
            return found
        assert refusal is None, refusal
        of_ranks = all_gather_object((self.recorder.collectives, self.recorder.replays))
        assert all(one == of_ranks[0] for one in of_ranks), of_ranks
        check_order_and_bytes(self)
        steps = self.step * self.config.optim.accumulate
        # A batch is recorded, too, of which an image cannot be read: only the first few are not.
        least = steps - WARM_UP if self.config.data.on_bad_image == "skip" else 0.5 * steps
        assert self.recorder.replays >= least, self.recorder.replays
        return found


if __name__ == "__main__":
    Trainer.__init__ = RecordedTrainer.__init__  # type: ignore[assignment]
    PromptLoss.pairs = pairs_noted  # type: ignore[method-assign]
    Trainer.fit = RecordedTrainer.fit_and_compare  # type: ignore[method-assign]
    statuses = [main(arguments) for arguments in json.loads(Path(sys.argv[1]).read_text())]
    sys.exit(max(statuses))
