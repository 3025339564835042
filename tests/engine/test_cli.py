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

from pspg.engine.cli import COMMANDS, main, parse
from pspg.engine.config import DataConfig, ModelConfig
from pspg.engine.data.cache.header import Header
from pspg.engine.training.config import OptimConfig, TrainConfig, check_train
from pspg.engine.utils.errors import UserError


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
