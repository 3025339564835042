"""The image tower of the next batch beside the text side of this one, within one recorded step of phase 2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.clip import ImageFeatures
from ..models.features import FeatureBatch
from .cuda_graph import Outcome, Recorder, StepGraph
from .tasks import PromptTask

NEXT = "next "
"""before the names of what a step computes for the next one"""


class ImagesAhead:
    """Replays the step of a batch together with the image features of the one that follows.

    The two share no input, so a GPU runs them at the same time: the tower on a stream of its own, which is joined
    after the backward. A batch whose features are not there yet (the first of an epoch, the one after a step that was
    not replayed) gets them before its replay. Numbers are those of steps without.

    Args:
        task: the objective; its batches bring pixels.
        device: a GPU.
        record: as of `StepGraph`.
    """

    def __init__(self, task: PromptTask, device: torch.device, record: Recorder | None = None) -> None:
        self.module: nn.Module = task.module
        self._task = task
        self.streams: tuple[torch.cuda.Stream, ...] = (torch.cuda.Stream(device),) if device.type == "cuda" else ()
        self._known: tuple[Any, ImageFeatures] | None = None
        self.graph = StepGraph(self, device, record)

    def __call__(self, batch: Any, following: Any | None) -> Outcome | None:
        """As `StepGraph` of `batch`; `following` is the batch of the next call, None: not known."""
        if following is None or following.pixels.shape != batch.pixels.shape:
            following = batch  # something of the recorded shape; its features are not used
        found = self.graph((batch, following))
        self._known = None
        if found is None:
            return None
        loss, parts, gradients = found
        features = ImageFeatures(*(parts.pop(NEXT + name) for name in ImageFeatures._fields))
        if following is not batch:
            self._known = following, features
        return loss, parts, gradients

    def tensors(self, batches: tuple[Any, Any]) -> dict[str, Tensor] | None:
        """What the step reads of a batch, features in place of pixels, and the pixels of the next."""
        batch, following = batches
        known = self._known is not None and self._known[0] is batch
        features = self._known[1] if self._known is not None and known else self._task.features(batch)
        tensors = self._task.tensors(FeatureBatch(batch.ids, features, batch.labels, batch.index))
        return None if tensors is None else {**tensors, NEXT + "pixels": following.pixels}

    def step(self, batches: tuple[Any, Any], tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and scalars of the batch, and the features of the next."""
        batch, following = batches
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.streams[0] if self.streams else None):
            features = self._task.features(replace(following, pixels=tensors[NEXT + "pixels"]))
        given = ImageFeatures(*(tensors[name] for name in ImageFeatures._fields))
        loss, parts = self._task.step(FeatureBatch(batch.ids, given, batch.labels, batch.index), tensors)
        return loss, {**parts, **{NEXT + name: tensor for name, tensor in features._asdict().items()}}


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
