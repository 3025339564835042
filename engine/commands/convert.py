"""`pspg-engine import-checkpoint` and `export-checkpoint`: model folders from and to other layouts."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoints.calibration import write_calibration
from ..checkpoints.card import export_card
from ..checkpoints.classifier import write_classifier
from ..checkpoints.integrity import sha256_of
from ..checkpoints.model_folder import (
    LoadedModel,
    describe,
    load_clip_folder,
    load_model,
    read_description,
    training_data,
    without_places,
    write_model,
)
from ..checkpoints.published import import_published, published_metadata, published_state, read_text_weights
from ..checkpoints.run import load_tensors, run_of, write_json, write_tensors
from ..data.manifest import load_label_names
from ..data.pixels import Pixels
from ..models.clip import clip_config
from ..models.hub import local_folder
from ..models.pspg import PsPG
from ..models.weights import read_metadata
from ..utils.documents import as_schema, parse_json
from ..utils.errors import UserError
from ..utils.files import new_folder, write_text
from .settings import ExportConfig, ImportConfig, check_export, check_import

log = logging.getLogger(__name__)

AUTHORS_PIXELS = {"mean": 0.5306, "std": 0.2327}
"""what the authors' code evaluates with, whatever the data set; a checkpoint of theirs does not say it"""


def import_checkpoint(config: ImportConfig) -> PsPG:
    """Read weights in the published layout and write a model folder.

    Raises:
        UserError: unreadable or mismatching weights, or `output` exists.
    """
    check_import(config)
    names = config.class_names
    model = import_published(
        config.source,
        load_label_names(names) if isinstance(names, str) else names,
        prompt_length=config.prompt_length,
        decoder_heads=config.decoder_heads,
        prefix=config.prefix,
        class_feature_weights=config.class_feature_weights,
    ).float()
    size = clip_config(model.clip)["vision_cfg"]["image_size"]
    given = {key: value for key, value in (("mean", config.mean), ("std", config.std)) if value is not None}
    try:
        carried = parse_json(read_metadata(config.source).get("pixels", "{}"))
        pixels = as_schema(Pixels, {"size": size, "resize": "stretch", **AUTHORS_PIXELS, **carried, **given})
        usable = pixels.size == size
    except (ValueError, TypeError):
        usable = False
    if not usable:
        raise UserError(
            f"{config.source}: its pixel statistics are unusable; give --mean within [0, 1] and --std above 0"
        )
    tensors = {"clip": dict(model.clip.state_dict()), "model": dict(model.head.state_dict())}
    if config.class_feature_weights is not None:
        tensors["class_text"] = read_text_weights(config.class_feature_weights)
    description = describe("pspg", model.clip, pixels, head=model.config, class_names=model.class_set.names)
    with new_folder(config.output) as partial:
        write_model(partial, description, tensors)
    assumed = [f"{key} {value}" for key, value in AUTHORS_PIXELS.items() if key not in {**carried, **given}]
    if assumed:
        log.info(f"{config.source} does not say its pixels' {' and '.join(assumed)}: the authors' evaluation has these")
    log.info(f"imported {config.source} with {len(model.class_set.names)} classes: {config.output}")
    return model


def export_checkpoint(config: ExportConfig) -> None:
    """Write the weights of a run or model folder as one self-contained folder.

    Raises:
        UserError: not a usable folder, `output` exists, a model that the layout has no place for, or (layout
            classifier) no context bank.
    """
    check_export(config)
    source = local_folder(config.checkpoint, "checkpoint")
    description = read_description(source)
    description["training"] = training_data(description)
    if description["kind"] == "pspg":  # older versions wrote paths of the trainer's machine
        description["head"] = without_places(description["head"])
    if description["kind"] == "clip":
        if config.layout != "pspg-engine":
            raise UserError("layout: a phase-1 CLIP has no prompt learner; export it with layout pspg-engine")
        clip, _ = load_clip_folder(source)
        with new_folder(config.output) as partial:
            write_model(partial, description, {"model": dict(clip.state_dict())})
            _write_card(partial, "clip", description)
    else:
        loaded = load_model(source)
        if config.layout == "classifier":
            loaded.set_classes(config.class_names)
            write_classifier(config.output, loaded, blend=config.blend or "novelty", blend_weight=config.blend_weight)
        elif config.layout == "published":
            _write_published(config.output, loaded, description)
        else:
            tensors = {"clip": dict(loaded.model.clip.state_dict()), "model": dict(loaded.model.head.state_dict())}
            with new_folder(config.output) as partial:
                write_model(partial, description, {**tensors, **_beside(run_of(source), "bank", "class_text")})
                if loaded.calibration is not None:
                    write_calibration(partial, loaded.calibration, partial / "model.safetensors")
                _write_card(partial, "pspg-engine", description)
    log.info(f"exported {config.checkpoint}: {config.output}")


def _write_published(output: str, loaded: LoadedModel, description: dict[str, Any]) -> None:
    """One file with the authors' names, the text tower of class features if it is another, and export.json.

    Raises:
        UserError: a model that the layout has no place for.
    """
    state = published_state(loaded.model)
    metadata = {**published_metadata(loaded.model), "pixels": json.dumps(asdict(loaded.pixels))}
    with new_folder(output) as partial:
        write_tensors(partial / "model.safetensors", state, metadata)
        for name, tensors in _beside(loaded.source, "class_text").items():
            write_tensors(partial / f"{name}.safetensors", tensors)
        files = {file.name: sha256_of(file) for file in sorted(partial.iterdir())}
        write_json(partial / "export.json", {**description, "layout": "published", "files": files})
        _write_card(partial, "published", description)


def _write_card(folder: Path, layout: str, description: dict[str, Any]) -> None:
    """README.md of an export."""
    card = export_card(
        layout,
        class_names=description.get("class_names"),
        pixels=Pixels(**description["pixels"]),
        training=description.get("training"),
        plugins=description.get("plugins") or [],
    )
    write_text(folder / "README.md", card)


def _beside(folder: Path, *names: str) -> dict[str, dict[str, Tensor]]:
    """Name → tensors of the optional files of a model folder that are there."""
    return {name: load_tensors(file) for name in names if (file := folder / f"{name}.safetensors").is_file()}
