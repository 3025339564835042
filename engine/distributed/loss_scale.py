"""The loss scale of fp16 where DeepSpeed shards the optimizer."""

from __future__ import annotations

from typing import Any


class LossScale:
    """Halved after an overflow, doubled after 2000 steps without: torch's GradScaler, judged once a step by all ranks.

    Under ZeRO 1 and 2 DeepSpeed has a GradScaler a rank, which sees the rank's part of the gradients, once for each
    group of parameters, and which an overflow that all ranks know of never reaches (0.19.8): the scale stays, and every
    step is left out from then on.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] = {
            "scale": 65536.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": 0,
        }

    @property
    def scale(self) -> float:
        return float(self._state["scale"])

    def update(self, overflow: bool) -> None:
        """After a step, or one that was left out for an overflow."""
        state = self._state
        state["_growth_tracker"] = 0 if overflow else state["_growth_tracker"] + 1
        if overflow:
            state["scale"] *= state["backoff_factor"]
        elif state["_growth_tracker"] == state["growth_interval"]:
            state["scale"] *= state["growth_factor"]
            state["_growth_tracker"] = 0

    def state_dict(self) -> dict[str, Any]:
        """Under the keys of torch's GradScaler, which takes it, too."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what this or torch's GradScaler returned."""
        self._state.update(state)
