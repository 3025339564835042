"""Every mistake in settings ends in one line that names the key."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pspg.engine.cli import COMMANDS, Command, main, make_parser, parse
from pspg.engine.commands.train import check_parts
from pspg.engine.config import DataConfig, LossConfig, ModelConfig
from pspg.engine.data.cache.header import Header
from pspg.engine.training.config import OptimConfig, TrainConfig, check_train
from pspg.engine.training.losses import PromptLoss
from pspg.engine.training.optimizer import learning_rate
from pspg.engine.utils.errors import UserError
from pspg.engine.utils.help import plain_type

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_yaml_then_dotted_overrides(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: {prompt_length: 3}\noptim: {lr: 1e-3}\n")
    name, config = parse(["train", "--config", str(file), "--optim.lr", "2e-3", "--data.class_names", "[a, b]"])
    assert name == "train"
    assert (config.model.prompt_length, config.optim.lr, config.data.class_names) == (3, 2e-3, ["a", "b"])


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("model: {promt_length: 3}", "promt_length"),
        ("optim: {lr: fast}", "optim.lr"),
        ("model: 3", "model"),
        ("task: pretrain", "task"),
        ("unknown: 1", "unknown"),
        ("a: [", "config"),
        ("- 1", "config"),
    ],
)
def test_bad_yaml_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, key: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert main(["train", "--config", str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert key in captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--model.promt_length", "3"],
        ["train", "--model.prompt_len", "3"],
        ["train", "--config", "missing.yaml"],
        ["train"],
        ["evaluate"],
        ["predict"],
        ["phantom"],
        ["import-checkpoint"],
        ["export-checkpoint"],
        ["no-such-command"],
        [],
    ],
)
def test_bad_arguments_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("pspg-engine")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "pspg-engine: error: give a command; --help lists them"),
        ("prepare", "pspg-engine prepare: error: give a command, one of chestxray14, chexpert, folder, mimic-cxr, "),
        ("predict images", "images: belongs to no setting; give it as --input images"),
        ("trian", "there is no command 'trian'; did you mean train?"),
        ("padchest", "there is no command 'padchest'; did you mean prepare padchest?"),
        ("prepare padchst --output x", "there is no command 'padchst'; did you mean padchest?"),
        ("train --lr 3", "there is no setting --lr; did you mean optim.lr?"),
        ("train --optim.epocs=3", "there is no setting --optim.epocs; did you mean optim.epochs?"),
        ("train --epocs 3", "there is no setting --epocs; did you mean optim.epochs?"),
        ("train --zzz 3", "there is no setting --zzz"),
        ("train x.png", "x.png: belongs to no setting; give it as --KEY x.png"),
        ("train --optim.lr", "argument --optim.lr: expected one argument"),
        ("train --optim 3", "optim: is a group of settings; give --optim.KEY VALUE"),
        ("train --optim.lr abc", "optim.lr: must be a number, got abc"),
        ("train --batch_size 3.5", "batch_size: must be a whole number, got 3.5"),
        ("train --text_memory x", "text_memory: must be a whole number, got x"),
        ("train --text_memory 0", "text_memory: must be > 0, got 0"),
        ("train --data.mean 3", "data.mean: must be >= 0 and <= 1, got 3"),
        ("train --data.augment maybe", "data.augment: must be true or false, got maybe"),
        ("train --model.decoder rnn", "model.decoder: 'rnn' is not one of context, gru, lstm, mlp, transformer"),
        ("train --resume foo", "resume: 'foo' is not one of latest, null"),
        ("train --loss.pair_reduction max", "loss.pair_reduction: 'max' is not one of sum, mean, null"),
        ("evaluate --class_lists x", "class_lists: must be names and values, {NAME: VALUE}, got x"),
        ("phantom --size 3", "there is no setting --size; its name is --image_size now"),
        ("prepare cache --size=3", "there is no setting --size; its name is --image_size now"),
        ("train --output a b.yaml", "b.yaml: a file of settings stands first, or behind --config"),
        ("evaluate --notes a", "notes: must be a list, [A, B], got a"),
        ("evaluate --pictures {a:{b:c}}", "pictures: must be names and values, {NAME: VALUE}, got {a:{b:c}}"),
        ("prepare table --label_columns Edema", "label_columns: must be a list, [A, B], got Edema"),
        ("train --model.dropout null", "model.dropout: must be a number, got null"),
        ("study", "study: error: give FILE, a YAML file with its settings"),
        ("study none.yaml", "config: none.yaml: no such file"),
        ("train none.yaml", "config: none.yaml: no such file"),
        ("train --config {folder}", "config: {folder}: is a folder; give a YAML file"),
    ],
)
def test_a_mistake_is_named_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert main(arguments.replace("{folder}", str(tmp_path)).split()) == 2
    error = capsys.readouterr().err
    assert message.replace("{folder}", str(tmp_path)) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 3}", "a.yaml: there is no setting optim.lrr; did you mean optim.lr"),
        ("train: {optim: {lr: 3}}", "a.yaml: there is no setting train.optim.lr; did you mean optim.lr?"),
        ("task: prompt\noptim: {lr: [3}", "a.yaml:2: not readable as YAML (did not find expected ',' or ']')"),
        ("- a", "a.yaml: must hold settings, `key: value` a line"),
        ("optim: 3", "optim: is a group of settings"),
    ],
)
@pytest.mark.parametrize("option", [[], ["--config"]])
def test_a_mistake_in_a_file_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str, option: list[str]
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert main(["train", *option, str(file)]) == 2
    assert message in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"text_memory": 0}, "text_memory"),
        ({"task": "other"}, "task"),
        ({"optim": OptimConfig(lr=float("nan"))}, "optim.lr"),
        ({"model": ModelConfig(decoder="other")}, "model.decoder"),
        ({"data": DataConfig(mean=1.5, std=0.2)}, "data.mean"),
    ],
)
def test_settings_made_in_python_are_checked_like_those_of_the_command_line(override: Any, key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}: "):
        check_train(TrainConfig(**override))


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


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_every_setting(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    file = "FILE" if COMMANDS[command].needs_file else "[FILE]"
    assert text.startswith(f"usage: pspg-engine {command} {file} [--key VALUE ...]")
    settings = COMMANDS[command].load(COMMANDS[command].settings)
    for field in dataclasses.fields(settings):
        assert f"--{field.name}" in text
    assert "(type:" in text
    assert not re.search(r"Union\[|Optional\[|Literal\[|typing|<class", text)
    assert not re.search(r"default:\s*(?:True|False)?\)", text)
    assert not re.search(r"type:[^)]*(?:Interval|Int\b|Float\b|Seed|Depth|Below)", text)


@pytest.mark.parametrize("command", [name for name in COMMANDS if COMMANDS[name].example])
def test_the_example_of_a_command_is_valid(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS[0].parents[1])
    name, config = parse([*command.split(), *str(COMMANDS[command].example).split()])
    assert name == command
    assert config.checkpoint if command == "calibrate" else config.output  # it writes to the model


def test_shells_complete_commands_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--print_completion", "shtab-bash"])
    make_parser.cache_clear()  # it is of no use after that
    script = capsys.readouterr().out
    assert "--optim.lr" in script
    assert "import-checkpoint" in script


def every_type() -> list[tuple[str, str]]:
    """A setting of each type: command and dotted key."""
    found: dict[str, tuple[str, str]] = {}

    def walk(settings: Any, command: str, prefix: str = "") -> None:
        for field in dataclasses.fields(settings):
            if dataclasses.is_dataclass(field.default_factory):
                walk(field.default_factory, command, f"{prefix}{field.name}.")
            else:
                found.setdefault(str(field.type), (command, prefix + field.name))

    for name, command in COMMANDS.items():
        walk(command.load(command.settings), name)
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize(("command", "key"), every_type())
def test_no_value_of_a_wrong_type_shows_the_parser_s_own_words(command: str, key: str) -> None:
    for value in ("x", "3", "-1", "1.5", "[a, b]", "{a: b}", "null", "true", "[1, [2]]", "[{a: b}]", "{a: {b: c}}", ""):
        said = ""
        try:
            parse([*command.split(), f"--{key}={value}"])
        except UserError as error:
            said = str(error)
        assert not said or key in said
        assert not re.search(r"[Pp]arser key|Union|ubtype|<class|typing|Expected|NoneType|restriction", said)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "key"), every_type())
def test_no_setting_takes_a_number_without_end(command: str, key: str) -> None:
    def numbers(value: Any) -> list[float]:
        if isinstance(value, dict | list):
            return [number for one in (value.values() if isinstance(value, dict) else value) for number in numbers(one)]
        return [value] if isinstance(value, int | float) else []

    for value in ("inf", "[.inf, inf]", "{a: .inf}", "1" * 400):
        try:
            settings = parse([*command.split(), f"--{key}={value}"])[1]
        except UserError:
            continue
        for part in key.split("."):
            settings = getattr(settings, part)
        assert not numbers(settings), f"{key}: {value}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Optional[Literal['a', 'b']]", "{a, b} | null"),
        ("Union[str, list[str], null]", "str | list[str] | null"),
        ("Union[Literal['a', 'b'], list[Literal['a', 'b']]]", "{a, b} | list[{a, b}]"),
        ("dict[str, int | null]", "dict[str, int | null]"),
        ("PositiveInt | null", "int > 0 | null"),
        ("Optional[list[ClosedUnitInterval]]", "list[float from 0 to 1] | null"),
    ],
)
def test_types_are_shown_as_alternatives(text: str, shown: str) -> None:
    assert plain_type(text) == shown


def test_a_configuration_is_found_without_its_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, config = parse(["train", "chexpert_phase2", "--output", "a"])
    assert (config.output, config.task) == ("a", "prompt")
    Path("own.yaml").write_text("batch_size: 3\n")
    assert parse(["train", "own"])[1].batch_size == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --data.train {file} --data.class_names Edema", "data.class_names: Edema: no such file of names"),
        ("predict --checkpoint {file} --input {file} --class_names Edema", "names themselves go in a list, --class"),
        ("predict --checkpoint {file} --input {file} --maps m --map_classes A", "map_classes: A: no such file of"),
        ("export-checkpoint --checkpoint {file} --output o --layout classifier --class_names A", "A: no such file of"),
        ("import-checkpoint --source {file} --output o --class_names A", "class_names: A: no such file of names"),
        ("evaluate --clip RN50 --manifest {file} --output o --class_lists {lists}", "class_lists: a: Mass: no such"),
        ("evaluate --clip RN50 --manifest {file} --output o --label_names Mass", "label_names: Mass: no such file"),
    ],
)
def test_a_class_name_where_a_file_is_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("")
    words = shlex.split(arguments.replace("{lists}", "'{a: Mass}'").replace("{file}", str(file)))
    assert main([*words, *(["--model.pretrained", "random"] if words[0] == "train" else [])]) == 2
    assert message in capsys.readouterr().err


def test_commands_of_two_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A key with a space is all that it takes."""
    export = COMMANDS["export-checkpoint"]
    monkeypatch.setitem(COMMANDS, "prepare this", Command(export.settings, export.function, "first help"))
    monkeypatch.setitem(COMMANDS, "prepare that", Command(export.settings, export.function, "second help"))
    name, config = parse(["prepare", "that", "--output", "x"])
    assert (name, config.output) == ("prepare that", "x")
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: pspg-engine prepare COMMAND")
    assert "first help" in text
    assert "second help" in text
    for arguments, start in [
        (["prepare", "this", "--nope", "1"], "pspg-engine prepare this: error: "),
        (["prepare", "this"], "pspg-engine prepare this: error: checkpoint: "),
        (["prepare", "other"], "pspg-engine prepare: error: "),
        (["prepare"], "pspg-engine prepare: error: "),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(start)
        assert error.count("\n") == 1


def test_a_command_that_takes_a_file_asks_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 2
    assert capsys.readouterr().err == "pspg-engine study: error: give FILE, a YAML file with its settings\n"


REFUSALS = [
    ("train --data.train none.jsonl", "data.train: none.jsonl: no such file or folder"),
    ("train --data.train {file} --data.image_root none", "data.image_root: none: no such file or folder"),
    ("train --data.train {file}", "model.pretrained: phase 2 freezes the backbone, and its weights would be random"),
    ("train --data.train {file} --output {run}", "output: {run} already holds a run; continue it with --resume latest"),
    ("train --data.train {file} --data.cache none", "data.cache: none: no such file or folder"),
    ("train --data.train {file} --output {file}", "output: {file} is a file; choose another name"),
    ("train --data.train {file} --optim.warmup_epochs 60", "optim.warmup_epochs: 60"),
    (
        "evaluate --manifest {file} --output out",
        "give exactly one of --checkpoint, --clip, --predictions, --adapter",
    ),
    ("evaluate --clip RN50 --checkpoint x", "got --checkpoint and --clip"),
    ("evaluate --checkpoint none --manifest {file} --output out", "checkpoint: none: no such file or folder"),
    ("evaluate --clip RN50 --manifest none --output out", "manifest: none: no such file or folder"),
    ("evaluate --clip RN50 --manifest {file}", "output: is required; give --output"),
    ("predict", "checkpoint: is required; give --checkpoint"),
    ("predict --checkpoint none --input {file}", "checkpoint: none: no such file or folder"),
    ("predict --checkpoint {file} --input none", "input: none: no such file or folder"),
    ("predict --checkpoint {file} --input {file} --map_classes [a]", "map_classes: needs maps"),
    ("import-checkpoint --source none --output out --class_names [a]", "source: none: no such file or folder"),
    ("export-checkpoint --checkpoint none --output out", "checkpoint: none: no such file or folder"),
    ("export-checkpoint --checkpoint {file} --output out --class_names [a]", "only layout classifier"),
    ("prepare check --manifest none", "manifest: none: no such file or folder"),
    ("prepare cache --manifest {file}", "output: is required; give --output"),
    ("prepare folder", "source: is required; give --source"),
    ("phantom", "output: is required; give --output"),
    ("study none.yaml", "config: none.yaml: no such file"),
    (
        "train --data.train {file} --model.pretrained random --data.cache {cache}",
        "{cache}: holds images of 64 pixels (stretch), the run needs 224 (stretch)",
    ),
    (
        "train --data.train {file} --model.pretrained random --data.image_size 64 --data.cache {file}",
        "{file}: holds no cache",
    ),
    ("evaluate --clip RN50 --manifest {file} --output o --cache {run}", "{run}: holds no cache; make it with"),
    ("train --data.train {file} --model.pretrained random --model.pretrained_head no", "model.pretrained_head: no: no"),
    ("--version", ""),
    ("train --help", ""),
]


def test_a_refusal_that_needs_no_model_imports_no_torch(tmp_path: Path) -> None:
    """torch alone takes more than a second to import, and a mistake should be told at once."""
    file = tmp_path / "a.jsonl"
    file.write_text("")
    script = tmp_path / "run.py"
    script.write_text(
        "import json, sys\n"
        "from pspg.engine.cli import main\n"
        "for line in sys.stdin:\n"
        "    try: status = main(line.split())\n"
        "    except SystemExit: status = 0\n"
        "    slow = {'torch', 'open_clip', 'deepspeed', 'sklearn', 'matplotlib'} & sys.modules.keys()\n"
        "    print('END', status, *slow, file=sys.stderr)\n"
    )
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/last").write_text("step-00000001")
    cache = tmp_path / "cache"
    cache.mkdir()
    Header(64, "stretch", finished=True).write(cache)

    def filled(text: str) -> str:
        return text.replace("{file}", str(file)).replace("{run}", str(run)).replace("{cache}", str(cache))

    lines = [filled(arguments) for arguments, _ in REFUSALS]
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, input="\n".join(lines), capture_output=True, text=True, check=True
    )
    told = re.split(r"END (.*)\n", done.stderr)
    for (arguments, message), error, end in zip(REFUSALS, told[::2], told[1::2], strict=False):
        assert end == ("2" if message else "0"), arguments
        assert filled(message) in error
    assert len(told[1::2]) == len(REFUSALS)


