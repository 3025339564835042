"""Folders that hold all it takes to use a model: architecture, weights, classes, pixels, context bank.

A run folder is one (its weights are those of its best checkpoint), so is each of its checkpoints, and so is what
`export-checkpoint` and `import-checkpoint` write (its weights are in model.safetensors). See `run.py` for the files.
"""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from torch import Tensor, nn

from ..config import BlendName, ModelConfig, check_values
from ..data.manifest import UNPRINTABLE, load_label_names
from ..data.pixels import Pixels
from ..models.blend import make_blend
from ..models.class_set import ClassSet
from ..models.clip import ImageFeatures, build_clip, check_config, clip_config, with_unit_token
from ..models.decoders import DECODERS
from ..models.fusions import FUSIONS
from ..models.hub import local_folder
from ..models.pspg import PsPG, check_head
from ..models.weights import load_strictly
from ..utils.documents import as_schema
from ..utils.errors import UserError
from ..utils.names import base_name
from ..utils.plugins import missing_plugins
from ..utils.text import printable
from .calibration import FILE, REPEAT, Calibration, read_calibration
from .integrity import check_files, sha256_of, verify
from .published import class_encoder
from .run import best_checkpoint, is_step, load_tensors, read_json, run_of, write_json, write_tensors

log = logging.getLogger(__name__)

FORMAT = "pspg-engine/1"
RESIDUAL = "residual.offsets"
LARGEST_WIDTH = 65536
CLASSIFIER_JSON = "open_clip_config.json"
"""The file that a classifier's folder has instead of model.json; see `classifier.py`."""


@dataclass(kw_only=True)
class Description:
    """model.json."""

    format: Literal["pspg-engine/1"]
    kind: Literal["pspg", "clip"]
    clip: dict[str, Any]
    """architecture, in open_clip's format; `models.clip.check_config` knows it"""
    pixels: Pixels
    head: ModelConfig | None = None
    class_names: list[str] | None = None
    training: str | None = None
    plugins: list[str] | None = None
    """modules of the user's that registered what the model is made of"""
    files: dict[str, str] | None = None
    """file name → SHA-256; None: an older version wrote the folder"""


@dataclass(kw_only=True)
class LoadedModel:
    """A model read by `load_model`, with what comes beside its weights."""

    model: PsPG
    pixels: Pixels
    class_names: list[str]
    bank: Tensor | None
    bank_features: ImageFeatures | None
    """global features and tokens of the bank's images; None: the model does not keep them"""
    source: Path
    weights: Path
    training: str | None
    calibration: Calibration | None = None
    """whatever its classes and blend are, but of these weights"""

    def set_classes(self, names: str | list[str] | None) -> None:
        """Score these classes from now on: a list, or a text file, one a line; None: those of now.

        Raises:
            UserError: unreadable file, or names that the text tower cannot take.
        """
        if names is not None:
            self.model.set_classes(load_label_names(names) if isinstance(names, str) else names)

    def blend(
        self, class_set: ClassSet, kind: BlendName, weight: float | None = None, autocast: torch.dtype | None = None
    ) -> Tensor | None:
        """What `blended` adds to the log-odds of these classes, (C,D), where the model is; None: nothing.

        Args:
            class_set: classes to score.
            kind, weight: see `models/blend.py`.
            autocast: low precision that the model is scored in.

        Raises:
            UserError: the model keeps no features of its bank's images.
        """
        device = self.model.logit_scale.device
        bank = None if self.bank_features is None else ImageFeatures(*(t.to(device) for t in self.bank_features))
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            return make_blend(self.model, class_set, bank, kind, weight, source=self.source)


def describe(
    kind: Literal["pspg", "clip"],
    clip: nn.Module,
    pixels: Pixels,
    *,
    head: ModelConfig | None = None,
    class_names: list[str] | None = None,
    training: str | None = None,
) -> dict[str, Any]:
    """Contents of model.json; `training` says what the weights were trained on."""
    architecture = clip_config(clip)
    return {
        "format": FORMAT,
        "kind": kind,
        "clip": architecture,
        "head": None if head is None else without_places(asdict(head)),
        "class_names": class_names,
        "training": training,
        "plugins": plugins_of(clip, head),
        "pixels": asdict(pixels),
        "tokenizer": {
            "name": "CLIP byte-pair encoding",
            "context_length": architecture["text_cfg"]["context_length"],
        },
        "versions": {name: version(name) for name in ("torch", "open_clip_torch")},
    }


