"""Images and patients in two splits at once: what is measured on them is no test of anything."""

from __future__ import annotations

import logging

from ..utils.errors import UserError
from .manifest import Manifest, Sample

log = logging.getLogger(__name__)


def check_apart(training: Manifest, held_out: Manifest) -> None:
    """Refuse a file that is in both manifests, however its path is spelled; warn of patients that are in both.

    One manifest given as both is meant, as when a run is to learn it by heart, and only told. Copies of a file are
    other files, see `copies.py`. Patients are compared by `patient_id`, which prepared data sets share only
    within one output folder.

    Raises:
        UserError: naming both lines of the first such file, and their count.
    """
    if held_out.path.resolve() == training.path.resolve():
        log.warning(
            f"{training.path}: is both data.train and data.val; scores on images that were trained on are no test"
        )
        return
    files = {sample.path: sample for sample in training.samples}
    if shared := [sample for sample in held_out.samples if sample.path in files]:
        pair = _pair(training, files[shared[0].path], held_out, shared[0])
        raise UserError(
            f"{pair}: the same image, {shared[0].path.name!r}; {len(shared):,} images are in both data.train and "
            "data.val: take them out of one, scores on images that were trained on are no test"
        )
    patients = {sample.patient: sample for sample in training.samples if sample.patient is not None}
    known = [(patients[sample.patient], sample) for sample in held_out.samples if sample.patient in patients]
    if known:
        count = len({sample.patient for _, sample in known})
        pair = _pair(training, known[0][0], held_out, known[0][1])
        log.warning(f"{pair}: the same patient; {count:,} patients are in both manifests, and scores will be too high")


def _pair(training: Manifest, one: Sample, held_out: Manifest, other: Sample) -> str:
    return f"{held_out.path}:{other.line} and {training.path}:{one.line}"
