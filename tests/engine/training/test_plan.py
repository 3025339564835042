"""A dry run: what it tells of ranks and bytes is what the run would have, and it starts nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pspg.engine.cli import main, parse
from pspg.engine.distributed.launcher import RankInfo
from pspg.engine.models.clip import build_clip, clip_config
from pspg.engine.models.pspg import PromptHead
from pspg.engine.training.plan import plan
from pspg.engine.utils.errors import UserError

Settings = Callable[[str], list[str]]


def lines_of(arguments: list[str], rank: int, size: int) -> list[str]:
    return plan(parse(arguments)[1], RankInfo(rank, size, rank % 2, 2, "node-a", 29500), torch.device("cpu"))


def mebibytes(lines: list[str]) -> dict[str, float]:
    (line,) = [line for line in lines if line.startswith("MiB of each rank")]
    return {name: float(size) for name, size in re.findall(r"([a-z][a-z ]+) ([\d.]+)", line.partition(":")[2])}


def test_a_dry_run_starts_nothing(
    tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("joined a group"))
    run = tmp_path / "run"
    assert main([*settings("prompt"), "--dry_run", "--output", str(run)]) == 0
    said = capsys.readouterr()
    first, *_, last = (said.out + said.err).splitlines()
    assert re.fullmatch(r"rank 0 of 1 on \S+: cpu, 12 of the 12 images of a batch", first)
    assert last == "dry run: nothing was started"
    assert not run.exists()


def test_each_rank_tells_its_place_and_the_first_the_rest(settings: Settings, phantoms: Path) -> None:
    names = (phantoms / "classes.txt").read_text().splitlines()[:2]
    arguments = [*settings("prompt"), "--data.class_names", json.dumps(names)]
    assert [len(lines_of(arguments, rank, 4)) for rank in range(4)] == [5, 1, 1, 1]
    (line,) = lines_of(arguments, 3, 4)
    assert line.endswith("(local 1 of 2), rank 0 at node-a:29500: cpu, 3 of the 12 images of a batch")
    config = parse(arguments)[1]
    clip = build_clip(clip_config(config.model.backbone))
    trained = sum(p.numel() for p in PromptHead(32, 32, config.model).parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in clip.parameters())
    _, about, data, *_ = lines_of(arguments, 0, 4)
    assert f"{trained:,} parameters train, {frozen:,} are frozen; fp32, adamw, ZeRO 0, scope global" in about
    assert data == "72 images with 2 classes, 12 images a batch, 6 steps an epoch, 12 in all"


def test_a_folder_that_brings_the_backbone_is_named(settings: Settings, tmp_path: Path) -> None:
    phase1, named = tmp_path / "phase1", parse(settings("prompt"))[1].model.backbone
    assert main([*settings("contrastive"), "--optim.epochs", "1", "--output", str(phase1)]) == 0
    about = lines_of([*settings("prompt"), "--model.pretrained", str(phase1)], 0, 1)[1]
    assert about.startswith(f"task prompt, CLIP with {phase1}: ")
    assert named not in about


def test_bytes_are_shared_by_the_zero_stage(settings: Settings) -> None:
    whole = mebibytes(lines_of([*settings("contrastive")], 0, 2))
    assert whole["optimizer state"] == pytest.approx(2 * whole["weights"], rel=0.02)
    for stage, shared in enumerate([(), ("optimizer state",), ("optimizer state", "gradients")]):
        found = mebibytes(lines_of([*settings("contrastive"), "--zero_stage", str(stage)], 0, 2))
        assert {name for name, size in found.items() if size < 0.6 * whole[name]} - {"in all"} == set(shared)


def test_text_activations_are_held_by_their_budget(settings: Settings) -> None:
    prompt = settings("prompt")
    assert mebibytes(lines_of(prompt, 0, 2))["text activations"] == 512
    given = lines_of([*prompt, "--text_memory", "64"], 0, 2)
    assert mebibytes(given)["text activations"] == 64
    assert given[-2].endswith("in all; those of images come on top")
    assert "text activations" not in mebibytes(lines_of(settings("contrastive"), 0, 2))


def test_a_batch_that_does_not_split_is_refused(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"^batch_size: 12 images cannot be split over 5 processes$"):
        lines_of(settings("prompt"), 0, 5)
