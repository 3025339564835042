"""The image tower of the next batch beside the text side of this one, within one recorded step of phase 2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..models.clip import ImageFeatures
from .cuda_graph import Outcome, Recorder, StepGraph
from .tasks import PromptTask

NEXT = "next "
"""before the names of what a step computes for the next one"""


class ImagesAhead:
    """Replays the step of a batch together with the image features of the one that follows.

    The two share no input, so a GPU runs them at the same time: the tower on a stream of its own, which is joined
    after the backward. A batch whose features are not there yet (the first of an epoch, the one after a step that was
    not replayed) gets them before its replay. Numbers are those of steps without.

    Where ranks share a batch, the next one's context is gathered last: NCCL runs the collectives of a group in the
    order in which they are called, and one that waited for the tower would hold up those of the text side.

    Args:
        task: the objective; its batches bring pixels.
        device: a GPU.
        record, together, reduce: as of `StepGraph`.
    """

    def __init__(
        self,
        task: PromptTask,
        device: torch.device,
        record: Recorder | None = None,
        *,
        together: bool = False,
        reduce: bool = False,
    ) -> None:
        self.module: nn.Module = task.module
        self._task = task
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._known: tuple[Any, dict[str, Tensor]] | None = None
        self.graph = StepGraph(self, device, record, together=together, reduce=reduce)

    def __call__(self, batch: Any, following: Any | None) -> Outcome | None:
        """As `StepGraph` of `batch`; `following` is the batch of the next call, None: not known."""
        if following is None or not self._alike(batch, following):
            following = batch  # something of the recorded shape; its features are not used
        found = self.graph((batch, following))
        self._known = None
        if found is None:
            return None
        loss, parts, gradients = found
        known = {name.removeprefix(NEXT): parts.pop(name) for name in list(parts) if name.startswith(NEXT)}
        if following is not batch:
            self._known = following, known
        return loss, parts, gradients

    def _alike(self, batch: Any, following: Any) -> bool:
        one, other = self._task.pixels(batch), self._task.pixels(following)
        return one is not None and other is not None and one.shape == other.shape

    def tensors(self, batches: tuple[Any, Any]) -> dict[str, Tensor] | None:
        """What the step reads of a batch, features in place of pixels, and the pixels of the next."""
        batch, following = batches
        pixels = self._task.pixels(following)
        if pixels is None:
            return None
        if self._known is not None and self._known[0] is batch:
            known = self._known[1]
        else:
            self.graph.runs_beside()  # the tower, this time outside the recording
            known = self._images(batch, self._task.features(batch))
        tensors = self._task.tensors(self._task.with_features(batch, known))
        return None if tensors is None else {**tensors, NEXT + "pixels": pixels}

    def _images(self, batch: Any, features: ImageFeatures) -> dict[str, Tensor]:
        return {**features._asdict(), **self._task.gathered(batch, features)}

    def outcome(self, batches: tuple[Any, Any], tensors: dict[str, Tensor], *, reduce: bool) -> Outcome:
        """That of the batch, and among its scalars the features of the next."""
        batch, following = batches
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            features = self._task.features(self._task.with_pixels(following, tensors[NEXT + "pixels"]))
        loss, parts, gradients = self._task.outcome(self._task.with_features(batch, tensors), tensors, reduce=reduce)
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        known = self._images(following, features)
        return loss, {**parts, **{NEXT + name: tensor for name, tensor in known.items()}}, gradients


def with_next(batches: Iterable[Any], *, ahead: bool) -> Iterator[tuple[Any, Any | None]]:
    """Batches, each once and in order, with the one that follows; without `ahead`, and for the last, with None."""
    if not ahead:
        yield from ((batch, None) for batch in batches)
        return
    source = iter(batches)
    batch = next(source, None)
    while batch is not None:
        following = next(source, None)
        yield batch, following
        batch = following
