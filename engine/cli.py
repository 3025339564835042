"""The command `pspg-engine`: settings from YAML and dotted overrides, one line for every mistake."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import logging
import os
import re
import sys
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from .config import choice_values
from .data.datasets import all_datasets
from .data.preparation.build import build
from .utils.errors import DAMAGED, UserError
from .utils.help import SettingsHelp
from .utils.interrupt import heard_interrupts
from .utils.logging import Heard, is_first, show_messages
from .utils.packaged import CONFIGS, find_file, near_names
from .utils.parser_messages import parser_message
from .utils.plugins import load_plugins
from .utils.settings import YAML, plain_numbers, refuse_null
from .utils.workers import loader_deaths
from .utils.yaml_text import read_yaml

log = logging.getLogger(__name__)

OUT_OF_MEMORY = (
    r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory|can't start new thread"
    r"|Resource temporarily unavailable"
)


EXIT = (
    "Exit status: 0, all was done, with on_bad_image skip also where images were left out and listed; 2, a mistake in "
    "the settings or an input, or prepare check found images that cannot be used; 3, all was done, and a damaged "
    "checkpoint was met and told; 130, interrupted."
)


@dataclass(frozen=True)
class Command:
    """A subcommand: settings and function, or where they are, so that neither --help nor a refusal imports torch."""

    settings: str | type
    function: str | Callable[[Any], Any]
    help: str
    check: str | None = None
    """what refuses settings before the function is imported"""
    needs_file: bool = False
    """whether it is nothing without a YAML file"""
    example: str | None = None
    """its most common use: what stands after its name"""

    def load(self, what: str | Callable[[Any], Any]) -> Any:
        if not isinstance(what, str):
            return what
        module, _, name = what.partition(":")
        return getattr(importlib.import_module(f".{module}", __package__), name)


def prepare_commands() -> dict[str, Command]:
    """A command for each data set of `data/datasets/`."""
    return {
        f"prepare {dataset.name}": Command(
            dataset.settings, partial(build, dataset), dataset.help, example=dataset.example
        )
        for dataset in all_datasets()
    }


COMMANDS = {
    "train": Command(
        "training.config:TrainConfig",
        "commands.train:train",
        "train either phase",
        "training.config:check_run",
        example="configs/chexpert_phase2.yaml --model.pretrained openai --output runs/a",
    ),
    "evaluate": Command(
        "evaluation.config:EvaluateConfig",
        "commands.evaluate:evaluate_model",
        "metrics, tables and a report",
        "evaluation.config:check_evaluate",
        example="--checkpoint runs/a --manifest data/own/test.jsonl --output report",
    ),
    "predict": Command(
        "commands.settings:PredictConfig",
        "commands.predict:predict",
        "score images, DICOM files included",
        "commands.settings:check_predict",
        example="--checkpoint runs/a --input new_images --output predictions.csv",
    ),
    "calibrate": Command(
        "commands.settings:CalibrateConfig",
        "commands.calibrate:calibrate",
        "fit probabilities and thresholds, kept with the model",
        "commands.settings:check_calibrate",
        example="--checkpoint runs/a --manifest data/own/val.jsonl",
    ),
    "phantom": Command(
        "commands.phantom:DrawConfig",
        "commands.phantom:draw",
        "draw a phantom data set",
        example="--train 600 --val 60 --test 150 --output data/phantoms",
    ),
    "import-checkpoint": Command(
        "commands.settings:ImportConfig",
        "commands.convert:import_checkpoint",
        "read the authors' weights",
        "commands.settings:check_import",
        example="--source best.pth --class_names classes.txt --output models/imported",
    ),
    "export-checkpoint": Command(
        "commands.settings:ExportConfig",
        "commands.convert:export_checkpoint",
        "write a model folder",
        "commands.settings:check_export",
        example="--checkpoint runs/a --layout classifier --output shipped",
    ),
    "study": Command(
        "commands.study.config:StudyConfig",
        "commands.study.run:study",
        "run and write a paper's table",
        needs_file=True,
        example="configs/studies/phantom/table1.yaml",
    ),
    "leave-out": Command(
        "commands.study.config:LeaveOutConfig",
        "commands.study.leave_out:leave_out",
        "zero-shot on classes left out of the training",
        needs_file=True,
        example="configs/leave_out/demo.yaml",
    ),
    **prepare_commands(),
    "prepare check": Command(
        "commands.settings:CheckConfig",
        "commands.prepare:check_images",
        "find unreadable images",
        "commands.settings:check_images",
        example="--manifest data/own/train.jsonl --output bad.csv",
    ),
    "prepare cache": Command(
        "commands.settings:CacheConfig",
        "commands.prepare:make_cache",
        "decode and resize images once",
        "commands.settings:check_cache",
        example="--manifest data/own/train.jsonl --output data/own/cache",
    ),
}
RENAMED = {"phantom": {"size": "image_size"}, "prepare cache": {"size": "image_size"}}
"""command → earlier names of its settings → their names"""
# A command of two words, such as "prepare folder", belongs to the group of its first word.
GROUPS = {
    "prepare": "Get a data set ready for training.",
}


@cache
def make_parser(
    commands: tuple[tuple[str, Command], ...], choices: object = ()
) -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The whole parser, and those of the commands; `choices` are those of settings that were registered by now."""
    root = ArgumentParser(
        prog="pspg-engine",
        description="Train, evaluate and use Pseudo-Prompt Generating (PsPG) for chest radiographs.",
        version=version("pspg-engine"),
        epilog=EXIT,
        formatter_class=SettingsHelp,  # the commands' parsers take it over
        exit_on_error=False,
        allow_abbrev=False,
    )
    branches = {"": root.add_subcommands(required=True, dest="command")}
    parsers: dict[str, ArgumentParser] = {}
    for name, command in commands:
        group, _, word = name.rpartition(" ")
        if group not in branches:
            branches[group] = _add_group(branches[""], group)
        settings = command.load(command.settings)
        parser = parsers[name] = ArgumentParser(
            description=(settings.__doc__ or "").strip(),
            epilog="Nested settings are given as --group.key VALUE or in a YAML file; later ones win. A configuration "
            "is looked for as given, then beside the YAML file that names it, then among those that come with the "
            f"engine, in {CONFIGS}. {EXIT}".replace("%", "%%"),
            exit_on_error=False,
            allow_abbrev=False,
        )
        parser.add_argument(
            "--config", action="config", help="YAML file with any of the settings below, the same as FILE"
        )
        parser.add_class_arguments(settings)
        for titled in parser._action_groups:
            if titled.title and (parser.description or "").startswith(titled.title):
                titled.title = "settings"  # else it would repeat the description
        branches[group].add_subcommand(word, parser, help=command.help)
        parser.prog = f"pspg-engine {name}"
        file = "FILE" if command.needs_file else "[FILE]"
        example = f"\nexample: %(prog)s {command.example}" if command.example else ""
        parser.usage = f"%(prog)s {file} [--key VALUE ...]{example}"
    return root, parsers


