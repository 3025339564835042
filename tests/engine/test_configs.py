"""Configuration files, and the values that the shipped ones and the defaults have."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from pspg.engine.cli import parse
from pspg.engine.commands.train import check_parts
from pspg.engine.config import LossConfig
from pspg.engine.training.config import TrainConfig, check_train
from pspg.engine.training.losses import PromptLoss
from pspg.engine.training.optimizer import learning_rate
from pspg.engine.utils.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_yaml_then_dotted_overrides(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: {prompt_length: 3}\noptim: {lr: 1e-3}\n")
    name, config = parse(["train", "--config", str(file), "--optim.lr", "2e-3", "--data.class_names", "[a, b]"])
    assert name == "train"
    assert (config.model.prompt_length, config.optim.lr, config.data.class_names) == (3, 2e-3, ["a", "b"])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ({"model": {"hidden_size": 10}}, "model.decoder_heads"),
        ({"model": {"decoder": "context", "prompts": "shared"}}, "model.prompts"),
        ({"model": {"decoder": "context", "prompts": "positive"}}, "model.prompts"),
        ({"model": {"fusion": "regions"}}, "loss.pair"),
        ({"model": {"fusion": "regions"}, "loss": {"pair": "pcl"}}, "loss.pair"),
        ({"model": {"dropout": 1.5}}, "model.dropout"),
        ({"model": {"drop_path": 1.0}}, "model.drop_path"),
        ({"optim": {"lr": float("nan")}}, "optim.lr"),
        ({"optim": {"lr": 0}}, "optim.lr"),
        ({"optim": {"warmup_epochs": 60}}, "optim.warmup_epochs"),
        ({"optim": {"patience": 3}}, "optim.patience"),
        ({"data": {"mean": 0.5}}, "data.mean"),
        ({"data": {"max_megapixels": 0}}, "data.max_megapixels"),
        ({"data": {"cache_features": True}}, "data.cache_features"),
        ({"task": "contrastive", "data": {"cache_features": True}}, "data.cache_features"),
        ({"task": "prompt", "zero_stage": 3}, "zero_stage"),
        ({"task": "contrastive", "zero_stage": 3, "optim": {"ema_decay": 0.9}}, "zero_stage"),
        ({"task": "contrastive", "zero_stage": 3, "precision": "fp16"}, "zero_stage"),
        ({"batch_size": 0}, "batch_size"),
        ({"text_memory": 0}, "text_memory"),
        ({"loss": {"pair_samples": -1}}, "loss.pair_samples"),
        ({"loss": {"pair": "ranking", "pair_samples": 4}}, "loss.pair_samples"),
        ({"data": {"train": ""}}, "data.train"),
    ],
)
def test_contradictions_name_the_key(tmp_path: Path, override: dict[str, object], key: str) -> None:
    settings = {"data": {"train": "x.jsonl"}}
    for name, value in override.items():
        settings[name] = {**settings.get(name, {}), **value} if isinstance(value, dict) else value
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=rf"^{key}: "):
        check(["--config", str(file)])


def check(arguments: list[str]) -> TrainConfig:
    """Parse and check the settings of a training run."""
    _, config = parse(["train", *arguments])
    check_train(config)
    check_parts(config)
    return config


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid(file: Path) -> None:
    check(["--config", str(file)])


@pytest.mark.parametrize("decoder", ["gru", "lstm", "transformer", "mlp"])
@pytest.mark.parametrize("prompts", ["dual", "shared", "positive"])
def test_the_ablations_are_overrides(decoder: str, prompts: str) -> None:
    file = CONFIGS[0].parent / "chexpert_phase2.yaml"
    config = check(["--config", str(file), "--model.decoder", decoder, "--model.prompts", prompts])
    assert (config.model.decoder, config.model.prompts) == (decoder, prompts)


def test_paper_hyper_parameters() -> None:
    """Section 4.1 of the paper, where the shipped configuration and the defaults must agree."""
    _, config = parse(["train", "--config", str(CONFIGS[0].parent / "chexpert_phase2.yaml")])
    plain = TrainConfig()
    for c in (config, plain):
        assert (c.model.prompt_length, c.model.hidden_size, c.model.dropout) == (16, 512, 0.2)
        assert (c.optim.name, c.optim.lr, c.optim.weight_decay, c.optim.epochs) == ("sgd", 1e-4, 0.05, 50)
        assert (c.optim.warmup_lr, c.optim.min_lr, c.batch_size) == (1e-6, 5e-6, 64)
        assert [learning_rate(step, 1, c.optim) == c.optim.lr for step in (4, 5)] == [False, True]  # 5 epochs
        assert (c.loss.gamma_positive, c.loss.gamma_negative, c.loss.clip) == (1, 2, 0.05)


@pytest.mark.parametrize("name", ["chexpert_phase2", "chexpert_dualcoop", "mimic_cxr_phase1", "padchest108"])
def test_a_shipped_configuration_runs_for_one_epoch(name: str) -> None:
    """As a first try does, with nothing else changed."""
    config = check([f"{name}.yaml", "--data.train", "a.jsonl", "--model.pretrained", "openai", "--optim.epochs", "1"])
    assert learning_rate(0, 2, config.optim) < learning_rate(1, 2, config.optim) == config.optim.lr


def test_the_baseline_is_aligned_with_the_paper_s_phase_2() -> None:
    """DualCoOp and PsPG differ in the head, in the pair loss, and in nothing else (section 4.1)."""
    ours, theirs = (
        dataclasses.asdict(parse(["train", "--config", str(CONFIGS[0].parent / f"chexpert_{name}.yaml")])[1])
        for name in ("phase2", "dualcoop")
    )
    other = {key for key in ours if ours[key] != theirs[key]}
    assert other == {"output", "model", "loss"}
    assert {key for key in ours["model"] if ours["model"][key] != theirs["model"][key]} == {"decoder", "fusion"}
    assert {key for key in ours["loss"] if ours["loss"][key] != theirs["loss"][key]} == {"pair"}


def test_loss_presets() -> None:
    keys = ("classification_weight", "classification_reduction", "pair_weight", "pair_reduction")

    def values(**settings: object) -> tuple[object, ...]:
        resolved = PromptLoss(LossConfig(**settings)).config  # type: ignore[arg-type]
        return tuple(getattr(resolved, key) for key in keys)

    assert values() == (1.0, "sum", 1.0, "sum")
    assert values(preset="published") == (0.1, "sum", 1.0, "mean")
    assert values(preset="published", pair="ranking") == (0.1, "sum", 0.07, "mean")
    assert values(preset="published", pair_weight=2.0) == (0.1, "sum", 2.0, "mean")


def test_a_configuration_is_found_without_its_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, config = parse(["train", "chexpert_phase2", "--output", "a"])
    assert (config.output, config.task) == ("a", "prompt")
    Path("own.yaml").write_text("batch_size: 3\n")
    assert parse(["train", "own"])[1].batch_size == 3
