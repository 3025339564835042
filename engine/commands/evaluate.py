"""`pspg-engine evaluate`: a method from any source, its baselines and a probe on one labelled split."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import EvaluateConfig, check_evaluation, check_workers, require
from ..data.labels import label_matrix, select_classes
from ..data.loaders.choose import load_with, pick_loader
from ..data.loaders.evaluation import make_eval_loader
from ..data.manifest import Manifest, load_label_names, load_manifest
from ..distributed.watch import watch
from ..distributed.world import World, start
from ..evaluation.bootstrap import bootstrap_groups
from ..evaluation.metrics import evaluate_groups
from ..evaluation.report.write import write_report
from ..evaluation.scoring import Scores, score_together
from ..evaluation.sources.choose import MODELS, check_source, open_source
from ..evaluation.sources.method import ImageMethod, Method
from ..evaluation.sources.predictions import Predictions
from ..models.templates import ridge_probe
from ..training.telemetry import report_bad, say
from ..utils.device import autocast_dtype
from ..utils.errors import UserError
from ..utils.files import check_output

PROBE = "ridge probe (ceiling)"


def evaluate_model(config: EvaluateConfig) -> Path | None:
    """Score, measure and write the report; returns its path. Of several ranks the first one does what follows scoring,
    the others return None.

    Raises:
        UserError: wrong settings, unusable source or data.
    """
    source = check_source(config)
    require(manifest=config.manifest, output=config.output)
    check_evaluation("evaluation.", config.evaluation)
    check_workers("workers", config.workers)
    if config.timeout_s < 1:
        raise UserError(f"timeout_s: must be at least 1, got {config.timeout_s}")
    world = start(config.device, config.timeout_s, hosts_only=True)
    with ExitStack() as together:
        together.enter_context(watch(world, config.timeout_s, lambda line: say(f"pspg-engine evaluate: error: {line}")))
        return _evaluate(config, source, world, together)


def _evaluate(config: EvaluateConfig, source: str, world: World, together: ExitStack) -> Path | None:
    """`evaluate_model`; closes `together` where the work of other ranks than the first ends."""
    settings = config.evaluation
    check_output(config.output)
    manifest = _manifest(config, config.manifest)
    lists = class_lists(config, manifest)
    names = [name for group in lists.values() for name in group]
    device = world.device
    # Whatever else reads images does so with Pillow.
    config = replace(config, loader=pick_loader("loader", config.loader, device) if source in MODELS else "torch")
    method = open_source(source, config, device, autocast_dtype(config.precision, device))

    def scores_of(split: Manifest, title: str, groups: dict[str, list[str]]) -> Scores | None:
        columns = select_classes(split.label_names or [], names)[1]
        labels = label_matrix(split.samples, columns, uncertain=config.uncertain, blank=config.blank)
        if isinstance(method, Predictions):
            return method.read(config, split, labels, names) if world.rank == 0 else None
        assert isinstance(method, ImageMethod)
        loader = make_eval_loader(
            method.dataset(config, split, labels),
            batch_size=settings.batch_size,
            rank=world.rank,
            world_size=world.size,
            workers=config.workers,
            load=load_with(config.loader, device),
        )
        found = score_together(partial(method.score, list(groups.values())), loader, title=title)
        if found is None:
            return None
        scores, bad = found
        report_bad({sample.id: bad[sample.id] for sample in split.samples if sample.id in bad})
        return scores

    scores = scores_of(manifest, "scoring", lists)
    train = scores_of(_manifest(config, config.probe), "features for the probe", {}) if config.probe else None
    together.close()
    if scores is None:
        return None
    assert scores.labels is not None
    # The first group of a report is everything it shows.
    groups = {"all": names, **lists} if len(lists) > 1 else lists
    methods: dict[str, NDArray[np.float64]] = {method.name: scores.probabilities}
    parameters = {method.name: method.parameters}
    if config.baselines:
        found = method.baselines(scores, names)
        methods |= found
        parameters |= dict.fromkeys(found, method.baseline_parameters)
    if train is not None:
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
