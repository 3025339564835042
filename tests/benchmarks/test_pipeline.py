"""The loaders as jobs: measured, or a line that says why not."""

from __future__ import annotations

import pickle

import pytest
import torch
from benchmarks.pipeline import Loading

from benchmarks import loading, pipeline
from benchmarks.rows import FAILED, OK, TOO_LARGE
from pspg.engine.errors import UserError

CPU = torch.device("cpu")
SMALL = Loading(rank=0, source="png", B=4, batches=3, films=4, size=64, image_size=32, workers=0)


def test_every_loader_is_measured_or_left_out() -> None:
    rows = SMALL.run(CPU, {"dali": "killed"}, lambda name: None)
    assert [(row.provider, row.status) for row in rows] == [("torch", OK), ("dali", TOO_LARGE)]
    assert rows[0].p50 is not None
    assert rows[0].p20 is not None
    assert rows[0].p80 is not None
    assert 0 < rows[0].p20 <= rows[0].p50 <= rows[0].p80
    assert "images/s" in rows[0].detail
    assert rows[1].p50 is None


def test_wrong_pixels_have_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> None:
        raise UserError("pixels are 9 grey levels from Pillow's")

    monkeypatch.setattr(loading, "check_pixels", wrong)
    for row in SMALL.run(CPU, {"dali": "killed"}, lambda name: None)[:1]:
        assert (row.status, row.p50) == (FAILED, None)
        assert "grey levels" in row.detail


def test_jobs_pickle_and_have_keys_of_their_own() -> None:
    jobs = pipeline.jobs("cpu")
    assert pickle.loads(pickle.dumps(jobs)) == jobs
    assert {job.key.split("/")[1] for job in jobs} == set(loading.SOURCES)
