"""How the text side of phase 2 and its loss grow with C, B and n; `python -m benchmarks.growth FOLDER` fits exponents.

Decoders, single prompts, SPCL and ASL, forward and backward, image features given; one letter varies, the others stay.
Every image carries as many labels as images do, whatever the number of classes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pspg.engine.config import ModelConfig
from pspg.engine.utils.errors import UserError
from pspg.kernels.spcl import sample_pairs

from .counting import flop_counter
from .gated import GradientStep, Oracle, Outcome, Provider, measure, outcome_of
from .present import Fit
from .rows import OK, Row, read_rows
from .steps import NAMES, form_of, low_precision
from .suite import Job, Started
from .training_step import Setup, make_setup

VARIED = {
    "C": (2, 4, 8, 16, 32, 64, 128, 250, 500),
    "B": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "n": (4, 6, 8, 12, 16, 24, 32),
}
LITERAL = 32
"""classes up to which the literal equations are what a provider must agree with; above them the exact algebra"""
LABELS = 3
"""of an image"""
SAMPLES = 8
"""pairs a class of `sampled`, as `loss.pair_samples`"""
VISION = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
TEXT = {"context_length": 77, "vocab_size": 64}
NARROW = {
    "embed_dim": 128,
    "vision_cfg": {**VISION, "image_size": 32},
    "text_cfg": {**TEXT, "width": 64, "heads": 2, "layers": 2},
}
"""a CLIP whose text tower a CPU can run for hundreds of classes; no token embedding is looked up"""
FULL = {
    "embed_dim": 1024,
    "vision_cfg": {**VISION, "image_size": 224},
    "text_cfg": {**TEXT, "width": 512, "heads": 8, "layers": 12},
}
"""the text side of RN50; its image tower runs once, so a small one serves"""


class Case(NamedTuple):
    """Classes, images, prompt length."""

    C: int
    B: int
    n: int

    def __str__(self) -> str:
        return f"C{self.C}-B{self.B}-n{self.n}"


def jobs(device: str) -> list[Job]:
    """A job a letter: the full-size text tower on a GPU, a narrow one on a CPU."""
    if device == "cuda":
        kind, base, providers = "text_side", Case(108, 64, 16), ("eager", "triton")
    else:
        kind, base, providers = "narrow_text_side", Case(LITERAL, 16, 8), ("eager", "sampled")
    return [
        Growth(rank=30 + k, operator=kind, variable=letter, values=values, base=base, providers=providers)
        for k, (letter, values) in enumerate(VARIED.items())
    ]


@dataclass(frozen=True, kw_only=True)
class Growth:
    """One curve of every provider."""

    rank: int
    operator: str
    """text_side or narrow_text_side"""
    variable: str
    """C, B or n"""
    values: tuple[int, ...]
    base: Case
    providers: tuple[str, ...]
    """eager, triton, sampled: eager on a sample of the pairs"""
    seconds: float = 0.1
    """of repetitions for each provider at each point"""

    @property
    def key(self) -> str:
        return f"growth/{self.operator}/{self.variable}"

    def run(self, device: torch.device, without: Mapping[str, str], started: Started) -> list[Row]:
        """`started` and `without` name a provider at a point, such as `eager C500-B16-n16`."""
        cases = [self.base._replace(**{self.variable: value}) for value in self.values]
        return [row for case in cases for row in self._point(case, device, without, started)]

    def _point(self, case: Case, device: torch.device, without: Mapping[str, str], started: Started) -> list[Row]:
        dtype = low_precision(device)
        row = Row(
            job=self.key,
            suite="growth",
            operator=self.operator,
            provider="",
            C=case.C,
            B=case.B,
            n=case.n,
            device=device.type,
            dtype=NAMES[dtype],
            detail=self.architecture(),
            flops=self.flops(case),
        )
        return measure(
            row,
            {name: partial(self.provider, name, case, device, dtype) for name in self.providers},
            partial(self.oracles, case, device),
            device,
            {name: without[f"{name} {case}"] for name in self.providers if f"{name} {case}" in without},
            lambda name: started(f"{name} {case}"),
            dtype=dtype,
            seconds=self.seconds,
        )

    def architecture(self) -> str:
        """Of the text tower, and the head's widths."""
        text, hidden = self._clip()["text_cfg"], self._head(self.base).hidden_size
        return f"W={text['width']}, {text['layers']} layers, D={self._clip()['embed_dim']}, H={hidden}"

    def provider(self, name: str, case: Case, device: torch.device, dtype: torch.dtype) -> Provider:
        """Loss and gradients of one form at one point."""
        setup = self.setup(case, "triton" if name == "triton" else "eager", device, dtype)
        loss = partial(_loss, setup, name, dtype)
        return GradientStep(loss, setup.head, device, warm_up=int(device.type == "cuda"), detail=self.architecture)

    def oracles(self, case: Case, device: torch.device, outcomes: Mapping[str, Outcome]) -> dict[str, Oracle]:
        """The literal equations where they are affordable, in float32, of all pairs or of the same sample."""
        if case.C > LITERAL and low_precision(device) == torch.float32:
            return {name: Oracle("eager (fp32)", outcome) for name, outcome in outcomes.items()}
        form = "reference" if case.C <= LITERAL else "eager"
        samples = {name == "sampled" for name in outcomes}
        found = {sampled: self._oracle(form, sampled, case, device) for sampled in samples}
        return {name: found[name == "sampled"] for name in outcomes}

    def _oracle(self, form: str, sampled: bool, case: Case, device: torch.device) -> Oracle:
        setup = self.setup(case, form, device, torch.float32)
        torch.manual_seed(0)  # as the first repetition
        loss = _loss(setup, "sampled" if sampled else form, torch.float32)
        loss.backward()
        return Oracle(f"{form} (fp32)", outcome_of(loss, setup.head))

    def setup(self, case: Case, form: str, device: torch.device, dtype: torch.dtype) -> Setup:
        """Its image tower has run."""
        clip, model = self._clip(), self._head(case)
        setup = make_setup(case.C, case.B, device, form, dtype, clip_settings=clip, model=model)
        features = setup.features()
        setup.image_tower = lambda images: features
        # The same number of labels on an image, else the pairs that are there grow with C², too.
        ranks = torch.rand(case.B, case.C).argsort(dim=1)
        setup.labels = (ranks < min(LABELS, case.C)).float().to(device)
        setup.head.impl = form_of(setup.head.impl, case.B)
        return setup

    def flops(self, case: Case) -> int:
        """Of the exact algebra with all pairs, counted on tensors without storage."""
        meta = torch.device("meta")
        with meta:
            setup = self.setup(case, "eager", meta, torch.float32)
        setup.head.text_memory = 2**62
        with flop_counter() as counter:
            setup.loss().backward()
        return int(counter.get_total_flops())

    def _clip(self) -> dict[str, Any]:
        return NARROW if self.operator.startswith("narrow") else FULL

    def _head(self, case: Case) -> ModelConfig:
        if self.operator.startswith("narrow"):
            return ModelConfig(prompt_length=case.n, hidden_size=64, dropout=0.0)
        return ModelConfig(prompt_length=case.n, dropout=0.0)