@pytest.mark.parametrize("command", [[], ["prepare", "check"], ["train"], ["predict"]])
def test_help_says_what_each_exit_status_means(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Exit status: 0, all was done, with on_bad_image skip also where images were left out" in shown
    assert "prepare check found images that cannot be used; 3, all was done, and a damaged checkpoint" in shown


@pytest.mark.parametrize(("content", "status"), [(b"no image", 2), (None, 2), ("whole", 0)])
def test_the_exit_status_of_a_damaged_image_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | str | None, status: int
) -> None:
    """2 where it is checked or met, 0 where it was asked to leave such images out."""
    from PIL import Image

    for name in ("a.png", "b.png"):
        Image.new("L", (16, 16), 40).save(tmp_path / name)
    if content is None:
        (tmp_path / "b.png").unlink()
    elif isinstance(content, bytes):
        (tmp_path / "b.png").write_bytes(content)
    lines = [f'{{"id": "{name}", "filepath": "{name}"}}\n' for name in ("a.png", "b.png")]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    source = ["--manifest", str(tmp_path / "a.jsonl")]
    assert main(["prepare", "check", *source, "--workers", "1"]) == status
    cache = ["prepare", "cache", *source, "--workers", "1", "--image_size", "8", "--output"]
    assert main([*cache, str(tmp_path / "stop")]) == status
    assert main([*cache, str(tmp_path / "skip"), "--on_bad_image", "skip"]) == 0
    assert ("1 unreadable images were left out" in capsys.readouterr().err) == (status == 2)


@pytest.mark.parametrize("output", ["a.png", "A.JPEG", "a.dcm", "a.jsonl", "linked.csv"])
def test_nothing_is_written_over_what_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "a", "filepath": "a.png"}\n')
    (tmp_path / "a.png").write_bytes(b"precious")
    (tmp_path / "model").mkdir()
    (tmp_path / "linked.csv").symlink_to("a.jsonl")
    source, target = str(tmp_path / "a.jsonl"), str(tmp_path / output)
    assert main(["predict", "--checkpoint", str(tmp_path / "model"), "--input", source, "--output", target]) == 2
    assert f"error: output: {target} " in capsys.readouterr().err
    if output in ("a.jsonl", "linked.csv"):
        assert main(["prepare", "check", "--manifest", source, "--output", target]) == 2
        assert f"error: output: {target} is the input" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == b"precious"