def _add_group(branch: Any, group: str) -> Any:
    """Add the parser of `group`; return the subcommands that its second words go to."""
    parser = ArgumentParser(
        description=GROUPS[group], formatter_class=SettingsHelp, exit_on_error=False, allow_abbrev=False
    )
    branch.add_subcommand(group, parser, help=GROUPS[group][0].lower() + GROUPS[group][1:].rstrip("."))
    parser.prog = f"pspg-engine {group}"
    parser.usage = "%(prog)s COMMAND [FILE] [--key VALUE ...]"
    return parser.add_subcommands(required=True, dest="command")


def parse(arguments: Sequence[str]) -> tuple[str, Any]:
    """Name and typed settings of the command.

    Raises:
        UserError: unknown key, wrong type, unreadable file; one line.
    """
    load_plugins([name for given in _values_of("--plugins", arguments) for name in _names_in(given)])
    _add_datasets()
    arguments = _find_configs(_with_config(_with_values(arguments)))
    for file in map(Path, _configs(arguments)):
        values = read_yaml(file, YAML, "config") if file.is_file() else None  # its errors name the file
        if isinstance(values, dict) and (names := values.get("plugins")):
            load_plugins(names if isinstance(names, list) else str(names))
    _add_datasets()
    # Choices are part of the parser.
    root, parsers = make_parser(tuple(COMMANDS.items()), tuple(choice_values().values()))
    try:
        values = root.parse_args(arguments)
        name = values.command
        values = values[name]
        if name in GROUPS:
            word = values.command
            name, values = f"{name} {word}", values[word]
        values.pop("config", None)
        settings = COMMANDS[name].load(COMMANDS[name].settings)
        for field in dataclasses.fields(settings):
            if dataclasses.is_dataclass(field.default_factory) and not hasattr(values[field.name], "keys"):
                raise UserError(f"{field.name}: is a group of settings, got {values[field.name]!r}")
        refuse_null(settings, values)
        found = plain_numbers(settings(**vars(parsers[name].instantiate(values))))
        if hasattr(found, "find_files"):
            found.find_files([Path(file).parent for file in reversed(_configs(arguments))])
        return name, found
    except ArgumentError as error:
        command = _command_of(arguments)
        keys = [action.dest for action in parsers[command]._actions] if command in parsers else []
        last = next(reversed(_configs(arguments)), None)
        raise UserError(parser_message(error, COMMANDS, keys, last, RENAMED.get(command))) from None
    except UnicodeDecodeError:
        raise UserError("config: is not a UTF-8 text file") from None


def _command_of(arguments: Sequence[str]) -> str:
    """The command or group that the arguments begin with; empty: none."""
    words = {" ".join(arguments[:count]) for count in (1, 2)}
    return max(words & (COMMANDS.keys() | GROUPS.keys()), key=len, default="")


