"""A fixed class list frozen into a classifier: image tower, fusion and two text features a class, no prompts to write.

    <folder>/open_clip_config.json         open_clip's model and preprocessing configuration, classes, pixels, versions
    <folder>/open_clip_model.safetensors   both towers, in open_clip's layout
    <folder>/classifier.safetensors        text features, fusion, temperature
    <folder>/calibration.json              optional: calibration and operating points, see `calibration.py`

open_clip loads strictly, so the classifier lies beside the towers: `open_clip.create_model("local-dir:<folder>")`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from torch import Tensor, nn

from ..config import BlendName
from ..data.any_image import AnyImage
from ..data.labels import select_classes
from ..data.pixels import Pixels
from ..models.blend import blended, weight_of
from ..models.clip import ImageFeatures, build_clip, check_config, clip_config
from ..models.frozen_image import FrozenImageTower
from ..models.fusions import FUSIONS, Fusion
from ..models.hub import local_folder
from ..models.pspg import probabilities
from ..models.weights import check_fit, load_strictly
from ..utils.documents import as_schema
from ..utils.errors import UserError
from ..utils.files import new_folder, write_text
from .calibration import FILE as CALIBRATION
from .calibration import REPEAT, Calibration, write_calibration
from .card import export_card
from .integrity import check_files, sha256_of
from .model_folder import CLASSIFIER_JSON, LoadedModel, advice, calibration_of, check_names, plugins_of, require_true
from .run import load_tensors, read_json, write_json, write_tensors

log = logging.getLogger(__name__)

FORMAT = "pspg-classifier/1"
TOWERS, CLASSIFIER = "open_clip_model.safetensors", "classifier.safetensors"


@dataclass(kw_only=True)
class Description:
    """open_clip_config.json, as far as a classifier reads it."""

    format: Literal["pspg-classifier/1"]
    class_names: list[str]
    pixels: Pixels
    fusion: str
    model_cfg: dict[str, Any]
    training: str | None = None
    """what the model was trained on"""
    blend: str | None = None
    files: dict[str, str] | None = None
    """file name → SHA-256; None: an older version wrote the folder"""


class Classifier(nn.Module):
    """Images in, probabilities out, for inference. The text tower has run already, under a context bank.

    An image's probabilities depend on that image alone. Nothing but an image can require a gradient, so that the module
    needs no `torch.no_grad`, and `torch.export` takes it as it is.

    Args:
        tower: image tower.
        fusion: of its tokens, copied.
        logit_scale: scalar, log of the inverse temperature.
        text_features: (2,C,D), unit norm, positive first; negative ones are zero where there are positive prompts only.
        class_names: C names.
        pixels: what `read` makes of a file.
        blend_features: (C,D), as `models.blend.blended` takes it; None: nothing is blended.
        calibration: of these classes; None: the probabilities are the model's own.
    """

    text_features: Tensor
    logit_scale: Tensor
    blend_features: Tensor | None
    lines: Tensor | None
    """(2,C) slopes and intercepts of the calibration"""

    def __init__(
        self,
        tower: FrozenImageTower,
        fusion: Fusion,
        logit_scale: Tensor,
        text_features: Tensor,
        *,
        class_names: Sequence[str],
        pixels: Pixels,
        blend_features: Tensor | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__()
        self.tower, self.channel_attention = tower, deepcopy(fusion)
        self.register_buffer("logit_scale", logit_scale.detach().clone())
        self.register_buffer("text_features", text_features.detach().clone())
        self.register_buffer("blend_features", None if blend_features is None else blend_features.detach().clone())
        self.class_names, self.pixels = list(class_names), pixels
        self.calibrate(calibration)
        self.requires_grad_(False).eval()

    def calibrate(self, calibration: Calibration | None) -> None:
        """Give probabilities under this calibration of all its classes from now on; None: the model's own."""
        self.calibration = None if calibration is None else calibration.of(self.class_names)
        lines = None if self.calibration is None else self.calibration.lines().to(self.logit_scale.device)
        self.register_buffer("lines", lines, persistent=False)

    def set_classes(self, names: str | Sequence[str]) -> None:
        """Keep these of the frozen classes, in this order; their probabilities stay as they are.

        Args:
            names: a list, or the path of a text file, one a line.

        Raises:
            UserError: a class that was not frozen, or one twice.
        """
        try:
            self.class_names, rows = select_classes(self.class_names, names, key="class_names")
        except UserError as error:
            raise UserError(f"{error} (the classes are frozen; for others export the model again)") from None
        self.text_features = self.text_features[:, rows]
        if self.blend_features is not None:
            self.blend_features = self.blend_features[rows]
        self.calibrate(self.calibration)

    def read(self, image: AnyImage, *, bit_depth: int | None = None) -> Tensor:
        """A PNG, JPEG or DICOM file, a PIL image, an array or a tensor as the tower's input; see `Pixels.read`.

        Returns:
            float32 (3,h,w), on the CPU.

        Raises:
            UserError: it cannot be read.
        """
        return self.pixels.read(image, bit_depth=bit_depth)

    def image_features(self, images: Tensor) -> ImageFeatures:
        """Features of images (B,3,h,w)."""
        return self.tower(images)

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities (B,C), float32 or better, columns as `class_names`, of images (B,3,h,w)."""
        return self.score(self.image_features(images).tokens)

    def score(self, tokens: Tensor) -> Tensor:
        """The same of the tokens (B,S,D) of `image_features`."""
        logits, _ = self.channel_attention.class_logits(self.logit_scale, tokens, *self.text_features)
        return probabilities(blended(logits, tokens, self.blend_features), self.lines)


@torch.no_grad()
def freeze_classifier(
    loaded: LoadedModel,
    dtype: torch.dtype | None = None,
    *,
    blend: BlendName = "none",
    blend_weight: float | None = None,
) -> Classifier:
    """The model's present classes under its context bank, where the model is.

    Args:
        loaded: with a bank.
        dtype: low precision of the towers; None: that of their weights.
        blend, blend_weight: templates to blend in, see `models/blend.py`.

    Raises:
        UserError: there is no bank, or none that can be blended with.
    """
    model = loaded.model
    if loaded.bank is None:
        raise UserError(f"{loaded.source}: holds no context bank; only models trained by this engine have one")
    tower = model.tower if dtype is None else model.tower.to(dtype)
    bank = loaded.bank.to(model.logit_scale.device)
    with torch.autocast(bank.device.type, dtype, enabled=dtype is not None):
        text = model.head.text_features(bank, model.class_set, tower)
    added = loaded.blend(model.class_set, blend, blend_weight, dtype)
    calibration = loaded.calibration
    if calibration is not None and (
        misfit := calibration.misfit(model.class_set.names, blend, weight_of(blend, blend_weight))
    ):
        log.info(f"{loaded.source / CALIBRATION}: {misfit}, so it is not used; probabilities are not calibrated")
        calibration = None
    return Classifier(
        FrozenImageTower(model.clip, dtype),
        model.channel_attention,
        model.logit_scale,
        torch.stack([text.positive, text.negative]),
        class_names=model.class_set.names,
        pixels=loaded.pixels,
        blend_features=added,
        calibration=calibration,
    )


def write_classifier(
    folder: str | Path, loaded: LoadedModel, *, blend: BlendName = "novelty", blend_weight: float | None = None
) -> None:
    """Freeze the model's present classes and write them with both towers, float32, into a new folder.

    Args:
        folder: new folder.
        loaded, blend, blend_weight: as in `freeze_classifier`.

    Raises:
        UserError: as `freeze_classifier`, or the folder holds something.
    """
    classifier = freeze_classifier(loaded, blend=blend, blend_weight=blend_weight)
    with new_folder(folder) as partial:
        write_tensors(partial / TOWERS, dict(loaded.model.clip.state_dict()))
        write_tensors(partial / CLASSIFIER, _own_state(classifier))
        files = {name: sha256_of(partial / name) for name in (TOWERS, CLASSIFIER)}
        if classifier.calibration is not None:
            write_calibration(partial, classifier.calibration, partial / CLASSIFIER)
        description = _describe(classifier, loaded)
        write_json(partial / CLASSIFIER_JSON, {**description, "blend": blend, "files": files})
        card = export_card(
            "classifier",
            class_names=classifier.class_names,
            pixels=classifier.pixels,
            training=loaded.training,
            plugins=description["plugins"],
        )
        write_text(partial / "README.md", card)


def load_classifier(folder: str | Path, dtype: torch.dtype | None = None) -> Classifier:
    """Classifier of a folder that `export-checkpoint --layout classifier` wrote, on the CPU.

    Args:
        folder: the folder.
        dtype: low precision of the image tower; None: float32.

    Raises:
        UserError: missing, damaged or mismatching files.
    """
    folder = local_folder(folder, "checkpoint")
    found = read_classifier(folder)
    names = found.class_names
    clip = load_towers(folder)
    text = torch.zeros(2, len(names), found.model_cfg["embed_dim"])
    tensors = load_tensors(folder / CLASSIFIER)
    classifier = Classifier(
        FrozenImageTower(clip, dtype),
        FUSIONS[found.fusion](),
        torch.zeros(()),
        text,
        class_names=names,
        pixels=found.pixels,
        blend_features=torch.zeros_like(text[0]) if "blend_features" in tensors else None,
    )
    check_fit(_own_state(classifier), tensors, folder / CLASSIFIER)
    classifier.load_state_dict(tensors, strict=False)  # all but the image tower
    calibration = calibration_of(folder, folder / CLASSIFIER)
    if calibration is not None and set(calibration.names) != set(names):
        raise UserError(f"{folder / CALIBRATION}: has other classes than the classifier; {REPEAT}, or remove it")
    classifier.calibrate(calibration)
    return classifier


def read_classifier(folder: Path) -> Description:
    """What a classifier's folder says of itself; the checksums of its files are verified.

    Raises:
        UserError: not such a folder, or missing or damaged files.
    """
    file = folder / CLASSIFIER_JSON
    description = read_json(file)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise UserError(f"{file}: not of the format {FORMAT}")
    try:
        found = as_schema(Description, description)
        check_names(found.class_names)
        check_config(found.model_cfg, str(file))
        if found.fusion not in FUSIONS.names():
            raise UserError(f"{file}: model.fusion: {found.fusion!r} is not one of {', '.join(FUSIONS.names())}")
        require_true(found.pixels.size == found.model_cfg["vision_cfg"]["image_size"])
    except UserError as error:
        raise UserError(f"{error}{advice(description)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is damaged ({error}); export the model again") from None
    check_files(folder, found.files or {})
    return found


def load_towers(folder: Path) -> open_clip.CLIP:
    """Both towers of a classifier's folder, float32, on the CPU, in eval mode.

    Raises:
        UserError: as `read_classifier`, or weights that do not fit.
    """
    clip = build_clip(read_classifier(folder).model_cfg).eval()
    load_strictly(clip, load_tensors(folder / TOWERS), folder / TOWERS)
    return clip


def _own_state(classifier: Classifier) -> dict[str, Tensor]:
    """Text features, fusion and temperature."""
    return {name: tensor for name, tensor in classifier.state_dict().items() if not name.startswith("tower.")}


def _describe(classifier: Classifier, loaded: LoadedModel) -> dict[str, Any]:
    """Contents of the JSON: open_clip's keys `model_cfg` and `preprocess_cfg`, which make its `create_model` and
    transforms, and the classifier's own."""
    assert loaded.bank is not None
    pixels = classifier.pixels
    return {
        "format": FORMAT,
        "class_names": classifier.class_names,
        "pixels": asdict(pixels),
        "fusion": classifier.channel_attention.name,
        "bank_size": len(loaded.bank),
        "training": loaded.training,
        "plugins": plugins_of(loaded.model.clip, loaded.model.config),
        "versions": {name: version(name) for name in ("pspg-engine", "torch", "open_clip_torch")},
        "model_cfg": clip_config(loaded.model.clip),
        "preprocess_cfg": {
            "size": pixels.size,
            "mode": "RGB",
            "mean": [pixels.mean] * 3,
            "std": [pixels.std] * 3,
            "interpolation": "bicubic",
            "resize_mode": {"stretch": "squash", "pad": "longest"}[pixels.resize],
            "fill_color": 0,
        },
    }
