"""`pspg-engine evaluate`: a method from any source, its baselines and a probe on one labelled split."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..config import EvaluateConfig, check_evaluation, check_workers, require
from ..data.labels import label_matrix, select_classes
from ..data.loaders import load_with, pick_loader
from ..data.manifest import Manifest, load_label_names, load_manifest
from ..data.torch_loader import make_eval_loader
from ..device import autocast_dtype, pick_device
from ..errors import UserError
from ..files import check_output
from ..inference import Scores
from ..models.baselines import ridge_probe
from ..telemetry import report_bad, say
from .bootstrap import bootstrap_groups
from .method import ImageMethod, Method
from .metrics import evaluate_groups
from .predictions import Predictions
from .report import write_report
from .sources import MODELS, check_source, open_source

PROBE = "ridge probe (ceiling)"


def evaluate_model(config: EvaluateConfig) -> Path:
    """Score, measure and write the report; returns its path.

    Raises:
        UserError: wrong settings, unusable source or data.
    """
    source = check_source(config)
    require(manifest=config.manifest, output=config.output)
    settings = config.evaluation
    check_evaluation("evaluation.", settings)
    check_workers("workers", config.workers)
    check_output(config.output)
    manifest = _manifest(config, config.manifest)
    lists = class_lists(config, manifest)
    names = [name for group in lists.values() for name in group]
    device = pick_device(config.device)
    # Whatever else reads images does so with Pillow.
    config = replace(config, loader=pick_loader("loader", config.loader, device) if source in MODELS else "torch")
    method = open_source(source, config, device, autocast_dtype(config.precision, device))

    def scores_of(split: Manifest, title: str, groups: dict[str, list[str]]) -> Scores:
        columns = select_classes(split.label_names or [], names)[1]
        labels = label_matrix(split.samples, columns, uncertain=config.uncertain, blank=config.blank)
        if isinstance(method, Predictions):
            return method.read(config, split, labels, names)
        assert isinstance(method, ImageMethod)
        loader = make_eval_loader(
            method.dataset(config, split, labels),
            batch_size=settings.batch_size,
            workers=config.workers,
            load=load_with(config.loader, device),
        )
        batches = tqdm(loader, title, unit="batch", leave=False, dynamic_ncols=True, disable=None)
        parts = list(method.score(list(groups.values()), batches))
        if not parts:
            raise UserError(next(iter(loader.bad.values()), "there are no images"))
        report_bad(loader.bad)
        return Scores.join(parts)

    scores = scores_of(manifest, "scoring", lists)
    assert scores.labels is not None
    # The first group of a report is everything it shows.
    groups = {"all": names, **lists} if len(lists) > 1 else lists
    methods: dict[str, NDArray[np.float64]] = {method.name: scores.probabilities}
    parameters = {method.name: method.parameters}
    if config.baselines:
        found = method.baselines(scores, names)
        methods |= found
        parameters |= dict.fromkeys(found, method.baseline_parameters)
    if config.probe:
        train = scores_of(_manifest(config, config.probe), "features for the probe", {})
        assert train.labels is not None
        methods[PROBE] = ridge_probe(train.features, train.labels, scores.features)
        parameters[PROBE] = (train.features.shape[1] + 1) * len(names)
    bars = sys.stderr.isatty()
    metrics = {
        name: evaluate_groups(scores.labels, values, names, groups, threshold=settings.threshold, progress=bars)
        for name, values in methods.items()
    }
    intervals = {
        name: bootstrap_groups(
            scores.labels,
            values,
            names,
            groups,
            resamples=settings.bootstrap,
            seed=settings.seed,
            progress=bars,
        )
        for name, values in methods.items()
        if settings.bootstrap
    }
    report = write_report(
        Path(config.output),
        title=config.title or f"{method.name} evaluation",
        metrics=metrics.pop(method.name),
        class_names=names,
        ids=scores.ids,
        labels=scores.labels,
        probabilities=scores.probabilities,
        settings=_settings(config, source, method),
        intervals=intervals.pop(method.name, None),
        baselines=metrics,
        baseline_intervals=intervals,
        method=method.name,
        about=method.about,
        parameters=parameters,
        pictures=[(caption, Path(path)) for caption, path in config.pictures.items()],
        training=method.training,
        notes=config.notes,
        training_data=method.training_data,
        progress=bars,
    )
    say(f"{len(scores.ids)} images, {len(names)} classes: {report}")
    return report


def class_lists(config: EvaluateConfig, manifest: Manifest) -> dict[str, list[str]]:
    """Name → classes of each list to report.

    Raises:
        UserError: an unknown class, or one in two lists.
    """
    labels = manifest.label_names or []
    if config.class_lists is None:
        return {"all": labels}
    lists = {name: select_classes(labels, path)[0] for name, path in config.class_lists.items()}
    if "all" in lists and len(lists) > 1:
        raise UserError("class_lists: 'all' is the name of the lists together; choose another name")
    seen: dict[str, str] = {}
    for group, names in lists.items():
        for name in names:
            if name in seen:
                raise UserError(f"class_lists: {name!r} is in {seen[name]!r} and in {group!r}; a class has one list")
            seen[name] = group
    return lists


def _manifest(config: EvaluateConfig, path: str) -> Manifest:
    names = None if config.label_names is None else load_label_names(config.label_names)
    return load_manifest(path, image_root=config.image_root, label_names=names, need="labels")


def _settings(config: EvaluateConfig, source: str, method: Method) -> dict[str, Any]:
    """What the report says was run."""
    return {
        **asdict(config.evaluation),
        "context": method.context,
        **method.settings,
        "manifest": config.manifest,
        "class lists": config.class_lists or "all labels",
        "uncertain": config.uncertain,
        "blank": config.blank,
        **({"precision": config.precision, "loader": config.loader} if source in MODELS else {}),
        "versions": {name: version(name) for name in ("pspg-engine", "torch", "open_clip_torch", "scikit-learn")},
    }
