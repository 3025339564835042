"""`pspg-engine evaluate`: a method from any source, its baselines and a probe on one labelled split."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data.bad_image import report_bad
from ..data.labels import label_matrix, select_classes
from ..data.loaders.choose import pick_loader
from ..data.manifest import Manifest, load_label_names, load_manifest
from ..distributed.launcher import run_marks
from ..distributed.watch import watch
from ..distributed.world import World, start
from ..evaluation.calibration import fit_classes, left_line, log_odds, point_name
from ..evaluation.choose import check_source, open_source
from ..evaluation.config import EvaluateConfig, check_evaluate
from ..evaluation.gallery import make_gallery
from ..evaluation.prevalence import GROUPS, prevalence_groups
from ..evaluation.probe import ridge_probe, text_informed_probe
from ..evaluation.report.evaluation import Evaluation, Fitted, measure
from ..evaluation.report.summary import show_summary
from ..evaluation.report.write import write_report
from ..evaluation.rivals import Rival, on_common_images, score_rivals
from ..evaluation.scoring import Scores
from ..evaluation.sources import Method, Source, Split
from ..models.hub import local_folder
from ..models.templates import PAIRED
from ..utils.device import autocast_dtype
from ..utils.errors import UserError
from ..utils.freed_memory import freed_memory_kept
from ..utils.lock import one_writer
from ..utils.names import data_name, named
from ..utils.numerics import numerics
from ..utils.settings import as_settings

log = logging.getLogger(__name__)

PROBE = "ridge probe (ceiling)"
TEXT_PROBE = "text-informed probe"
"""the templates, corrected on the training classes alone"""


def evaluate(config: EvaluateConfig | Mapping[str, Any] | str | Path | None = None, **more: Any) -> Evaluation | None:
    """`evaluate_model` with settings as `utils.settings.as_settings` takes them.

    `data_tables` makes tables of what it returns.
    """
    return evaluate_model(as_settings(EvaluateConfig, config, **more))


def evaluate_model(config: EvaluateConfig) -> Evaluation | None:
    """Score, measure, write the report to `config.output` and print its summary.

    Returns:
        Metrics, intervals, labels and probabilities. On several ranks the first does what follows scoring; the others
        return None.

    Raises:
        UserError: wrong settings, unusable source or data.
    """
    check_evaluate(config)
    if config.checkpoint:
        config = replace(config, checkpoint=str(local_folder(config.checkpoint, "checkpoint")))
    source = check_source(config)
    run = run_marks(f"evaluate {config.output}", config)
    world = start(config.device, config.timeout_s, hosts_only=True, run=run)
    with ExitStack() as alone, ExitStack() as together:
        if world.size == 1:
            alone.enter_context(one_writer(config.output))
        lost = watch(world, config.timeout_s, lambda line: log.error(f"pspg-engine evaluate: error: {line}"))
        together.enter_context(lost)
        together.enter_context(freed_memory_kept(world.device))
        return _evaluate(config, source, world, together)


class SummaryRow(NamedTuple):
    """A row of the summary: the method under evaluation, or one that it is compared with."""

    name: str
    probabilities: NDArray[np.float64]
    """(N,C)"""
    parameters: int | None


def _evaluate(config: EvaluateConfig, source: type[Source], world: World, together: ExitStack) -> Evaluation | None:
    """`evaluate_model`; closes `together` where the work of other ranks than the first ends."""
    manifest = _manifest(config, config.manifest)
    lists = class_lists(config, manifest)
    names = [name for group in lists.values() for name in group]
    groups, counts, splits = _groups(config, names, lists)
    device = world.device
    # Sources without the engine's loader read images with Pillow.
    loader = pick_loader("loader", config.loader, device) if source.engine_loader else "torch"
    config = replace(config, loader=loader)
    autocast = autocast_dtype(config.precision, device)
    method = open_source(source, config, device, autocast)
    split = _split(config, manifest, names, list(lists.values()), "scoring")
    scores = _score(config, method, split, world)
    rivals = score_rivals(config, split, world, autocast, [method.name])
    validation = None
    if config.calibration:
        images = _split(
            config, _manifest(config, config.calibration), names, list(lists.values()), "scoring the validation"
        )
        validation = _score(config, method, images, world)
    train = None
    if config.probe:
        images = _split(config, _manifest(config, config.probe), names, [], "features for the probe")
        train = _score(config, method, images, world)
    together.close()
    if scores is None:
        return None
    if rivals:
        scores, rivals = on_common_images(scores, rivals)
    assert scores.labels is not None
    kept = method.calibration(list(lists.values()))
    fitted = None
    if validation is not None:
        fitted = _fit(config, validation, names)
    elif kept is not None:
        reasons = {row.name: "by the model's calibration" for row in kept.classes if row.group is None}
        fitted = Fitted(kept.classes, reasons, kept.point, kept.data, kept.images)
    bars = sys.stderr.isatty()
    evaluation = Evaluation(
        title=config.title or f"{method.name} evaluation",
        methods=[
            measure(
                row.name,
                scores.labels,
                row.probabilities,
                groups,
                config.evaluation,
                parameters=row.parameters,
                ceiling=row.name == PROBE,
                progress=bars,
            )
            for row in _summary_rows(config, method, scores, rivals, train, names)
        ],
        class_names=names,
        ids=scores.ids,
        labels=scores.labels,
        probabilities=scores.probabilities,
        settings=_settings(config, source, method),
        about=method.about,
        library=method.library,
        pictures=[(caption, Path(path)) for caption, path in config.pictures.items()],
        training=method.training,
        fitted=fitted,
        train=counts,
        splits={
            **splits,
            **({"validation, for the calibration": len(validation.ids)} if validation else {}),
            "these images": len(scores.ids),
        },
        gallery=make_gallery(config, method, split, scores, names, fitted),
        training_data=method.training_data,
        notes=config.notes,
    )
    # Of several ranks one can be ended from outside while they score: nothing is made before there is a report.
    with one_writer(config.output) if world.size > 1 else nullcontext():
        report = write_report(Path(config.output), evaluation, progress=bars)
    show_summary(evaluation)
    log.info(f"{len(scores.ids)} images, {len(names)} classes: {report}")
    return evaluation


def _score(config: EvaluateConfig, method: Method, split: Split, world: World) -> Scores | None:
    """Scores of a split, with a message about the images left out; None on other ranks than the first."""
    found = method.scores(config, split, world)
    if found is None:
        return None
    scores, bad = found
    report_bad({sample.id: bad[sample.id] for sample in split.manifest.samples if sample.id in bad})
    return scores


def _split(config: EvaluateConfig, manifest: Manifest, names: list[str], lists: list[list[str]], title: str) -> Split:
    """The images of a manifest with the labels of the classes `names`, to score for the class lists."""
    columns = select_classes(manifest.label_names or [], names)[1]
    labels = label_matrix(manifest.samples, columns, uncertain=config.uncertain, blank=config.blank)
    return Split(manifest, labels, lists, title)


def _summary_rows(
    config: EvaluateConfig,
    method: Method,
    scores: Scores,
    rivals: list[Rival],
    train: Scores | None,
    names: list[str],
) -> Iterator[SummaryRow]:
    """The method under evaluation, then what it is compared with, its baselines, and the probes."""
    yield SummaryRow(method.name, scores.probabilities, method.parameters)
    for rival in rivals:
        yield SummaryRow(rival.name, rival.scores.probabilities, rival.parameters)
    if config.baselines:
        for name, probabilities in method.baselines(scores, names).items():
            yield SummaryRow(name, probabilities, method.baseline_parameters)
    if train is not None:
        assert train.labels is not None
        probabilities = ridge_probe(train.features, train.labels, scores.features)
        size = train.features.shape[1]
        yield SummaryRow(PROBE, probabilities, (size + 1) * len(names))
        if method.training_classes is not None:
            text, text_train = (method.baselines(each, names)[f"template, {PAIRED}"] for each in (scores, train))
            trained = set(method.training_classes) & set(names)
            probabilities = text_informed_probe(
                train.features, train.labels, text_train, scores.features, text, names, trained
            )
            yield SummaryRow(TEXT_PROBE, probabilities, (size + 2) * len(trained))


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


def _fit(config: EvaluateConfig, validation: Scores, names: list[str]) -> Fitted:
    """Calibration and thresholds of the method under evaluation; classes that could not be fitted are told."""
    assert validation.labels is not None
    odds, labels = log_odds(validation.probabilities), validation.labels.astype(np.int8)
    classes, reasons = fit_classes(odds, labels, names, point=config.point, target=config.target)
    if reasons:
        log.info(f"calibration: {left_line(reasons, len(names))}")
    data = data_name(str(config.calibration))
    return Fitted(classes, reasons, point_name(config.point, config.target), data, len(validation.ids))


def _groups(
    config: EvaluateConfig, names: list[str], lists: dict[str, list[str]]
) -> tuple[dict[str, list[str]], dict[str, tuple[int, int]], dict[str, int]]:
    """Groups of classes that the report shows: everything, which comes first, groups by prevalence, class lists.

    Returns:
        groups; class name → positives and labelled images of the training, and the images of its split, if it is known.

    Raises:
        UserError: a training manifest that cannot be read or lacks a class, or a class list named like a group.
    """
    groups = {"all": names} if len(lists) > 1 or config.frequencies else {}
    counts: dict[str, tuple[int, int]] = {}
    splits: dict[str, int] = {}
    if config.frequencies:
        for name in GROUPS:
            if name in lists:
                raise UserError(f"class_lists: {name!r} is a group by prevalence; choose another name")
        split = _split(config, _manifest(config, config.frequencies), names, [], "")
        pairs = zip((split.labels == 1).sum(0), (split.labels >= 0).sum(0), strict=True)
        counts = {name: (int(a), int(b)) for name, (a, b) in zip(names, pairs, strict=True)}
        splits = {"training": len(split.labels)}
        groups |= prevalence_groups(split.labels, names, head=config.head_above, tail=config.tail_below)
    return {**groups, **lists}, counts, splits


def _manifest(config: EvaluateConfig, path: str) -> Manifest:
    names = None if config.label_names is None else load_label_names(config.label_names)
    return load_manifest(path, image_root=config.image_root, label_names=names, need="labels")


def _settings(config: EvaluateConfig, source: type[Source], method: Method) -> dict[str, Any]:
    """Settings as the report shows them: data by base name and digest, no folder of this machine."""
    return {
        **asdict(config.evaluation),
        "context": method.context,
        **named(dict(method.settings)),
        "manifest": data_name(config.manifest),
        "class lists": named(config.class_lists or "all labels"),
        **(
            {
                "frequencies": data_name(config.frequencies),
                "head_above": config.head_above,
                "tail_below": config.tail_below,
            }
            if config.frequencies
            else {}
        ),
        **({"compare": named(config.compare)} if config.compare else {}),
        **({"calibration": data_name(config.calibration)} if config.calibration else {}),
        "uncertain": config.uncertain,
        "blank": config.blank,
        **({"precision": config.precision, "loader": config.loader} if source.engine_loader else {}),
        "versions": {name: version(name) for name in ("pspg-engine", "torch", "open_clip_torch", "scikit-learn")},
        "numerics": numerics(),
    }
