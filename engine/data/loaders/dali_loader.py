"""Batches decoded, resized and augmented by NVIDIA DALI, on the GPU where there is one; the one file that imports DALI.

The same samples, order, augmentation and errors as the torch loader: the pipeline draws nothing at random, it is given
each image's `augment.Plan`. So it has no state, an epoch starts at any batch, and a pipeline that fails is replaced by
another. Pixels differ from the torch loader's by the rounding of resizing and, on a GPU, of JPEG decoding.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from nvidia.dali import Pipeline, fn, math
from nvidia.dali.plugin.pytorch import feed_ndarray
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
from torch import Tensor

from ...utils.errors import UserError
from ..batch import Batch
from ..dataset import ImageDataset
from ..sampler import Keys
from .dali_input import DaliInput, Prepared
from .prefetch import prefetch
from .torch_loader import TorchBatches, data_loader, results

log = logging.getLogger(__name__)

AHEAD = 2
"""finished batches that wait for the training step"""


def dali_batches(dataset: ImageDataset, keys: Keys, workers: int, *, device: torch.device) -> Iterable[Batch]:
    """Batches with pixels on `device`; torch's where pixels come from the cache as they are."""
    if dataset.cache is not None and dataset.augmentation is None:
        return TorchBatches(dataset, keys, workers)
    return DaliBatches(dataset, keys, workers, device=device)


class DaliBatches:
    """Batches with pixels on `device`.

    Loader processes read, check and, where a file is not plain, decode; a thread of this process drives the pipeline.

    Args:
        dataset: the samples.
        keys: the batches of an epoch.
        workers: loader processes, kept for all epochs, and threads of DALI's decoders; 0: load in this process.
        device: a GPU, or the CPU.
    """

    def __init__(self, dataset: ImageDataset, keys: Keys, workers: int, *, device: torch.device) -> None:
        self.device, source = device, DaliInput(dataset)
        self.runner = _Runner(source, device, max(1, workers))
        self.loader = data_loader(source, keys, workers, pin=False, fork=False)

    def __iter__(self) -> Iterator[Batch]:
        for batch, event in prefetch(self._batches(), AHEAD):
            if event is not None:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(event)
                batch.pixels.record_stream(stream)
            yield batch

    def _batches(self) -> Generator[tuple[Batch, torch.cuda.Event | None]]:
        """Batches, and on a GPU the event that their pixels are ready with."""
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        try:
            with torch.cuda.stream(stream):
                for prepared in results(self.loader, self.runner.source.dataset.reading.timeout_s):
                    yield self.runner(prepared), None if stream is None else stream.record_event()
        finally:
            self.runner.pipeline = None


class _Runner:
    """Runs prepared batches through a pipeline, which it makes when it needs one."""

    def __init__(self, source: DaliInput, device: torch.device, threads: int) -> None:
        self.source, self.device, self.threads = source, device, threads
        self.pipeline: Pipeline | None = None
        self.told = False

    def __call__(self, prepared: Prepared) -> Batch:
        """The batch with its pixels, uint8 (B,h,w).

        Raises:
            UserError: an image that could not be decoded, if `on_bad_image` is error.
        """
        found = self.pixels(prepared)
        if isinstance(found, str):
            return self.one_by_one(prepared, found)
        # The other tensors stay on the CPU, as the torch loader's do: page-locked, so that moving them does not wait.
        batch = prepared.batch.pin_memory() if self.device.type == "cuda" else prepared.batch
        return replace(batch, pixels=found)

    def one_by_one(self, prepared: Prepared, reason: str) -> Batch:
        """A batch that DALI failed on: image by image, and by Pillow where it fails again.

        Raises:
            UserError: Pillow cannot decode an image either, if `on_bad_image` is error; or it decodes them all.
            RuntimeError: with `reason`, where no image is to blame.
        """
        data = self.source.dataset
        rows: list[int] = []
        pixels: list[Tensor] = []
        bad, failed, rescued = list(prepared.batch.bad), 0, 0
        for key in prepared.keys:
            single = self.source.prepare([key], decode=False)
            found = self.pixels(single)
            if isinstance(found, str):
                single = self.source.prepare([key], decode=True)
                found = self.pixels(single)
                if isinstance(found, str):
                    raise RuntimeError(found)
                failed += 1
                rescued += len(single.keys)
                if single.keys and not self.told:
                    self.told = True
                    log.warning(
                        "%s: DALI cannot decode this file, Pillow can; no other will be reported", data.paths[key[1]]
                    )
            rows += [row for _, row in single.keys]
            pixels.append(found)
            bad += single.batch.bad
        if not failed:
            raise RuntimeError(reason)
        if rescued == len(prepared.keys) > 1:
            raise UserError(f"loader: DALI decodes none of {rescued} files that Pillow decodes; set it to torch")
        return data.batch(rows, torch.cat(pixels), bad)

    def pixels(self, prepared: Prepared) -> Tensor | str:
        """uint8 (B,h,w) on the device, or why DALI failed."""
        count, side = len(prepared.keys), self.source.dataset.rule.size
        if not count:
            return prepared.batch.pixels.to(self.device)
        if self.pipeline is None or self.pipeline.max_batch_size < count:
            self.pipeline = self.make_pipeline(count, prepared)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            (output,) = self.pipeline.run(stream, **prepared.inputs())
        except RuntimeError as error:
            self.pipeline = None  # it is of no more use
            return str(error)
        pixels = torch.empty(count, side, side, 1, dtype=torch.uint8, device=self.device)
        return feed_ndarray(output.as_tensor(), pixels, cuda_stream=stream).squeeze(-1)

    def make_pipeline(self, batch_size: int, prepared: Prepared) -> Pipeline:
        """A pipeline for batches like `prepared`, of up to `batch_size` images.

        Raises:
            UserError: DALI does not run on this machine.
        """
        cuda = self.device.type == "cuda"
        gpu = (torch.cuda.current_device() if self.device.index is None else self.device.index) if cuda else None
        # Waited for batch by batch, by a thread that is ahead of the training step: so a failure is its batch's.
        pipeline = Pipeline(batch_size, self.threads, gpu, prefetch_queue_depth=1)
        with pipeline:
            layouts = {"pixels": "HWC"}
            inputs = {name: fn.external_source(name=name, layout=layouts.get(name)) for name in prepared.inputs()}
            pipeline.set_outputs(graph(inputs, self.source.dataset.rule.size, cuda))
        try:
            pipeline.build()
        except RuntimeError as error:
            reason = next((line for line in str(error).splitlines() if "rror" not in line and line.strip()), error)
            raise UserError(f"loader: DALI does not run here ({reason}); use torch") from error
        return pipeline


