"""Run commands as `train.py` does, with every step recorded by hand: what a CUDA graph cannot hold fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from pspg.engine.cli import main
from pspg.engine.distributed.collectives import all_gather_object
from pspg.engine.training.trainer import Trainer
from tests.engine.recorder import CheckedRecorder


def refuses(trainer: Trainer) -> bool:
    """One rank of this run cannot record."""
    return trainer.run.name.startswith("refused")


def refuse(function: Any) -> Any:
    function()  # a true recording sends nothing, but this one of the others does
    raise RuntimeError("not here")


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
        assert self.recorder.replays >= 0.5 * self.step * self.config.optim.accumulate, self.recorder.replays
        return found


if __name__ == "__main__":
    Trainer.__init__ = RecordedTrainer.__init__  # type: ignore[assignment]
    Trainer.fit = RecordedTrainer.fit_and_compare  # type: ignore[method-assign]
    statuses = [main(arguments) for arguments in json.loads(Path(sys.argv[1]).read_text())]
    sys.exit(max(statuses))
