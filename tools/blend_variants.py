"""Blends that the engine does not have, tried on the runs of `pspg-engine leave-out` (leave_out.md).

    python -m tools.blend_variants --manifest val.jsonl --classes seen.txt RUNS/*

Each run was trained without some of the classes; it scores those. A blend adds a · ν^p · σ_learned / σ_template ·
z_template to the log-odds (`engine/models/blend.py`), σ over the context bank: one for all from the training classes,
or of the class itself. The table has the mean Macro AUC over runs, and over the runs of each seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from pspg.engine.data.manifest import load_label_names, load_manifest
from pspg.engine.evaluation.metrics import macro_auc
from pspg.engine.evaluation.model import load_model
from pspg.engine.models.blend import spread_of, template_directions, unit_global
from pspg.engine.models.novelty import novelty
from pspg.engine.utils.errors import UserError

Array = NDArray[np.float64]
WEIGHTS = {1: (1, 2, 4, 8, 16), 2: (4, 8, 16, 32, 64), 3: (8, 16, 32, 64)}
"""power p of the novelty → weights a"""


class Scores(NamedTuple):
    """Of the classes that a run was trained without; B images, C classes."""

    seed: int
    labels: Array
    """(B,C)"""
    learned: Array
    """(B,C) log-odds of the prompts"""
    template: Array
    """(B,C) log-odds of the templates"""
    new: Array
    """(C,) novelty"""
    ratio: float
    """σ_learned / σ_template of the training classes"""
    own_ratio: Array
    """(C,) that of each class"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, each trained without some classes")
    parser.add_argument("--manifest", required=True, help="images to score, with labels; never the test set")
    parser.add_argument("--classes", required=True, help="text file of all training classes, one a line")
    options = parser.parse_args(arguments)
    try:
        names = load_label_names(options.classes)
        found = [scores(run, options.manifest, names) for run in options.runs]
    except UserError as error:
        print(f"blend_variants: error: {error}", file=sys.stderr)
        return 2
    print(f"{len(found)} runs, seeds {', '.join(map(str, sorted({one.seed for one in found})))}\n")
    print("| blend | weight a | Macro AUC | by seed |\n|---|--:|--:|---|")
    print(_line("prompts alone", "–", found, lambda one: one.learned))
    print(_line("templates alone", "–", found, lambda one: one.template))
    for power, weights in WEIGHTS.items():
        for own, a in product((False, True), weights):
            title = f"ν{'' if power == 1 else '²³'[power - 2]}, {'σ by class' if own else 'one σ for all'}"
            print(_line(title, str(a), found, partial(blend, a=a, power=power, own=own)))
    return 0


def blend(one: Scores, *, a: float, power: int, own: bool) -> Array:
    """(B,C) blended log-odds."""
    ratio = one.own_ratio if own else one.ratio
    return one.learned + a * one.new**power * ratio * one.template


@torch.inference_mode()
def scores(run: Path, manifest: str, names: list[str]) -> Scores:
    """Scores of the classes among `names` that a run was trained without.

    Raises:
        UserError: no such run or manifest, no class left out, or a model without its bank's features.
    """
    model = load_model(str(run), device="cpu", blend="none", calibrated=False)
    loaded = model.loaded
    left_out = [name for name in names if name not in set(model.training_classes)]
    if loaded is None or loaded.bank is None or loaded.bank_features is None or not left_out:
        raise UserError(
            f"{run}: not a run that was trained without some of the {len(names)} classes and keeps its bank"
        )
    known = load_manifest(manifest, need="labels")
    columns = [(known.label_names or []).index(name) for name in left_out]
    labels = np.array([[-1 if y is None else y for y in sample.labels or ()] for sample in known.samples])[:, columns]
    model.set_classes(left_out)
    images = [sample.path for sample in known.samples]
    net, bank = loaded.model, loaded.bank_features
    directions = template_directions(net, left_out)
    spread = spread_of(net, bank)
    z = net.head(bank, net.class_set, net.tower, context=loaded.bank).logits.double()
    deviations = [
        s.std(dim=0, correction=0).numpy() for s in (z[:, 0] - z[:, 1], unit_global(bank.tokens) @ directions.T)
    ]
    new = novelty(net.class_set.class_features, net.training_set.class_features).numpy()
    return Scores(
        seed=yaml.safe_load((run / "config.yaml").read_text())["seed"],
        labels=labels,
        learned=model.score(images).logits,
        template=model.embed(images) @ directions.numpy().T,
        new=new,
        ratio=spread.learned / spread.template,
        own_ratio=deviations[0] / deviations[1],
    )


def _line(title: str, weight: str, found: Sequence[Scores], blended: Callable[[Scores], Array]) -> str:
    """A row of the table: the mean over seeds of the mean over a seed's runs, and those."""
    seeds = sorted({one.seed for one in found})
    means = [fmean(100 * _auc(one, blended(one)) for one in found if one.seed == seed) for seed in seeds]
    return f"| {title} | {weight} | {fmean(means):.1f} | {', '.join(f'{mean:.1f}' for mean in means)} |"


def _auc(one: Scores, odds: Array) -> float:
    """Macro AUC of log-odds: of numbers in [0, 1] in the same order, no two of them rounded to one."""
    return macro_auc(one.labels, (odds - odds.min()) / np.ptp(odds))


if __name__ == "__main__":
    sys.exit(main())
