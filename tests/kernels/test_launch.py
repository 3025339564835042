"""Configurations by architecture, and launches that are recorded instead of made."""

from __future__ import annotations

import pytest
import torch

launch = pytest.importorskip("pspg.kernels.launch")
META = torch.device("meta")


@pytest.mark.parametrize(("architecture", "block"), [(75, 1), (80, 1), (86, 1), (89, 1), (90, 2), (120, 2)])
def test_an_architecture_takes_the_newest_configuration_that_is_not_above_it(
    architecture: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "CONFIGS", {})
    launch.pin("kernel", sm_90={"BLOCK": 2}, sm_80={"BLOCK": 1})
    with launch.record(architecture):
        assert launch.configuration("kernel", META) == {"BLOCK": block}


def test_records_what_would_be_launched() -> None:
    from pspg.kernels.asymmetric_loss import triton as fused

    logits, labels = torch.empty(64, 2, 108, device=META), torch.empty(64, 108, device=META)
    with launch.record(90) as launches:
        fused.run(logits, labels, 1.0, 2.0, 0.05, 1e-6)
    (one,) = launches
    assert one.grid == (14,)
    assert one.arguments["logits"] is logits
    assert (one.arguments["count"], one.arguments["BLOCK"]) == (64 * 108, 512)
    assert one.options == {"num_warps": 4}


def test_a_grid_without_programs_launches_nothing() -> None:
    with launch.record(80) as launches:
        launch.launch(None, (3, 0))
    assert launches == []