def _with_values(arguments: Sequence[str]) -> list[str]:
    """The arguments with the value of a --dry_run that stands alone."""
    pairs = pairwise([*arguments, "--"])
    return [f"{word}=true" if word == "--dry_run" and after.startswith("--") else word for word, after in pairs]


def _with_config(arguments: list[str]) -> list[str]:
    """Put --config before a command's bare file.

    Raises:
        UserError: a command that needs a file is given nothing.
    """
    name = _command_of(arguments)
    command, words = COMMANDS.get(name), len(name.split())
    if command is None:
        return arguments
    if command.needs_file and len(arguments) == words:
        raise UserError("give FILE, a YAML file with its settings")
    bare = arguments[words] if len(arguments) > words else "-"
    if bare.startswith("-"):
        return arguments
    if not Path(bare).exists() and find_file(f"{bare}.yaml") is not None:
        bare = f"{bare}.yaml"
    is_file = command.needs_file or Path(bare).suffix in (".yaml", ".yml")
    return [*arguments[:words], "--config", bare, *arguments[words + 1 :]] if is_file else arguments


def _configs(arguments: Sequence[str]) -> list[str]:
    """The values of --config."""
    return _values_of("--config", arguments)


def _values_of(option: str, arguments: Sequence[str]) -> list[str]:
    """What is given to an option, before anything is parsed."""
    given = [b for a, b in pairwise(arguments) if a == option]
    return given + [word.removeprefix(f"{option}=") for word in arguments if word.startswith(f"{option}=")]


def _names_in(given: str) -> list[str]:
    """The names of a word of the command line: one, or a list [a, b]."""
    words = given[1:-1].split(",") if re.fullmatch(r"\[.*\]", given) else [given]
    return [name.strip(" '\"") for name in words if name.strip()]


def _add_datasets() -> None:
    """Make commands of the data sets that plugins have registered."""
    for name, command in prepare_commands().items():
        COMMANDS.setdefault(name, command)


def _find_configs(arguments: list[str]) -> list[str]:
    """The arguments with every value of --config where it is found.

    Raises:
        UserError: it is nowhere.
    """
    found = list(arguments)
    for number, word in enumerate(arguments):
        option, name = ("--config=", word[9:]) if word.startswith("--config=") else ("", word)
        if not option and (number == 0 or arguments[number - 1] != "--config"):
            continue
        file = find_file(name)
        if file is None:
            raise UserError(f"config: {name}: no such file{near_names(name)}")
        if file != name:
            log.info("config: %s: taken from those that come with the engine, %s", name, file)
        found[number] = option + file
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, see `EXIT`."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", "tqdm:disabling monitor")  # for want of threads; bars go on without it
    # Read when torch is imported. Where a rank is lost its store would log C++ traces beside the one line that says so.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own remarks
    show_messages()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    program = f"pspg-engine {_command_of(arguments)}".strip()
    with heard_interrupts() as interrupts:
        try:
            return _run(arguments)
        except Exception as error:
            if not interrupts.heard:
                _tell(program, error)
                return 2
        except KeyboardInterrupt:
            pass  # told below, as an error is that came of it
    log.error("%s: interrupted", program)
    return 130


def _run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    name, config = parse(arguments)
    if name not in ("train", "evaluate") and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("runs as one process; start it without a launcher")
    command = COMMANDS[name]
    if command.check is not None:
        command.load(command.check)(config)
    function: Callable[[Any], Any] = command.load(command.function)
    with loader_deaths(), Heard("pspg.engine.checkpoints") as damage:
        function(config)
    return DAMAGED if damage.warned else 0


def _tell(program: str, error: Exception) -> None:
    """One line for what a user can mend; anything else is raised again."""
    if isinstance(error, UserError):
        if error.local or is_first():
            several = error.local and os.environ.get("WORLD_SIZE", "1") != "1"
            where = f"rank {os.environ.get('RANK', '0')}: " if several else ""
            log.error("%s: error: %s%s", program, where, error)
    elif isinstance(error, OSError):
        log.error("%s: error: %s: %s", program, _file_of(error), error.strerror or error)
    elif isinstance(error, MemoryError | RuntimeError) and (found := _want_of_memory(error)) is not None:
        reason = (str(found).splitlines() or [""])[0][:200]
        advice = "lower batch_size, data.workers or max_megapixels, or take a machine with more"
        log.error("%s: error: out of memory%s; %s", program, f" ({reason})" if reason else "", advice)
    else:
        raise error


def _want_of_memory(error: BaseException | None) -> BaseException | None:
    """The error, or the one that it came of, that says that memory or threads are lacking."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(OUT_OF_MEMORY, str(error))):
            return error
        error = error.__context__
    return None


def _file_of(error: OSError) -> str:
    """The file that an error of the system is about; where the system does not say, what was being written."""
    if error.filename is not None:
        return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    if error.errno == errno.EPIPE:
        return "standard output"
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    values = (value for names in reversed(frames) for value in names.values())
    return str(next((value for value in values if isinstance(value, Path)), "a file of this command"))


if __name__ == "__main__":
    sys.exit(main())