def _loss(setup: Setup, provider: str, dtype: torch.dtype) -> Tensor:
    with torch.autocast(setup.labels.device.type, dtype, enabled=dtype != torch.float32):
        if provider != "sampled":
            return setup.loss()
        return setup.loss(sample_pairs(setup.labels.cpu(), SAMPLES * setup.labels.shape[1]))


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """a of y ~ x^a: the slope of the least-squares line through the logarithms; two points or more, all positive."""
    slope, _ = np.polyfit(np.log(xs), np.log(ys), 1)
    return float(slope)


def fits(rows: Iterable[Row]) -> list[Fit]:
    """The exponent of each curve's upper part: from the middle of its range on a log scale, three points or more."""
    curves: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row.suite == "growth" and row.status == OK and row.p50 is not None:
            variable = row.job.rpartition("/")[2]
            curves[row.operator, row.provider, variable][getattr(row, variable)] = row.p50
    found = []
    for (operator, provider, variable), curve in curves.items():
        middle = math.sqrt(min(curve) * max(curve))
        xs = sorted(x for x in curve if x >= middle)
        if len(xs) >= 3:
            slope = exponent(xs, [curve[x] for x in xs])
            found.append(Fit(operator, provider, variable, slope, (xs[0], xs[-1])))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the fits of a results folder; returns the exit status, 2 after a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder that benchmarks.suite wrote")
    try:
        found = fits(read_rows(parser.parse_args(arguments).folder))
        if not found:
            raise UserError("no curve of three points; run python -m benchmarks.suite --only growth")
    except UserError as error:
        print(f"benchmarks.growth: error: {error}", file=sys.stderr)
        return 2
    for fit in found:
        letter, (low, high) = fit.variable, fit.range
        print(f"{fit.operator} {fit.provider}: time ~ {letter}^{fit.exponent:.2f} for {low} ≤ {letter} ≤ {high}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
