"""`pspg-engine calibrate`: a model's probabilities and thresholds, fitted on validation images and kept with it."""

from __future__ import annotations

import logging

import numpy as np

from ..checkpoints.calibration import FILE, Calibration, write_calibration
from ..checkpoints.model_folder import is_classifier
from ..checkpoints.run import run_of
from ..data.bad_image import report_bad
from ..data.labels import label_matrix, select_classes
from ..data.manifest import load_label_names, load_manifest
from ..evaluation.calibration import calibrated, fit_classes, left_line, point_name
from ..evaluation.reliability import AtThreshold, at_thresholds, reliability
from ..models.hub import local_folder
from ..utils.errors import UserError
from ..utils.names import HUB, data_name
from ..utils.templates import number
from ..utils.terminal import show_table
from .image_scores import ImageScores
from .settings import CalibrateConfig, check_calibrate

log = logging.getLogger(__name__)

CLASSES = 20
"""classes shown"""


def calibrate(config: CalibrateConfig) -> Calibration:
    """Score the validation images, fit, write calibration.json into `config.checkpoint` and print what it gives.

    Raises:
        UserError: wrong settings, an unusable model or manifest, or (on_bad_image = error) an unreadable image.
    """
    check_calibrate(config)
    source = local_folder(config.checkpoint, "checkpoint")
    kept = run_of(source) / FILE
    if config.class_names is not None and is_classifier(source):
        raise UserError("class_names: all frozen classes of a classifier are calibrated; leave it out")
    names = None if config.label_names is None else load_label_names(config.label_names)
    manifest = load_manifest(config.manifest, image_root=config.image_root, label_names=names, need="labels")
    scores = ImageScores(config, source, bank=True, calibrated=False)
    scorer = scores.scorer
    known = [name for name in scorer.class_names if name in (manifest.label_names or [])]
    if not known:
        raise UserError(f"manifest: {config.manifest} has no label of the {len(scorer.class_names)} classes")
    groups = _groups(config, scorer.class_names)
    columns = select_classes(manifest.label_names or [], known)[1]
    labels = np.full((len(manifest.samples), len(scorer.class_names)), -1, np.float32)
    places = [scorer.class_names.index(name) for name in known]
    labels[:, places] = label_matrix(manifest.samples, columns, uncertain=config.uncertain, blank=config.blank)
    loader = scores.loader(manifest.samples, labels)
    odds, truth = [], []
    for batch, _, _, logits in scores.of(loader, "calibrating"):
        odds.append((logits[:, 0] - logits[:, 1]).cpu().numpy())
        assert batch.labels is not None
        truth.append(batch.labels.cpu().numpy().astype(np.int8))
    z, y = np.concatenate(odds), np.concatenate(truth)
    classes, reasons = fit_classes(
        z,
        y,
        scorer.class_names,
        method=config.method,
        groups=groups,
        min_positives=config.min_positives,
        point=config.point,
        target=config.target,
    )
    result = Calibration(
        classes=classes,
        blend=scorer.blend_kind,
        blend_weight=scorer.blend_weight,
        method=config.method,
        point=point_name(config.point, config.target),
        data=data_name(config.manifest),
        images=len(z),
        weights="",
    )
    replaced = kept.exists()
    write_calibration(kept.parent, result, scorer.weights)
    after = calibrated(z, classes)
    _show(result, at_thresholds(y, after, result.names, [row.threshold for row in classes]))
    before, now = reliability(y, 1 / (1 + np.exp(-z))), reliability(y, after)
    log.info(
        f"on these {len(z)} images: calibration error {before.ece:.3f} before, {now.ece:.3f} after; "
        f"Brier score {before.brier:.3f}, {now.brier:.3f}"
    )
    if reasons:
        log.info(left_line(reasons, len(classes)))
    log.info(f"written: {kept}{', in place of the one before' if replaced else ''}")
    if config.checkpoint.startswith(HUB):
        log.info(f"that is this machine's copy of {config.checkpoint}; export-checkpoint makes a folder to push")
    report_bad(loader.bad)
    return result


def _groups(config: CalibrateConfig, names: list[str]) -> dict[str, list[str]]:
    """Classes of each group.

    Raises:
        UserError: an unreadable file, an unknown class, or one in two groups.
    """
    groups: dict[str, list[str]] = {}
    for group, file in (config.groups or {}).items():
        groups[group] = select_classes(names, file, key=f"groups.{group}")[0]
    members = [name for group in groups.values() for name in group]
    if len(set(members)) < len(members):
        twice = next(name for i, name in enumerate(members) if name in members[:i])
        raise UserError(f"groups: class {twice!r} is in two groups; keep one")
    return groups


def _show(result: Calibration, found: list[AtThreshold]) -> None:
    """Print the classes with their thresholds, the fewest positives first."""
    at = {row.name: row for row in found}
    rows = []
    for one in sorted(result.classes, key=lambda row: row.positives):
        here = at.get(one.name)
        rates = [number(here.sensitivity), number(here.specificity)] if here else ["–", "–"]
        threshold = "–" if one.threshold is None else f"{one.threshold:.3f}"
        line = [f"{one.slope:.3f}", f"{one.intercept:+.3f}"] if one.group is not None else ["–", "–"]
        rows.append([one.name, str(one.positives), *line, threshold, *rates])
    columns = [
        "class, fewest positives first",
        "positives",
        "slope",
        "intercept",
        "threshold",
        "sensitivity",
        "specificity",
    ]
    show_table(columns, rows, title=f"Thresholds: {result.point}", most=CLASSES)