def write_model(folder: Path, description: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
    """Write the files of a model folder; model.json comes last, so a folder without it is not one."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.safetensors" for name in tensors]
    for file, values in zip(files, tensors.values(), strict=True):
        write_tensors(file, values)
    write_json(folder / "model.json", {**description, "files": {file.name: sha256_of(file) for file in files}})


def is_classifier(folder: Path) -> bool:
    """True if the folder was written by `export-checkpoint --layout classifier`."""
    return (folder / CLASSIFIER_JSON).is_file() and not (folder / "model.json").is_file()


def read_description(folder: Path) -> dict[str, Any]:
    """model.json of a folder.

    Raises:
        UserError: not a model folder, or of a format this version does not know.
    """
    if is_classifier(folder):
        raise UserError(
            f"{folder}: holds a frozen classifier, which evaluate and predict read; give the run or model folder"
        )
    folder = run_of(folder)
    if not (folder / "model.json").is_file():
        raise UserError(f"{folder}: not a run or model folder (it has no model.json)")
    file = folder / "model.json"
    description = read_json(file)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise UserError(f"{file}: not of the format {FORMAT}")
    try:
        if isinstance(description.get("head"), dict):  # first, since its choices have messages of their own
            check_values(ModelConfig(**description["head"]), "model.")
        found = as_schema(Description, description)
        check_config(found.clip, str(file))
        require_true(found.pixels.size == found.clip["vision_cfg"]["image_size"])
        if found.kind == "pspg":
            head = ModelConfig(**description["head"])
            check_values(head, "model.")
            check_head(head)
            require_true(head.hidden_size <= LARGEST_WIDTH, head.prompt_length <= LARGEST_WIDTH)
            check_names(found.class_names or [])
    except UserError as error:
        raise UserError(f"{file}: {error}{advice(description)}") from None
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "keys are missing or unknown"
        raise UserError(f"{file}: is damaged ({reason}); export or train the model again") from None
    return description


def plugins_of(clip: nn.Module, head: ModelConfig | None) -> list[str]:
    """Modules outside this package that registered the parts of a model."""
    parts: list[type] = [type(getattr(clip, "visual", clip))]
    if head is not None:
        parts += [DECODERS[head.decoder], FUSIONS[head.fusion]]
    own = __name__.removesuffix("checkpoints.model_folder")
    return sorted({cls.__module__ for cls in parts if not cls.__module__.startswith((own, "open_clip."))})


def advice(description: dict[str, Any]) -> str:
    """Which modules to import before, to follow a message; empty: none is missing."""
    names = description.get("plugins")
    missing = missing_plugins([name for name in names if isinstance(name, str)]) if isinstance(names, list) else []
    if not missing:
        return ""
    listed = ", ".join(printable(name) for name in missing[:5])
    return f"; the model was made with modules that are not loaded: give --plugins {listed}, or import them before"


def check_names(names: list[str]) -> None:
    """Refuse class names that no class list can hold.

    Raises:
        ValueError: none, an empty or doubled one, or one with a control character.
    """
    if not names or len(set(names)) < len(names) or any(not n.strip() or UNPRINTABLE.search(n) for n in names):
        raise ValueError("class_names must be different texts without control characters")


def training_data(description: dict[str, Any]) -> str | None:
    """What the weights were trained on; older versions wrote the whole path of the data."""
    text = description.get("training")
    return None if text is None else re.sub(r"\((?:[^()]*/)+([^()/]+)\)$", r"(\1)", text)


def without_places(head: dict[str, Any]) -> dict[str, Any]:
    """Settings of the prompt head without folders of the machine that it was trained on: base names alone."""
    keys = ("backbone", "pretrained", "pretrained_head")
    return {key: base_name(value) if key in keys and value else value for key, value in head.items()}


def require_true(*conditions: bool) -> None:
    """Stop reading a file whose values contradict one another.

    Raises:
        ValueError: a condition does not hold. The reader tells which file.
    """
    if not all(conditions):
        raise ValueError("values contradict one another")


def weights_of(folder: Path) -> Path:
    """File of the weights to use: of a run's best checkpoint its average, else its model; else model.safetensors.

    Of one of a run's checkpoints, `<run>/checkpoints/step-N`, those of that checkpoint.

    Raises:
        UserError: a run that has not saved anything yet.
    """
    if is_step(folder):
        verify(folder)
        best: Path | None = folder
    else:
        best = best_checkpoint(folder)
    if best is None and (folder / "model.safetensors").is_file():
        _check(folder, "model.safetensors")
        return folder / "model.safetensors"
    if best is None:
        raise UserError(f"{folder}: the run has no checkpoint yet")
    average = best / "ema.safetensors"
    return average if average.is_file() else best / "model.safetensors"


def _check(folder: Path, *names: str) -> None:
    """Verify the checksums of a model folder's own files, or of some of them; see `check_files`."""
    files = read_description(folder).get("files") or {}
    check_files(run_of(folder), {name: digest for name, digest in files.items() if not names or name in names})


def load_clip_folder(folder: Path) -> tuple[open_clip.CLIP, Pixels]:
    """CLIP of a folder of either kind, with its trained weights.

    Raises:
        UserError: missing, damaged or mismatching files.
    """
    description = read_description(folder)
    _check(folder)
    clip = build_clip(description["clip"])
    if description["kind"] == "clip":
        file = weights_of(folder)
        tensors = {name.removeprefix("clip."): tensor for name, tensor in load_tensors(file).items()}
    else:
        file = run_of(folder) / "clip.safetensors"
        tensors = load_tensors(file)
    load_strictly(clip, tensors, file)
    return clip, Pixels(**description["pixels"])


def load_model(folder: str | Path) -> LoadedModel:
    """PsPG of a run or model folder, on the CPU, in eval mode.

    Raises:
        UserError: missing, damaged or mismatching files, or a folder of phase 1.
    """
    folder = local_folder(folder, "checkpoint")
    description = read_description(folder)
    if description["kind"] != "pspg":
        raise UserError(f"{folder}: holds a CLIP of phase 1; give the folder of a phase-2 run")
    clip, pixels = load_clip_folder(folder)
    names = description["class_names"]
    # Imported with the class features of another CLIP, whose text tower lies beside.
    base = run_of(folder)
    other = base / "class_text.safetensors"
    encoder = class_encoder(load_tensors(other), torch.float32, clip) if other.is_file() else None
    model = PsPG(clip, ModelConfig(**description["head"]), names, class_encoder=encoder)
    weights = load_head(model, folder)
    bank = base / "bank.safetensors"
    context = load_bank(bank, model) if bank.is_file() else None
    return LoadedModel(
        model=model.eval(),
        pixels=pixels,
        class_names=names,
        bank=context,
        bank_features=None if context is None else bank_features(bank, context),
        source=folder,
        weights=weights,
        training=training_data(description),
        calibration=calibration_of(base, weights),
    )


def calibration_of(folder: Path, weights: Path) -> Calibration | None:
    """Calibration of a folder's weights; None if there is none, or one of other weights, which is said.

    Raises:
        UserError: damaged.
    """
    found = read_calibration(folder)
    if found is not None and found.weights != sha256_of(weights):
        log.info(f"{folder / FILE}: is of other weights than {weights}, so it is not used; {REPEAT}")
        return None
    return found


def load_head(model: PsPG, folder: Path, *, other_classes: bool = False) -> Path:
    """Load the trained prompt head of a folder into a model, and return its file.

    Args:
        model: of the same architecture.
        folder: run or model folder.
        other_classes: it may have been trained on other classes, or without a residual; the model then keeps its own.

    Raises:
        UserError: missing, damaged or mismatching files, or a folder of phase 1.
    """
    description = read_description(folder)
    if description["kind"] != "pspg":
        raise UserError(f"{folder}: holds a CLIP of phase 1, which has no prompt head")
    weights = weights_of(folder)
    tensors = load_tensors(weights)
    same = description["class_names"] == model.training_names and RESIDUAL in tensors
    if other_classes and not same:
        tensors = {name: tensor for name, tensor in tensors.items() if name != RESIDUAL}
        tensors |= {name: tensor for name, tensor in model.head.state_dict().items() if name == RESIDUAL}
    load_strictly(model.head, tensors, weights)
    return weights


def load_bank(file: Path, model: PsPG) -> Tensor:
    """Context bank (M,D) of a folder.

    Raises:
        UserError: unreadable, or it does not belong to this model.
    """
    bank = load_tensors(file).get("bank")
    if bank is None or bank.ndim != 2 or bank.shape[1] != model.tower.projection.shape[1]:
        raise UserError(f"{file}: is not the context bank of this model")
    return bank


def bank_tensors(features: ImageFeatures) -> dict[str, Tensor]:
    """Contents of bank.safetensors: the context bank, and its images' tokens, rounded to bfloat16."""
    return {"bank": features.global_.cpu(), "tokens": features.tokens.to("cpu", torch.bfloat16)}


def bank_features(file: Path, bank: Tensor) -> ImageFeatures | None:
    """Features of the images of a context bank (M,D); None where the file has no tokens.

    Raises:
        UserError: unreadable, or tokens of another bank.
    """
    tokens = load_tensors(file).get("tokens")
    if tokens is None:
        return None
    if tokens.ndim != 3 or tokens.shape[::2] != bank.shape:
        raise UserError(f"{file}: its tokens are not those of its bank; train again")
    return with_unit_token(bank, tokens[:, 1:].to(bank.dtype))
