"""Any model, through a Python file of the user's with three functions.

    load(device: torch.device) -> model
        Whatever `score` needs, on the device. Called once.
    preprocess(image: PIL.Image.Image) -> torch.Tensor
        The model's input of one image, all of one shape. The image is 8-bit RGB of the radiograph's own size, read as
        everywhere in the engine: reduced to grey, DICOM and 16-bit files windowed. Called in the loader's processes,
        where `load` is not called.
    score(model, images: torch.Tensor, class_names: list[str]) -> tensor or array
        Probabilities (B,C) in [0, 1] of the stacked inputs (B,…), which are on the device. Called without gradients,
        batch by batch, for one class list at a time.

The file is executed, so it must come from somebody you trust; it can import what lies beside it. An error in it
becomes one line that names the line of the file.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...data.batch import Batch
from ...data.dataset import ImageDataset
from ...data.images import read_image
from ...data.manifest import Manifest
from ...data.pixels import Pixels, Reading
from ...data.sampler import Key
from ...utils.errors import UserError
from ..config import EvaluateConfig
from ..scoring import Scores
from . import SOURCES
from ._base import ImageMethod, Method, Source

FUNCTIONS = {"load": "load(device)", "preprocess": "preprocess(image)", "score": "score(model, images, class_names)"}


class Adapter:
    """The functions of an adapter file. A copy in another process imports the file there.

    Raises:
        UserError: no such file, an error in it, or a function is missing.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = str(Path(path).resolve())
        if not Path(path).is_file() or Path(path).suffix != ".py":
            raise UserError(f"adapter: {path}: no such Python file (.py)")
        self._module = self._import()
        for name, signature in FUNCTIONS.items():
            if not callable(getattr(self._module, name, None)):
                raise UserError(f"adapter: {path}: has no function {signature}")

    def __reduce__(self) -> tuple[type[Adapter], tuple[str]]:
        return type(self), (self.path,)

    def call(self, name: str, *arguments: Any) -> Any:
        """Result of one of its functions.

        Raises:
            UserError: whatever it raised.
        """
        function = getattr(self._module, name)
        try:
            return function(*arguments)
        except (Exception, SystemExit) as error:
            code = getattr(function, "__code__", None)
            raise self._located(error, f" in {name}", None if code is None else code.co_firstlineno) from error

    def refuse(self, name: str, message: str) -> UserError:
        """The error that a result of one of its functions is."""
        return UserError(f"adapter: {self.path}: {name} {message}")

    def _import(self) -> ModuleType:
        name = f"pspg_adapter_{Path(self.path).stem}"
        spec = importlib.util.spec_from_file_location(name, self._file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        folder = str(Path(self._file).parent)
        if folder not in sys.path:
            sys.path.append(folder)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            line = error.lineno if isinstance(error, SyntaxError) and error.filename == self._file else None
            raise self._located(error, "", line) from error
        return module

    def _located(self, error: BaseException, where: str, line: int | None) -> UserError:
        """One line: the innermost line of the file that the error passed, else `line`."""
        frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self._file]
        line = frames[-1] if frames else line
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return UserError(f"adapter: {self.path}{'' if line is None else f':{line}'}: {reason}{where}")


class AdapterImages(ImageDataset):
    """Images as an adapter's `preprocess` makes them; they are a batch's `pixels`, float (B,…)."""

    def __init__(
        self, adapter: Adapter, config: EvaluateConfig, manifest: Manifest, labels: NDArray[np.float32]
    ) -> None:
        super().__init__(
            manifest.samples,
            Pixels(size=0, resize="stretch", mean=0.0, std=1.0),
            Reading(on_bad_image=config.on_bad_image, max_megapixels=config.max_megapixels, bit_depth=config.bit_depth),
            labels=labels,
        )
        self.adapter = adapter

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """The batch of `keys`, less the unreadable images.

        Raises:
            UserError: an unreadable image, if `on_bad_image` is error; an error in `preprocess`, or inputs of different
                shapes.
        """
        rows, inputs, bad = self.readable(keys, self.pixels)
        shapes = sorted({tuple(value.shape) for value in inputs})
        if len(shapes) > 1:
            raise self.adapter.refuse("preprocess", f"gave inputs of shapes {shapes[0]} and {shapes[1]}; make them one")
        return self.batch(rows, torch.stack(inputs) if inputs else torch.empty(0), bad)

    def pixels(self, epoch: int, row: int) -> Tensor:
        """The input of one image."""
        image = read_image(self.paths[row], **self.reading.limits).convert("RGB")
        value = self.adapter.call("preprocess", image)
        if not isinstance(value, Tensor):
            raise self.adapter.refuse("preprocess", f"gave a {type(value).__name__}, not a torch.Tensor")
        return value.detach()


class Adapted(ImageMethod):
    """A model behind an adapter; it has no features, and no baselines."""

    context = "unknown"

    def __init__(self, config: EvaluateConfig, device: torch.device) -> None:
        assert config.adapter is not None
        self.name = config.method or Path(config.adapter).stem
        self.about = f"was run through an adapter, {Path(config.adapter).name}."
        self.settings = {"adapter": config.adapter}
        self._adapter, self._device = Adapter(config.adapter), device
        self._model = self._adapter.call("load", device)

    def dataset(self, config: EvaluateConfig, manifest: Manifest, labels: NDArray[np.float32]) -> ImageDataset:
        return AdapterImages(self._adapter, config, manifest, labels)

    def score(self, class_lists: Sequence[list[str]], batches: Iterable[Batch]) -> Iterable[Scores]:
        for batch in batches:
            images = batch.pixels.to(self._device, non_blocking=True)
            with torch.inference_mode():
                found = [self._probabilities(images, names) for names in class_lists]
            labels = None if batch.labels is None else batch.labels.double().cpu().numpy()
            features = np.empty((len(batch), 0), dtype=np.float32)
            yield Scores(batch.ids, np.concatenate(found, axis=1), labels, features)

    def _probabilities(self, images: Tensor, names: list[str]) -> NDArray[np.float64]:
        """Checked probabilities (B,C)."""
        found, refuse = self._adapter.call("score", self._model, images, list(names)), self._adapter.refuse
        try:
            array = (
                found.detach().double().cpu().numpy() if isinstance(found, Tensor) else np.asarray(found, np.float64)
            )
        except (TypeError, ValueError):
            raise refuse("score", f"gave a {type(found).__name__}, not a tensor or array of numbers") from None
        if array.shape != (len(images), len(names)):
            raise refuse("score", f"gave shape {array.shape} for {len(images)} images and {len(names)} classes")
        if not np.isfinite(array).all():
            raise refuse("score", "gave values that are not finite")
        if array.min() < 0 or array.max() > 1:
            raise refuse("score", f"gave values from {array.min():g} to {array.max():g}; probabilities lie in [0, 1]")
        return array


@SOURCES.register
class AdapterFile(Source):
    """A Python file with the functions load, preprocess and score."""

    name = "adapter"

    @classmethod
    def open(cls, config: EvaluateConfig, device: torch.device, autocast: torch.dtype | None) -> Method:
        return Adapted(config, device)