Node = Any
"""batch of one input or operator; DALI's own annotations are of many types"""


def graph(inputs: dict[str, Node], side: int, cuda: bool) -> Node:
    """Pixels, uint8 (side,side,1) an image, of the `Prepared.inputs`."""
    if "files" in inputs:
        image = fn.decoders.image(
            inputs["files"],
            device="mixed" if cuda else "cpu",
            output_type=DALIImageType.GRAY,
            adjust_orientation=False,
            # All that the JPEG engine can take goes there: an image's pixels must not depend on the rest of its batch.
            hw_decoder_load=1.0,
        )
        image = _square(image, side, inputs.get("shape"), inputs.get("corner"))
    else:
        image = inputs["pixels"].gpu() if cuda else inputs["pixels"]
    if "warp0" in inputs:
        image = _warp(image, inputs["warp0"])
        image = _crop(image, side, inputs["start0"], inputs["end0"])
        for place in "01":
            factor, mean = (inputs[f"{name}{place}"] for name in ("factor", "mean"))
            image = _blend(image, side, *((factor.gpu(), mean.gpu()) if cuda else (factor, mean)))
        image = _crop(image, side, inputs["start1"], inputs["end1"])
        image = _warp(image, inputs["warp1"])
    return fn.flip(image, horizontal=inputs["flip"]) if "flip" in inputs else image


def _square(image: Node, side: int, shape: Node | None, corner: Node | None) -> Node:
    """`images.resize`: stretched, or resized to `shape` on a black square that starts at `corner` of the result."""
    if shape is None:
        return fn.resize(image, size=[side, side], interp_type=DALIInterpType.INTERP_CUBIC, antialias=True)
    small: Node = fn.resize(image, size=shape, interp_type=DALIInterpType.INTERP_CUBIC, antialias=True)
    return fn.slice(small, start=corner, shape=[side, side], axes=[0, 1], out_of_bounds_policy="pad", fill_values=0)


def _warp(image: Node, matrix: Node) -> Node:
    """`augment.Warp`."""
    return fn.warp_affine(image, matrix=matrix, interp_type=DALIInterpType.INTERP_NN, fill_value=0)


def _crop(image: Node, side: int, start: Node, end: Node) -> Node:
    """`augment.Crop`."""
    linear = DALIInterpType.INTERP_LINEAR
    return fn.resize(image, size=[side, side], roi_start=start, roi_end=end, interp_type=linear, antialias=False)


def _blend(image: Node, side: int, factor: Node, with_mean: Node) -> Node:
    """Half of `augment.Jitter`: scale the distance from black or, where `with_mean` is 1, from the rounded mean.

    Pillow, too, truncates.
    """
    count = side * side
    mean = (fn.reductions.sum(image) * 2 + count) // (2 * count)
    base = fn.cast(mean, dtype=DALIDataType.FLOAT) * with_mean
    blended = base + factor * (fn.cast(image, dtype=DALIDataType.FLOAT) - base)
    return fn.cast(math.floor(math.clamp(blended, 0.0, 255.0)), dtype=DALIDataType.UINT8)
